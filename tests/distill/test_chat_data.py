"""Distillation on conversations and completions: which tokens are learnt, the loss by hand, runs, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_llama, save_tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer

from ssm_zoo.distill.data import TokenWindows, read_conversations, repeat_a_passage, token_windows
from ssm_zoo.distill.distiller import StageWindows
from ssm_zoo.distill.logit_losses import chunked_logit_loss, logit_loss
from ssm_zoo.distill.recipe import as_mapping, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.stages import StageSpec

TEMPLATE = (
    "{% for message in messages %}{{ 'q ' if message.role == 'user' else 'a ' }}{{ message.content }}. {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


ROWS = [{"messages": turns("hi", "ho", "you", "me and all")}, {"messages": turns("name", "none")}] * 6


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher", TEMPLATE)
    monkeypatch.chdir(tmp_path)


def write(rows: list[Any], name: str = "chat.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return name


def recipe(stage: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    basis = {"name": "a", "objective": "logit_distillation", "tokens": 64, "batch_size": 2, "learning_rate": 1e-3}
    return {
        "teacher": "teacher",
        "student": {"layers": "all", "half_life": [1, 8]},
        "data": {"train": "chat.jsonl", "heldout": "chat.jsonl", "sequence_length": 16, "examples": "messages", **data},
        "stages": [{**basis, **(stage or {})}],
        "evaluation": {"tokens": 32, "prompts": [], "final": False},
    }


def read(kind: str, rows: list[Any]) -> tuple[Any, TokenWindows]:
    tokenizer = AutoTokenizer.from_pretrained("teacher", trust_remote_code=False)
    return tokenizer, token_windows(read_conversations(write(rows), "train", kind), tokenizer, progress=False)


def learnt_text(tokenizer: Any, windows: TokenWindows) -> tuple[str, str]:
    """The whole text, and that of the learnt tokens."""
    whole = len(windows)
    ids, learnt = windows.window(0, whole, 0), windows.learnt(0, whole, 0)
    assert learnt is not None
    assert windows.learnt_share == pytest.approx(float(learnt.double().mean()))
    return tokenizer.decode(ids), tokenizer.decode(ids[learnt])


def test_answers_of_conversations_are_learnt() -> None:
    whole, learnt = learnt_text(*read("messages", ROWS[:2]))
    assert whole.replace(" ", "") == "qhi.aho.qyou.ameandall.qname.anone."
    assert learnt.replace(" ", "") == "ho.meandall.none."


def test_completions_are_learnt_and_no_first_token() -> None:
    rows = [{"prompt": "one ", "completion": "two"}, {"prompt": "", "completion": "four"}]
    _, learnt = learnt_text(*read("prompt_completion", rows))
    # The first letter of the second row does not follow from the first row.
    assert learnt.replace(" ", "") == "two</s>our</s>"


def test_the_loss_is_that_of_the_positions_before_learnt_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(2, 6, 8, generator=generator).requires_grad_() for _ in range(2))
    head, teacher_head = nn.Linear(8, 11, bias=False), nn.Linear(8, 11, bias=False).requires_grad_(False)
    ids = torch.randint(11, (2, 6), generator=generator)
    learnt = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    loss = chunked_logit_loss(
        hidden, head, theirs.detach(), teacher_head, ids, learnt=learnt, learnt_share=0.25, ce_weight=0.4
    )
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    places = [(0, 1), (0, 2), (1, 4)]  # each before a learnt token; the first token of a row is not predicted
    mine, target = (torch.stack([part[place] for place in places]) for part in (hidden, theirs))
    words = torch.stack([ids[row, place + 1] for row, place in places])
    expected = logit_loss(head(mine), teacher_head(target), words, ce_weight=0.4) / (12 * 0.25)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_a_batch_without_answers_has_a_loss_of_zero() -> None:
    hidden, head = torch.randn(1, 4, 8, requires_grad=True), nn.Linear(8, 11, bias=False)
    teacher_head = nn.Linear(8, 11, bias=False).requires_grad_(False)
    none = torch.zeros(1, 4, dtype=torch.bool)
    ids = torch.zeros(1, 4, dtype=torch.long)
    loss = chunked_logit_loss(hidden, head, hidden.detach(), teacher_head, ids, learnt=none, learnt_share=0.5)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_a_repeated_passage_is_learnt_where_it_was() -> None:
    ids, learnt = torch.arange(64), torch.arange(64) % 3 == 0
    windows = TokenWindows(ids, learnt)
    values = {"name": "a", "objective": "logit_distillation", "tokens": 64, "batch_size": 1, "sequence_length": 64}
    stage = StageSpec(**values, learning_rate=1.0, repeats=1.0)
    row = StageWindows(windows, [stage], 0, 0)[0]
    assert not torch.equal(row["input_ids"], ids)
    assert torch.equal(row["learnt"], row["input_ids"] % 3 == 0)
    assert torch.equal(repeat_a_passage(learnt, 5), repeat_a_passage(ids, 5) % 3 == 0)
    aligned = StageSpec(**{**values, "objective": "hidden_state_alignment"}, learning_rate=1.0)
    assert StageWindows(windows, [aligned], 0, 0)[0].keys() == {"input_ids"}


def test_the_choice_of_learnt_tokens_is_part_of_the_data() -> None:
    ids = torch.arange(8)
    prints = {TokenWindows(ids).fingerprint()}
    prints |= {TokenWindows(ids, ids > bound).fingerprint() for bound in (2, 5)}
    assert len(prints) == 3


def test_a_run_learns_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    write(ROWS)
    rows: list[int] = []
    inner = nn.Linear.forward

    def counting(self: nn.Linear, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and hidden.dim() == 2:  # the student's head on chosen rows
            rows.append(len(hidden))
        return inner(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    report = distill(parse_recipe(recipe()), "run")
    assert report["recipe"]["data"]["examples"] == "messages"
    assert len(rows) == 2 and all(0 < count < 32 for count in rows)
    assert all(point["loss"] > 0 for point in report["stages"][0]["history"])


def test_text_is_as_it_was_before_there_were_examples() -> None:
    parsed = parse_recipe(recipe(examples="text"))
    assert parsed.data.examples == "text" and "examples" not in as_mapping(parsed)["data"]


@pytest.mark.parametrize(
    ("examples", "row", "message"),
    [
        pytest.param("messages", {"text": "a"}, "`messages` is missing", id="another field"),
        pytest.param("messages", {"messages": []}, "must be a non-empty list", id="no message"),
        pytest.param("messages", {"messages": [{"role": "user"}]}, "`messages.0.content` is missing", id="no content"),
        pytest.param("messages", {"messages": turns("a")}, "must have a message of the role", id="no answer"),
        pytest.param("prompt_completion", {"prompt": "a"}, "`completion` is missing", id="no completion"),
        pytest.param("prompt_completion", {"prompt": "a", "completion": ""}, "must not be empty", id="empty"),
        pytest.param("messages", [1], "must be an object", id="no object"),
        pytest.param("messages", {"messages": turns("a", "")}, "must not be empty in an answer", id="empty answer"),
        pytest.param(
            "messages",
            {"messages": [{"role": "human", "content": "a"}, *turns("a", "b")]},
            "`messages.0.role` must be 'system'",
            id="another role",
        ),
        pytest.param(
            "prompt_completion",
            {"prompt": turns("a"), "completion": turns("b")},
            "must have a message of the role 'assistant'",
            id="a question as completion",
        ),
    ],
)
def test_malformed_rows_are_one_error_and_nothing_is_written(examples: str, row: Any, message: str) -> None:
    good = ROWS[0] if examples == "messages" else {"prompt": "a ", "completion": "b"}
    write([good, row])
    with pytest.raises(ValueError, match=r"data\.train: 'chat\.jsonl', line 2") as caught:
        distill(parse_recipe(recipe(examples=examples)), "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_texts_and_tokenizers_without_a_template_are_refused() -> None:
    Path("text.txt").write_text("a text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`data\.train` must be a \.jsonl or \.parquet file"):
        distill(parse_recipe(recipe(train="text.txt")), "run")
    write(ROWS)
    save_tokenizer(Path("teacher"))
    Path("teacher", "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"^teacher: the tokenizer has no chat template, which .* needs"):
        distill(parse_recipe(recipe()), "run")
    assert not Path("run").exists()
