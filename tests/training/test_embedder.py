"""A finetuning of an embedder from settings to folder: loss, learning, resumption, what is saved, mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama, save_tokenizer
from torch import Tensor
from transformers import Trainer

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from embedding_pairs import embedder_values, save_model, write_pairs

from ssm_zoo.evaluation.retrieval import embedder_scores
from ssm_zoo.training.embedder import (
    adapt,
    backbone_of,
    finetune_embedder,
    finished_embedder,
    heldout_retrieval,
    load_embedder_to_train,
)
from ssm_zoo.training.embedder_settings import parse_embedder_settings
from ssm_zoo.training.embedder_trainer import EmbedderTrainer, infonce, training_rows
from ssm_zoo.training.pairs import Pairs, read_pairs

DROPOUT = {"rank": 4, "dropout": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("embedder")
    for name in ("all-four", "mamba", "mamba2-encoder", "selective-mamba2"):
        save_model(made / name, name)
    write_pairs(made / "train.jsonl", 30)
    write_pairs(made / "heldout.jsonl", 12, first=7)
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run: adapters with dropout, two epochs with six batches each, of which the second one ends early."""
    finetune_embedder(parse_embedder_settings(embedder_values(folder, **DROPOUT)), folder / "run")
    return folder / "run"


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


# The loss


def embeddings(embedder: Any, texts: list[str], pooling: str) -> Tensor:
    """(texts, width) of the model alone, text by text."""
    rows = []
    for text in texts:
        ids = embedder.tokenizer(text, return_tensors="pt").input_ids
        states = embedder[0].model(input_ids=ids).last_hidden_state[0]
        rows.append(states[-1] if pooling == "last" else states.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"symmetric": True, "pooling": "mean"},
        {"negatives": ["negative"], "temperature": 0.5},
        {"mini_batch_size": 2, "negatives": ["negative"], "symmetric": True},
    ],
    ids=["default", "symmetric-mean", "negatives", "in-parts"],
)
def test_the_loss_and_its_gradient_are_infonce_written_out(folder: Path, changes: dict[str, Any]) -> None:
    settings = parse_embedder_settings(embedder_values(folder, method="full", **changes))
    pairs = read_pairs(settings.train, "train", negatives=settings.negatives)
    embedder = load_embedder_to_train(settings)
    columns = [texts[:5] for texts in pairs.columns.values()]
    loss = infonce(embedder, settings, 1)([embedder.preprocess(texts) for texts in columns], torch.empty(0))
    loss.backward()
    model: Any = backbone_of(embedder)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    anchors, *documents = (
        torch.nn.functional.normalize(embeddings(embedder, texts, settings.pooling), dim=1) for texts in columns
    )
    right = torch.arange(5)
    expected = torch.nn.functional.cross_entropy(anchors @ torch.cat(documents).T / settings.temperature, right)
    if settings.symmetric:
        back = torch.nn.functional.cross_entropy(documents[0] @ anchors.T / settings.temperature, right)
        expected = (expected + back) / 2
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-4)


def test_a_batch_never_holds_a_text_twice(folder: Path, tmp_path: Path) -> None:
    """Here three anchors share each positive: it would be its own negative."""
    rows = [{"anchor": f"a{index}", "positive": f"p{index // 3}"} for index in range(12)]
    settings = parse_embedder_settings(embedder_values(folder, batch_size=4, steps=5, rank=2))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs([str(tmp_path / "train.jsonl")], "train")
    embedder = load_embedder_to_train(settings)
    from sentence_transformers.sentence_transformer import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_drop_last=True,
        use_cpu=True,
        report_to=[],
    )
    loss = infonce(embedder, settings, 1)
    trainer = EmbedderTrainer(model=embedder, args=arguments, train_dataset=training_rows(pairs), loss=loss)
    batches = [batch["positive_input_ids"] for batch in trainer.get_train_dataloader()]
    assert len(batches) == 3
    assert all(len({tuple(row) for row in batch.tolist()}) == 4 for batch in batches)


# Training


