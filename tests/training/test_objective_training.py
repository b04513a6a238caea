"""A training on several objectives: its rows, what it reports, and that a killed run goes on to the same bits."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Trainer

from ssm_zoo.harness.settings import check
from ssm_zoo.modeling import ZooMamba2ForCausalLM
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.objective_rows import ObjectiveStream
from ssm_zoo.training.objective_settings import MIXES, ObjectiveMix
from ssm_zoo.training.objective_trainer import losses_by
from ssm_zoo.training.objectives import ObjectiveTokens
from ssm_zoo.training.packing import IGNORED, RowCollator

TOKENS = ObjectiveTokens(
    control={"infilling": 1, "autoencoding": 2, "copying": 3, "selective_copying": 4, "deshuffling": 5},
    sentinels=list(range(20, 40)),
    context=6,
    target=7,
    end=8,
    ordinary=list(range(50, 90)),
)
MIX: dict[str, Any] = {
    "objectives": [
        {"objective": "next_token", "rate": 1.0},
        {"objective": "prefix_lm", "rate": 1.0},
        {"objective": "infilling", "rate": 1.0},
        {"objective": "copying", "rate": 1.0},
    ],
    "sentinels": 20,
}
CONFIG = {"model_type": "zoo_mamba2", "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "state_size": 8}
STEPS, EVERY = 12, 2


def documents() -> list[Tensor]:
    """Texts of different lengths; every token tells its text and place."""
    return [1000 * (text + 1) + torch.arange(length) for text, length in enumerate((70, 1, 9, 130, 31))]


def stream(**changes: Any) -> ObjectiveStream:
    options = {"budget": 48, "step_rows": 3, "seed": 0, "prefixes": True, **changes}
    return ObjectiveStream(documents(), check(ObjectiveMix, MIX), TOKENS, **options)


# Rows


def test_rows_are_packed_samples_with_labels_on_their_targets() -> None:
    seen = set()
    for row in itertools.islice(stream(), 60):
        assert len(row["input_ids"]) <= 48
        assert torch.equal(row["seq_idx"].unique(), torch.arange(int(row["seq_idx"].max()) + 1, dtype=torch.int32))
        for sample in row["seq_idx"].unique():
            part = {key: value[row["seq_idx"] == sample] for key, value in row.items()}
            objective = int(part["objective"].unique())
            prefix = int(part["prefix_mask"].sum())
            seen.add(objective)
            assert torch.equal(part["position_ids"], torch.arange(len(part["labels"])))
            assert torch.equal(part["prefix_mask"], (part["position_ids"] < prefix).long())
            assert (prefix == 0) == (objective == 0)
            first = max(prefix, 1)
            assert (part["labels"][:first] == IGNORED).all()
            assert torch.equal(part["labels"][first:], part["input_ids"][first:])
    assert seen == {0, 1, 2, 3}
    assert "prefix_mask" not in stream(prefixes=False).first(1)[0]


def test_rates_are_the_shares_of_the_samples_and_those_of_their_step() -> None:
    rows = stream()
    rows.rates = lambda step: [1.0, 0.0, 0.0, 0.0] if step < 5 else [0.0, 0.0, 0.0, 1.0]
    found = [set(row["objective"].tolist()) for row in itertools.islice(rows, 30)]
    assert found == [{0}] * 15 + [{3}] * 15
    samples = [
        int(row["objective"][row["seq_idx"] == sample][0])
        for row in itertools.islice(stream(), 600)
        for sample in row["seq_idx"].unique()
    ]
    shares = torch.bincount(torch.tensor(samples)) / len(samples)
    assert (shares - 0.25).abs().max() < 0.05


def test_next_token_alone_reads_every_text_once_a_pass() -> None:
    rows = stream()
    rows.rates = lambda step: [1.0, 0.0, 0.0, 0.0]
    targets = [t for row in itertools.islice(rows, 60) for t in row["labels"].tolist() if t != IGNORED]
    whole = sorted(token for text in documents() for token in text[1:].tolist())
    assert sorted(targets[: len(whole)]) == whole == sorted(targets[len(whole) : 2 * len(whole)])
    assert targets[: len(whole)] != targets[len(whole) : 2 * len(whole)]


def birdie(texts: list[Tensor]) -> ObjectiveStream:
    """Return rows of 1,024 tokens of the objectives of Birdie, some of which need 16 or 32 tokens of a text."""
    tokens = ObjectiveTokens(**{**vars(TOKENS), "sentinels": list(range(100, 228)), "ordinary": list(range(300, 600))})
    return ObjectiveStream(
        texts, check(ObjectiveMix, MIXES["birdie"]), tokens, 1024, step_rows=4, seed=0, prefixes=True
    )


SHORT = [1000 + torch.arange(12)] * 400 + [1000 + torch.arange(60)] * 20
"""Texts of which most are too short for selective copying."""
KINDS = ("next_token", "selective_copying")


@pytest.mark.parametrize("texts", [SHORT, [1000 + torch.arange(40)] * 99, [1000 + torch.arange(2000)] * 9])
def test_rows_are_full_and_the_rates_their_shares_whatever_the_lengths_of_the_texts(texts: list[Tensor]) -> None:
    rows, rates = list(itertools.islice(birdie(texts), 160)), torch.tensor(check(ObjectiveMix, MIXES["birdie"]).rates)
    samples = torch.cat([row["objective"][row["position_ids"] == 0] for row in rows])
    count = len(samples)
    deviations = (count * rates * (1 - rates)).sqrt()
    assert ((torch.bincount(samples, minlength=len(rates)) - count * rates).abs() < 3.5 * deviations).all()
    assert sum(len(row["input_ids"]) for row in rows) > 0.98 * 160 * 1024


def test_texts_too_short_for_an_objective_wait_for_another_one() -> None:
    """With fewer texts than may wait, none is passed over: the beginning of each is read once in every pass."""
    texts = [1000 * (text + 1) + torch.arange(12 if text % 2 else 60) for text in range(60)]
    mix = check(ObjectiveMix, {"objectives": [{"objective": kind, "rate": 1.0} for kind in KINDS]})
    rows = ObjectiveStream(texts, mix, TOKENS, 256, step_rows=1, seed=0, prefixes=False)
    read = torch.zeros(61)
    for row in itertools.islice(rows, 200):
        for sample in row["seq_idx"].unique():
            ids = row["input_ids"][row["seq_idx"] == sample].unique()
            read[ids[(ids >= 1000) & (ids % 1000 == 0)] // 1000] += 1
    assert read[1:].min() > 4 and read[1:].max() - read[1:].min() <= 1


@pytest.mark.parametrize("row", [4, 40, 120])
def test_waiting_texts_and_a_drawn_objective_are_part_of_the_position(row: int) -> None:
    first, rest = birdie(SHORT), birdie(SHORT)
    expected = list(itertools.islice(first, row + 6))
    position = json.loads(json.dumps(first.position(row)))
    assert 0 < len(position["place"]["waiting"]) <= 256
    rest.go_to(position)
    for ours, theirs in zip(rest, expected[row:], strict=False):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_objective_without_room_is_the_first_of_the_next_row_and_step() -> None:
    """Rows of 48 tokens have room for one sample of at least 38 and for little more."""
    mix = check(ObjectiveMix, {"objectives": [{"objective": kind, "rate": 1.0} for kind in KINDS]})

    def made() -> ObjectiveStream:
        return ObjectiveStream([1000 + torch.arange(16)] * 9, mix, TOKENS, 48, step_rows=1, seed=0, prefixes=False)

    rows, again = made(), made()
    found = list(itertools.islice(rows, 400))
    positions = [rows.position(row) for row in range(400)]
    drawn = [position["place"]["drawn"] for position in positions]
    assert {None, 1} == set(drawn)
    assert all(row["objective"][0] == 1 for row, before in zip(found, drawn, strict=True) if before == 1)
    samples = torch.cat([row["objective"][row["position_ids"] == 0] for row in found])
    assert abs(float(samples.double().mean()) - 0.5) < 3 * 0.5 / len(samples) ** 0.5
    at = drawn.index(1)
    again.go_to(positions[at])
    assert torch.equal(next(iter(again))["input_ids"], found[at]["input_ids"])


def test_a_position_of_an_earlier_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output folder: its checkpoint is of an earlier version, which made other"):
        stream().go_to({"row": 3, "step": 1, "place": [0, 2, 5]})


@pytest.mark.parametrize("row", [0, 3, 6, 21])
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_from_every_step_the_rows_go_on_as_they_would_have(row: int, ahead: int) -> None:
    """Whether the loader has read nothing, one row or more than a step ahead; through JSON, as a checkpoint has it."""
    expected = list(itertools.islice(stream(), 40))
    first = stream()
    assert len(list(itertools.islice(first, row + ahead))) == row + ahead
    rest = stream()
    rest.go_to(json.loads(json.dumps(first.position(row))))
    for ours, theirs in zip(rest, expected[row:], strict=False):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_texts_that_are_too_short_are_an_error() -> None:
    mix = check(ObjectiveMix, {"objectives": [{"objective": "selective_copying", "rate": 1.0}]})
    for texts, budget, message in (
        (documents(), 37, "'selective_copying' needs rows of at least 38 tokens, got 37. Raise row_tokens"),
        (
            [torch.arange(15)],
            48,
            r"no text is long enough for 'selective_copying', which needs 16 tokens \(the longest",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ObjectiveStream(texts, mix, TOKENS, budget, step_rows=1, seed=0, prefixes=False)


def test_losses_by_objective_add_up_to_the_loss_of_the_batch() -> None:
    torch.manual_seed(0)
    batch = RowCollator()(stream().first(6))
    ids = batch["input_ids"] % 90
    labels = batch["labels"].where(batch["labels"] == IGNORED, ids)
    config = ZooMamba2ForCausalLM.config_class(**{k: v for k, v in CONFIG.items() if k != "model_type"}, vocab_size=90)
    model = ZooMamba2ForCausalLM(config).eval()
    with torch.no_grad():
        outputs = model(ids, labels=labels, seq_idx=batch["seq_idx"])
        sums, counts = losses_by(batch["objective"], outputs.logits, labels, 4)
    assert counts.sum() == (labels[:, 1:] != IGNORED).sum() and (counts > 0).sum() >= 3
    torch.testing.assert_close(sums.sum() / counts.sum(), outputs.loss.double(), rtol=1e-5, atol=1e-6)


# Training


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "to",
        "a",
        "sun",
        "with",
        "red",
        "hats",
        ".",
    ]
    for field, lines in (("train", 24), ("heldout", 6)):
        parts = [" ".join(words[(7 * n + 3 * k) % len(words)] for k in range(20 + n % 5)) for n in range(lines)]
        (folder / f"{field}.txt").write_text("\n\n".join(parts))
    return folder


def settings(texts: Path, **changes: Any) -> Any:
    given = {
        "config": CONFIG | {"prefix_bidirectional": True},
        "tokenizer": "bytes",
        "train": [str(texts / "train.txt")],
        "heldout": [str(texts / "heldout.txt")],
        "separator": "\n\n",
        "row_tokens": 96,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "steps": STEPS,
        "learning_rate": 2e-2,
        "checkpoint_every": 5,
        "objectives": MIX | {"bandit": {"every": EVERY, "warmup": 0.1}},
    }
    return parse_from_scratch(given | changes)


@pytest.fixture(scope="module")
def run(texts: Path) -> Path:
    train_from_scratch(settings(texts), texts / "whole", command="ssm-zoo train whole")
    return texts / "whole"


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_losses_and_rates_of_the_objectives_are_reported(run: Path) -> None:
    report = read_report(run)
    names = ["next_token", "prefix_lm", "infilling", "copying"]
    first, last = report["evaluations"][0]["objectives"], report["evaluations"][-1]["objectives"]
    assert list(first) == names == list(last)
    assert all(last[name] < first[name] - 0.5 for name in names)
    points = report["history"]
    rates = [[point[f"rate/{name}"] for name in names] for point in points]
    assert all(sum(each) == pytest.approx(1) for each in rates)
    # A decision after step 2 would apply to the rows of step 4; it has no two losses to compare yet and takes the mean
    # of the given and of equal rates, which are the same here. After step 4 losses have fallen.
    assert rates[:4] == [[pytest.approx(0.25)] * 4] * 4
    assert rates[4] != rates[3]
    assert len({tuple(each) for each in rates}) == 1 + sum(done >= 4 for done in range(EVERY, STEPS - 1, EVERY))
    seen = [name for name in names if any(f"loss/{name}" in point for point in points)]
    assert seen == names
    assert all(any(f"loss/{name}" in point for name in names) for point in points)
    assert (run / "plots" / "objectives.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "model" / "README.md").read_text()
    assert (
        "| Share of all samples |" in card
        and "| `copying` |" in card
        and "24 documents, of which samples were made while training" in card
    )
    assert (run / "model" / "plots" / "objectives.png").exists()


def test_the_model_has_the_tokens_of_the_objectives(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=False)
    config = json.loads((run / "model" / "config.json").read_text())
    ids = tokenizer("<|copying|>ab<|target|>")["input_ids"]
    assert len(ids) == 4 and config["prefix_bidirectional"]
    assert len(tokenizer) == 256 + 8 + 20 <= config["vocab_size"]
    model = ZooMamba2ForCausalLM.from_pretrained(run / "model").eval()
    prompt = torch.tensor([ids])
    out = model.generate(prompt, prefix_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


@pytest.mark.parametrize("done", [7])
def test_a_killed_run_goes_on_to_the_same_weights(
    run: Path, texts: Path, tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the checkpoint of step 5, within a period of the bandit, and right before that of step 10."""
    forwards, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(forwards) == 2 * done:
            raise KeyboardInterrupt
        forwards.append(None)
        return training_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counting)
        with pytest.raises(KeyboardInterrupt):
            train_from_scratch(settings(texts), tmp_path / "killed")
    assert not (tmp_path / "killed" / "report.json").exists()
    train_from_scratch(settings(texts), tmp_path / "killed")
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "killed", run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    reports = [read_report(path) for path in (tmp_path / "killed", run)]
    curves = [[{**point, "seconds": None} for point in report["history"]] for report in reports]
    assert curves[0] == curves[1] and reports[0]["evaluations"] == reports[1]["evaluations"]


