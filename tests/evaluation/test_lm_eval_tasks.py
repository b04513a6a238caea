"""Tasks of lm-evaluation-harness, offline: values by their definition, and the same in batches as one by one."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from tiny_checkpoints import save_tokenizer
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance

from ssm_zoo.evaluation.lm_eval_tasks import adapt_to_lm_eval, evaluate_lm_eval_tasks

QUESTIONS = [
    {"question": "the cat sat on", "choices": ["a mat", "the long red wall", "it"], "answer": 1},
    {"question": "we", "choices": ["saw two dogs", "ran", "did not see a thing"], "answer": 0},
    {"question": "in the old house on the hill", "choices": ["x", "lived a man", "stood a chair"], "answer": 2},
    {"question": "bread and", "choices": ["butter", "b", "a ship that sails"], "answer": 0},
    {"question": "one two three", "choices": ["four", "no", "one hundred and one"], "answer": 0},
]
CHOICE_TASK = """
task: zoo_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY_TASK = """
task: zoo_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with two tasks whose data is a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", CHOICE_TASK), ("perplexity", PERPLEXITY_TASK)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(data)))
    return tmp_path / "tasks"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer", trust_remote_code=False)


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """The definition: sum of the log-probabilities of a continuation, one text at a time."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(scores[place - 1, ids[0, place]].item() for place in range(len(context), ids.shape[1]))


def test_tasks_give_their_definition_in_batches_as_one_by_one(tasks: Path, tokenizer: Any) -> None:
    model = make_model("mamba2")
    reports = [
        evaluate_lm_eval_tasks(
            model, tokenizer, ["zoo_choice", "zoo_perp*"], include_path=tasks, batch_size=size, limit=limit
        )["results"]
        for size, limit in ((1, None), (4, None), (4, 2))
    ]
    single, batched, limited = reports
    right, total, length = [], 0.0, 0
    for row in QUESTIONS:
        context = tokenizer(row["question"]).input_ids
        values = [log_likelihood(model, context, tokenizer(f" {choice}").input_ids) for choice in row["choices"]]
        right.append(values.index(max(values)) == row["answer"])
        total += log_likelihood(model, [tokenizer.eos_token_id], context)
        length += len(row["question"])
    for report in (single, batched):
        assert report["zoo_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
        assert report["zoo_perplexity"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / length), rel=1e-5)
    assert 0 < single["zoo_choice"]["acc_norm,none"] == batched["zoo_choice"]["acc_norm,none"]
    assert limited["zoo_choice"]["acc,none"] == pytest.approx(sum(right[:2]) / 2)


def test_logits_that_are_not_finite_are_no_accuracy(tasks: Path, tokenizer: Any) -> None:
    model: Any = make_model("mamba2")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"model: the logits are not finite\. Try another dtype"):
        evaluate_lm_eval_tasks(model, tokenizer, ["zoo_choice"], include_path=tasks)


@pytest.mark.parametrize("name", ["mamba", "all-four", "taipan", "mixer"])
def test_batches_of_texts_of_all_lengths_equal_single_texts(name: str, tokenizer: Any) -> None:
    model = make_model(name)
    pairs = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    prompts = [(row["question"], {"until": ["q"], "max_gen_toks": 6}) for row in QUESTIONS]
    found = []
    for size in (1, 4):
        adapted = adapt_to_lm_eval(model, tokenizer, batch_size=size, max_length=64)
        scored = adapted.loglikelihood(
            [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)], disable_tqdm=True
        )
        written = adapted.generate_until(
            [Instance("generate_until", {}, prompt, index) for index, prompt in enumerate(prompts)], disable_tqdm=True
        )
        found.append((scored, written))
    (single, single_texts), (batched, batched_texts) = found
    assert [value for value, _ in batched] == pytest.approx([value for value, _ in single], rel=1e-5, abs=1e-5)
    assert [greedy for _, greedy in batched] == [greedy for _, greedy in single]
    assert batched_texts == single_texts
    assert len(set(single_texts)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["no_such_task"]}, "`tasks` must be tasks of lm-eval or .*, got 'no_such_task'"),
        ({"tasks": []}, "`tasks` must be one name or more"),
        ({"include_path": "nowhere"}, "`include_path` must be an existing folder, got 'nowhere'"),
        ({"num_fewshot": -1}, "`num_fewshot` must be at least 0, got -1"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_lm_eval_tasks(make_model("mamba2"), tokenizer, **{"tasks": ["zoo_choice"], **changes})


def test_what_is_missing_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer must have a token for the beginning or end of a text"):
        adapt_to_lm_eval(make_model("mamba2"), tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package lm-eval, which is not installed\. Install it .*'\.\[lm-eval\]'"):
        evaluate_lm_eval_tasks(make_model("mamba2"), tokenizer, ["x"])