def test_it_learns_and_is_measured_before_and_after(folder: Path, run: Path) -> None:
    report = read_report(run)
    before, after = report["evaluations"]
    assert after["ndcg@10"] > before["ndcg@10"] + 0.05
    assert report["history"][-1]["loss"] < 0.5 * report["history"][0]["loss"]
    assert [point["step"] for point in report["history"]] == list(range(1, 11))
    assert report["chance"]["pools"] == [{"size": 8, "accuracy": 1 / 8}]
    assert report["data"]["train"] == {
        "sources": ["train.jsonl"],
        "pairs": 30,
        "negatives": 0,
        "queries": 30,
        "documents": 30,
        "lengths": {"anchors": {"tokens": 4.0, "cut": 0.0}, "documents": {"tokens": 7.0, "cut": 0.0}},
    }
    assert report["coverage"]["dead"] == [] and json.loads((run / "coverage.json").read_text()) == report["coverage"]
    assert report["parameters"]["trained"] == report["coverage"]["trainable_parameters"]
    assert (report["embedding"]["size"], report["embedding"]["pooling"]) == (16, "last")
    assert report["seconds"] == report["history"][-1]["seconds"] > 0
    assert {"sentence-transformers", "peft", "torch"} <= report["versions"].keys()
    assert str(folder) not in json.dumps(report)


