"""Streamed training text: mixtures, positions, and runs that are killed and go on to the same bits."""

import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pytest
import torch
from datasets import config
from families import make_model
from pyarrow import parquet
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer
from transformers import Trainer
from two_processes import launch

from ssm_zoo.training import stream
from ssm_zoo.training.adapters import load_tokenizer
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.language_model import finetune_language_model
from ssm_zoo.training.settings import LanguageModelSettings, parse_settings
from ssm_zoo.training.stream import TextStream
from ssm_zoo.training.texts import make_rows, read_texts_or_examples

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a few rows, so that a test sees several."""
    monkeypatch.setattr(stream, "WINDOW", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a source of each kind, told apart by the first letter of a document."""
    made = tmp_path_factory.mktemp("stream")
    make_model("mamba2").save_pretrained(made / "model")
    save_tokenizer(made / "model", "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{% endfor %}")
    texts = {letter: [f"{letter} {word} {word}" for word in WORDS[: 10 - n]] for n, letter in enumerate("abcd")}
    (made / "a.txt").write_text("\n\n".join(texts["a"]))
    (made / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["b"]))
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text, "id": 1} for text in texts["c"]]), made / "c.parquet")
    (made / "d").mkdir()
    (made / "d" / "train.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts["d"]))
    chat = [[{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} a"}] for word in WORDS]
    (made / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in chat))
    return made


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a cache of its own."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def values(folder: Path, *train: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "train": list(train),
        "heldout": [str(folder / "b.jsonl")],
        "separator": "\n\n",
        "row_tokens": 32,
        "steps": 8,
        **changes,
    }


def sources(folder: Path, *weights: str) -> list[str]:
    names = [str(folder / name) for name in ("a.txt", "b.jsonl", "c.parquet")] + [f"datasets:{folder / 'd'},train"]
    return [name + weight for name, weight in zip(names, weights or [""] * 4, strict=True)]


def made(settings: LanguageModelSettings) -> TextStream:
    tokenizer = load_tokenizer(settings)
    rows = make_rows(read_texts_or_examples(settings), settings, tokenizer, 61, progress=False)
    assert isinstance(rows.train, TextStream)
    return rows.train


def tokens(rows: Any, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row, _ in zip(rows, range(count), strict=False)]


@pytest.mark.parametrize("weights", [(), ("@4", "@3", "@.2", "@2.5")], ids=["one-after-the-other", "mixed"])
def test_from_every_position_the_rows_go_on_as_they_would_have(folder: Path, weights: tuple[str, ...]) -> None:
    settings = parse_settings(values(folder, *sources(folder, *weights), streaming=True, seed=3))
    whole = tokens(made(settings), 40)
    assert len({tuple(row) for row in whole}) > 10
    reader = made(settings)
    ahead = iter(reader)
    read = 0
    for row in (0, 1, 2, 3, 7, 8, 17, 30):
        while read < row + 2:  # what a loader has read ahead
            next(ahead)
            read += 1
        position = json.loads(json.dumps(reader.position(row)))
        other = made(settings)
        other.go_to(position)
        assert tokens(other, 40 - row) == whole[row:]
        later = iter(other)
        next(later)
        again = made(settings)
        again.go_to(other.position(row + 1))
        assert tokens(again, 4) == whole[row + 1 : row + 5]
    assert [row["input_ids"].tolist() for row in reader.first(5)] == whole[:5]


def test_weights_are_the_shares_of_the_documents(folder: Path) -> None:
    settings = parse_settings(values(folder, *sources(folder, "@4", "@3", "@1", "@2"), packing=False))
    tokenizer = load_tokenizer(settings)
    drawn = Counter(tokenizer.decode(row[:1]) for row in tokens(made(settings), 2000))
    assert {letter: round(count / 2000, 1) for letter, count in drawn.items()} == {
        "a": 0.4,
        "b": 0.3,
        "c": 0.1,
        "d": 0.2,
    }


def test_without_weights_every_document_comes_once_before_any_comes_again(folder: Path) -> None:
    settings = parse_settings(values(folder, *sources(folder), packing=False, streaming=True))
    found = Counter(map(tuple, tokens(made(settings), 3 * 34)))
    assert len(found) == 10 + 9 + 8 + 7
    assert set(found.values()) <= {2, 3, 4}  # a window of rows may lie over the end of a pass


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which depends on the generator, and killed between two checkpoints."""
    chosen: dict[str, Any] = {"train": sources(folder, "@4", "@3", "@1", "@2")}
    if kind == "messages":
        chosen = {"train": [str(folder / "chat.jsonl")], "heldout": [str(folder / "chat.jsonl")], "separator": None}
        chosen |= {"examples": "messages", "streaming": True}
    given = values(folder, dropout=0.2, rank=2, batch_size=2, gradient_accumulation=2, checkpoint_every=3)
    settings = parse_settings({**given, "learning_rate": 1e-2, **chosen})
    expected = finetune_language_model(settings, tmp_path / "whole")
    calls, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(calls) == 2 * 4:
            raise KeyboardInterrupt
        calls.append(None)
        return training_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counting)
        with pytest.raises(KeyboardInterrupt):
            finetune_language_model(settings, tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "checkpoints" / "checkpoint-3"
    assert json.loads((checkpoint / "stream.json").read_text())["row"] == 3 * 4
    report = finetune_language_model(settings, tmp_path / "killed")
    curves = [[(point["loss"], point["tokens"]) for point in each["history"]] for each in (report, expected)]
    assert curves[0] == curves[1]
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert report["data"]["train"]["documents"] is None
    assert "read as a stream while training" in (tmp_path / "killed" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_processes_share_a_stream(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one row each read what one process of two rows does, and save the same position."""
    monkeypatch.setattr(stream, "WINDOW", 64)
    mixture = sources(folder, "@4", "@3", "@1", "@2")
    changed = values(
        folder, *mixture, method="full", batch_size=2, checkpoint_every=3, learning_rate=1e-3, streaming=True
    )
    alone = finetune_language_model(parse_settings(changed), tmp_path / "alone")
    command = ["-m", "ssm_zoo.cli.main", "finetune", "lm", str(folder / "model"), str(tmp_path / "two")]
    command += [*(part for source in mixture for part in ("--train", source)), "--heldout", str(folder / "b.jsonl")]
    command += ["--separator", r"\n\n", "--row-tokens", "32", "--batch-size", "1", "--steps", "8", "--method", "full"]
    command += ["--checkpoint-every", "3", "--learning-rate", "1e-3", "--streaming"]
    launch(*command, HF_DATASETS_CACHE=str(tmp_path / "their-cache"))
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["processes"] == 2
    assert [p["tokens"] for p in report["history"]] == [p["tokens"] for p in alone["history"]]
    assert [p["loss"] for p in report["history"]] == pytest.approx([p["loss"] for p in alone["history"]], rel=1e-5)
    ours, theirs = (tmp_path / name / "checkpoints" / "checkpoint-6" / "stream.json" for name in ("two", "alone"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


@pytest.mark.parametrize(
    ("train", "changes", "message"),
    [
        (["a.txt@0.7", "b.jsonl"], {}, "^`train` must give a weight to every source or to none, got "),
        (["a.txt@0"], {}, "^`train` must give a weight above 0, got 'a.txt@0'$"),
        (["a.txt@1"], {"steps": None}, "^`steps` must be given for a streamed training text"),
        (
            ["odd@2"],
            {},
            "^`train` must be unambiguous, got 'odd@2', a file that reads as 'odd' with the weight 2",
        ),
    ],
)
def test_mixtures_that_are_unclear_are_refused(
    tmp_path: Path, train: list[str], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd@2").write_text("a")
    with pytest.raises(ValueError, match=message):
        parse_settings({**values(tmp_path, *train), **changes})


def test_what_a_stream_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    given = {"config": "mamba2-130m", "train": ["a.txt@1"], "heldout": ["b.txt"], "steps": 5, "train_tokenizer": 300}
    with pytest.raises(ValueError, match=r"^`train_tokenizer` cannot be used with a streamed training text"):
        parse_from_scratch(given)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    for name, message in (
        ("none.txt", "train: there is no file '.*none.txt'"),
        ("empty.txt", "train: '.*empty.txt' has no text"),
        ("bad.jsonl", r"train: '.*bad\.jsonl', line 1: `text` must be a text, got 1"),
    ):
        settings = parse_settings(values(folder, f"{tmp_path / name}@1", str(folder / "a.txt") + "@1"))
        with pytest.raises(ValueError, match=message):
            made(settings)


def test_a_run_on_text_is_recognised_by_what_earlier_versions_wrote(folder: Path) -> None:
    assert "streaming" not in parse_settings(values(folder, "a.txt")).identity
    assert parse_settings(values(folder, "a.txt", streaming=True)).identity["streaming"]