def test_a_causal_model_reads_the_same_samples(
    run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fixed rates and without a bandit: inputs are simply causal. The report counts the samples of the rows."""
    rows, collate = [], RowCollator.__call__

    def record(self: RowCollator, batch: Any) -> Any:
        rows.extend(row for row in batch if "objective" in row)
        return collate(self, batch)

    monkeypatch.setattr(RowCollator, "__call__", record)
    report = train_from_scratch(settings(texts, config=CONFIG, objectives=MIX, steps=2), tmp_path / "run")
    whole = read_report(run)
    assert [point["tokens"] for point in report["history"]] == [p["tokens"] for p in whole["history"][:2]]
    assert report["history"][-1]["rate/copying"] == 0.25
    for number, point in enumerate(report["history"]):
        first = [row["objective"][row["position_ids"] == 0] for row in rows[4 * number : 4 * number + 4]]
        expected = torch.bincount(torch.cat(first), minlength=4).tolist()
        assert [point[f"samples/{name}"] for name in ("next_token", "prefix_lm", "infilling", "copying")] == expected
    assert report["settings"]["objectives"]["objectives"][3]["name"] == "copying"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": CONFIG | {"vocab_size": 264}}, "`vocab_size` must be at least 284, the number of entries"),
        ({"train": ["marked.txt"]}, r"train: document 1 has a special token of the objectives, such as <\|target\|>"),
        ({"heldout": ["short.txt"]}, "heldout: objectives: 'infilling' needs rows of at least 7 tokens, got 4"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    texts: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marked.txt").write_text("a text with <|copying|> in it")
    (tmp_path / "short.txt").write_text("a text")
    if "heldout" in changes:
        changes = {**changes, "row_tokens": 4}
    with pytest.raises(ValueError, match=message):
        train_from_scratch(settings(texts, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