def killed_after(monkeypatch: pytest.MonkeyPatch, most: int) -> list[None]:
    """The Trainer's steps from now on; it is killed in the one after so many."""
    calls, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(None)
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", counting)
    return calls


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, run: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 10, after the checkpoint of step 8, which is in the middle of the second epoch."""
    if method == "lora":
        settings, expected = parse_embedder_settings(embedder_values(folder, **DROPOUT)), run
    else:
        values = embedder_values(folder, "mamba", method="full", weight_decay=0.1, mini_batch_size=2, symmetric=True)
        settings, expected = parse_embedder_settings(values), tmp_path / "whole"
        finetune_embedder(settings, expected)
    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        killed_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            finetune_embedder(settings, output)
    assert not (output / "report.json").exists()
    forwards = killed_after(monkeypatch, 1000)
    finetune_embedder(settings, output)
    assert len(forwards) == 10 - 8
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (output, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    reports = [read_report(path) for path in (output, expected)]
    for key in ("evaluations", "coverage", "steps", "data"):
        assert reports[0][key] == reports[1][key]
    curves = [[(point["step"], point["loss"], point["grad_norm"]) for point in r["history"]] for r in reports]
    assert curves[0] == curves[1]


def test_a_finished_run_is_not_trained_further(folder: Path, run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "model")
    report = finetune_embedder(parse_embedder_settings(embedder_values(folder, **DROPOUT)), again)
    before = read_report(run)
    assert (report["history"], report["evaluations"]) == (before["history"], before["evaluations"])
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (again, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_of_other_settings_or_pairs_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"temperature: 0.1 there, 0.2 here"):
        finetune_embedder(parse_embedder_settings(embedder_values(folder, **DROPOUT, temperature=0.2)), run)
    with pytest.raises(ValueError, match=r"data\.train: '\w+' there, '\w+' here"):
        columns = {"anchor": "positive", "positive": "anchor"}
        finetune_embedder(parse_embedder_settings(embedder_values(folder, **DROPOUT, **columns)), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("mamba2-encoder", {"method": "full", "pooling": "mean", "symmetric": True}),
        ("mamba", {"dora": True, "gradient_checkpointing": True, "query_prompt": "q ", "document_prompt": "d "}),
        ("all-four", {"dtype": "bfloat16", "schedule": "constant", "negatives": ["negative"], "max_tokens": 5}),
    ],
    ids=["bidirectional-mean", "dora-prompts-checkpointing", "bfloat16-negatives-cut"],
)
def test_other_ways_learn_too(folder: Path, tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    values = embedder_values(folder, model, steps=None, epochs=0.9, **changes)
    report = finetune_embedder(parse_embedder_settings(values), tmp_path / "run")
    assert report["steps"] == 6  # 5.4
    assert report["history"][-1]["loss"] < 0.8 * report["history"][0]["loss"]
    assert report["compute_dtype"] == changes.get("dtype", "float32")
    saved = json.loads((tmp_path / "run" / "model" / "config_sentence_transformers.json").read_text())
    assert saved["prompts"]["query"] == changes.get("query_prompt", "")
    if "max_tokens" in changes:
        assert report["data"]["train"]["lengths"]["documents"] == {"tokens": 5.5, "cut": 0.5}
        assert report["data"]["heldout"]["negatives"] == 1
    if "query_prompt" in changes:
        card = (tmp_path / "run" / "model" / "README.md").read_text()
        assert "`q` before queries and `d` before documents" in card


def test_the_auxiliary_loss_of_a_model_that_chooses_tokens_is_added(folder: Path, tmp_path: Path) -> None:
    """The first point of the curve is InfoNCE alone; the gradient has both."""
    base = make_model("selective-mamba2", sal_selection="gumbel")
    runs = {}
    for weight in (0.0, 3.0):
        path = tmp_path / f"model-{weight}"
        base.config.router_aux_loss_coef = weight
        base.save_pretrained(path)
        save_tokenizer(path)
        values = embedder_values(folder, method="full", steps=1, warmup=0.0) | {"model": str(path)}
        output = tmp_path / f"run-{weight}"
        runs[weight] = finetune_embedder(parse_embedder_settings(values), output)["history"][0]
    assert runs[3.0]["loss"] == pytest.approx(runs[0.0]["loss"], abs=1e-3)
    assert runs[3.0]["grad_norm"] != pytest.approx(runs[0.0]["grad_norm"], rel=1e-4)
    assert runs[3.0]["aux_loss"] > 0 and len(runs[3.0]["selection_rate"]) == 2
    values = embedder_values(folder, method="full", mini_batch_size=2) | {"model": str(tmp_path / "model-3.0")}
    with pytest.raises(
        ValueError, match=r"`mini_batch_size` must be left out for a model with selective attention, .*, got 2"
    ):
        finetune_embedder(parse_embedder_settings(values), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+. Lower learning_rate"):
        finetune_embedder(parse_embedder_settings(embedder_values(folder, learning_rate=1e30)), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


def test_what_is_finished_computes_what_the_adapters_do(folder: Path) -> None:
    settings = parse_embedder_settings(embedder_values(folder, rank=3))
    embedder = load_embedder_to_train(settings)
    plain = embedder.encode(["abc def"])
    adapt(embedder, settings)
    with torch.no_grad():
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    finished = finished_embedder(embedder, settings)
    assert type(backbone_of(finished)).__name__ == "ZooHybridModel"
    adapted = torch.from_numpy(embedder.encode(["abc def"]))
    torch.testing.assert_close(torch.from_numpy(finished.encode(["abc def"])), adapted, rtol=0, atol=1e-5)
    assert (adapted - torch.from_numpy(plain)).abs().max() > 0.1


def test_anchors_and_documents_that_repeat_are_counted_once() -> None:
    data = heldout_retrieval(Pairs(["a", "a", "b"], ["x", "y", "x"], [["z", "x", "w"]]))
    assert list(data.queries.values()) == ["a", "b"]
    assert list(data.documents.values()) == ["x", "y", "z", "w"]
    assert [sorted(data.documents[one] for one in found) for found in data.relevant.values()] == [["x", "y"], ["x"]]
    assert data.largest_pool == 3


# What is saved

LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

torch.set_num_threads(1)
texts = ["abc def", "a", "hij ghi f"]
embedder = SentenceTransformer("model", trust_remote_code=True, device="cpu")
model = AutoModel.from_pretrained("model", trust_remote_code=True)
assert all(type(one).__module__.startswith("transformers_modules") for one in (embedder[0].model, model))
inputs = AutoTokenizer.from_pretrained("model")(texts, return_tensors="pt", padding=True)
with torch.no_grad():
    states = model(**inputs).last_hidden_state
last = inputs.attention_mask.cumsum(1).argmax(1)
save_file({"embedder": embedder.encode(texts, convert_to_tensor=True), "model": states[torch.arange(3), last]}, "found")
"""


def test_what_is_saved_loads_without_the_package(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD], cwd=tmp_path, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(tmp_path / "found")
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(run / "model"), device="cpu").encode(
        ["abc def", "a", "hij ghi f"], convert_to_tensor=True
    )
    for tensor in found.values():
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
    assert expected.std(0).min() > 1e-2


def test_after_training_is_measured_on_what_is_saved(folder: Path, run: Path) -> None:
    from sentence_transformers import SentenceTransformer

    data = heldout_retrieval(read_pairs([str(folder / "heldout.jsonl")], "heldout"))
    scores = embedder_scores(SentenceTransformer(str(run / "model"), device="cpu"), data)(slice(0, 12))
    first = [
        list(data.documents)[place] in data.relevant[query]
        for query, place in zip(data.queries, scores.argmax(1).tolist(), strict=True)
    ]
    assert read_report(run)["evaluations"][1]["accuracy@1"] == pytest.approx(sum(first) / 12)


def test_the_card_says_what_was_done(folder: Path, run: Path) -> None:
    report = read_report(run)
    card = ModelCard.load(run / "model" / "README.md")
    before, after = (f"{evaluation['ndcg@10']:,.4f}" for evaluation in report["evaluations"])
    for part in (
        before,
        after,
        "`all-four`",
        "LoRA of rank 4",
        "merged into the weights",
        "30 pairs",
        "12 documents",
        "its last token's hidden state",
        "temperature 0.1",
        "| Right among 8 |",
        "SentenceTransformer(repo",
        report["versions"]["sentence-transformers"],
        "`in_proj`",
        "pool_size: 8",
    ):
        assert part in card.text, part
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert (run / "model" / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for path in (run / "model").rglob("*"):
        assert path.is_dir() or str(folder).encode() not in path.read_bytes(), path


# Mistakes


@pytest.fixture(scope="module")
def mistakes(folder: Path) -> Path:
    """A folder with files and models that are wrong, each in one way."""
    made = folder / "mistakes"
    made.mkdir()
    (made / "one.jsonl").write_text('{"anchor": "a", "positive": "b"}\n')
    (made / "same.jsonl").write_text("".join(f'{{"anchor": "a{index}", "positive": "b"}}\n' for index in range(6)))
    (made / "digits.jsonl").write_text(
        "".join(f'{{"anchor": "a{index}", "positive": "\u00e9"}}\n' for index in "bcdefg")
    )
    save_llama(made / "llama")
    save_model(made / "lacking", "mamba2")
    weights = load_file(made / "lacking" / "model.safetensors")
    del weights["backbone.norm_f.weight"]
    save_file(weights, made / "lacking" / "model.safetensors", metadata={"format": "pt"})
    save_model(made / "bounded", "mixer", max_position_embeddings=2)
    make_model("mamba2", vocab_size=5).save_pretrained(made / "small")
    save_tokenizer(made / "small")
    return made


MISTAKES = [
    pytest.param({"batch_size": 1}, "^`batch_size` must be at least 2, got 1: the other pairs", id="batch-of-one"),
    pytest.param(
        {"mini_batch_size": 5}, "^`mini_batch_size` must be less than `batch_size`, 5, got 5$", id="mini-batch"
    ),
    pytest.param(
        {"negatives": ["positive"]},
        r"^`negatives` must be distinct columns other than .*, got \['positive'\]$",
        id="columns",
    ),
    pytest.param({"temperature": 0.0}, "^`temperature` must be above 0, got 0.0$", id="temperature"),
    pytest.param({"pooling": "first"}, "^`pooling` must be 'last' or 'mean', got 'first'$", id="pooling"),
    pytest.param({"pool_size": 1}, "^`pool_size` must be at least 2, got 1$", id="pool"),
    pytest.param({"epochs": 1.0}, "^`steps` must be left out where `epochs` is given, got 10$", id="steps-and-epochs"),
    pytest.param({"method": "full", "rank": 4}, "^`rank` has no effect with method 'full', .*, got 4$", id="full-rank"),
    pytest.param({"text_field": "x"}, "^`text_field` is unknown", id="unknown"),
    pytest.param({"anchor": "query"}, "train.jsonl', line 1 has no column 'query'; it has 'anchor', 'pos", id="column"),
    pytest.param({"heldout": ["nope.csv"]}, "heldout: there is no file 'nope.csv'", id="no-file"),
    pytest.param({"batch_size": 31}, "`batch_size` must be at most 30 for 30 pairs in 1 processes, got 31", id="few"),
    pytest.param({"train": ["same.jsonl"]}, "`batch_size` must be smaller, got 5: the texts of `train`", id="repeated"),
    pytest.param({"heldout": ["one.jsonl"]}, "`heldout` must have, for every anchor, a text that", id="one-held-out"),
    pytest.param(
        {"heldout": ["digits.jsonl", "one.jsonl"]}, "heldout: .* has no token for the text 'é'", id="no-token"
    ),
    pytest.param(
        {"model": "llama"}, "`model` must be a model of the zoo, got .*llama of model_type 'llama'", id="llama"
    ),
    pytest.param({"model": "lacking"}, "model: lacking has 1 missing weights: norm_f.weight", id="weight-missing"),
    pytest.param({"model": "small"}, r"model: .* below the model's vocab_size, 5, got \d+", id="vocabulary"),
    pytest.param(
        {"model": "bounded"}, r"model: a text must have at most 2 tokens, .* Lower `max_tokens`", id="positions"
    ),
    pytest.param({"target_modules": ["nope"]}, "`target_modules` must be among down_proj, .*, got 'nope'", id="target"),
    pytest.param({"revision": "v1"}, "`revision` must be left out for the folder .*all-four, got 'v1'", id="revision"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    folder: Path, mistakes: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mistakes)
    with pytest.raises(ValueError, match=message):
        finetune_embedder(parse_embedder_settings(embedder_values(folder) | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_installed_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_zoo.evaluation.embedder.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="embedders need the package sentence-transformers, which is not installed"):
        finetune_embedder(parse_embedder_settings(embedder_values(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hard_negative_makes_batches_of_one_possible(folder: Path) -> None:
    values = embedder_values(folder, batch_size=1, negatives=["negative"])
    assert parse_embedder_settings(values).batch_size == 1


def test_the_curve_has_the_share_of_tokens_that_a_threshold_selects(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "selective-mamba2", sal_selection="capacity")
    values = embedder_values(folder, method="full", steps=1, warmup=0.0) | {"model": str(tmp_path / "base")}
    point = finetune_embedder(parse_embedder_settings(values), tmp_path / "run")["history"][0]
    assert len(point["selection_rate"]) == 2 and 0 < max(point["selection_rate"]) <= 1 and "aux_loss" not in point


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_has_the_threshold_of_a_gate_that_is_trained(folder: Path, tmp_path: Path, method: str) -> None:
    save_model(tmp_path / "base", "selective-mamba2", sal_selection="capacity")
    settings = parse_embedder_settings(embedder_values(folder, method=method) | {"model": str(tmp_path / "base")})

    def trainer() -> EmbedderTrainer:
        found = EmbedderTrainer.__new__(EmbedderTrainer)
        found.model = load_embedder_to_train(settings)
        if method == "lora":
            adapt(found.model, settings)
        return found

    saved, restored = trainer(), trainer()
    buffers = {name: buffer for name, buffer in saved.model.named_buffers() if ".mixer." in name}
    assert {name.rpartition(".")[2] for name in buffers} == {"threshold", "correction", "stride", "passes"}
    for number, buffer in enumerate(buffers.values(), start=1):
        buffer.fill_(number)
    saved._save(str(tmp_path))
    assert (buffers.keys() & load_file(tmp_path / "trained.safetensors").keys() == buffers.keys()) == (method == "full")
    restored._load_from_checkpoint(str(tmp_path))
    for name, buffer in buffers.items():
        assert torch.equal(restored.model.get_buffer(name), buffer) == (method == "full"), name
