"""Texts, tokens and the order of windows in distillation."""

import hashlib
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import Prepend, Replace, Sequence
from torch.utils.data import BatchSampler
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ssm_zoo.distill import data
from ssm_zoo.distill.data import TokenWindows, check_vocabulary, read_texts, repeat_a_passage, tokenize
from ssm_zoo.distill.distiller import StageWindows
from ssm_zoo.distill.inputs import describe_texts
from ssm_zoo.distill.recipe import DataSpec, StageSpec
from ssm_zoo.training.sources import heldout_in_training, note_heldout_in_training

# What seed 0 gives for ten windows in two epochs; a change would break every recorded run.
ORDER = [[1, 7, 0, 6, 2], [4, 5, 8, 9, 3], [7, 2, 5, 9, 4], [1, 6, 3, 8, 0]]
LINES = [
    "The model reads a line.\n",
    "\n",
    " = A heading = \n",
    " \n",
    "  indented by two\n",
    "Then,\tmore: text...\n",
]


def byte_level_tokenizer(eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    """GPT-2's kind: a run of white space is one token, without a last single space that goes to the next word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos] if eos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(LINES), "\n\n\nText\n \nline.\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": eos} if eos else {}))


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2's kind: whatever it is given starts with a mark, so that no text can be given in pieces."""
    pieces = [*sorted({character for line in LINES for character in line} - {" "}), "▁"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_reads_files_in_order_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffälpha\r\nbeta\rgamma\n".encode())
    (tmp_path / "b.txt").write_bytes(b"delta")
    paths = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert read_texts(paths, "train") == ["delta", "älpha\nbeta\ngamma\n"]
    assert read_texts(paths[0], "heldout") == ["delta"]


def test_rows_are_read_as_texts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two\\r\\n"}\n')
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "three", "id": 1}]), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n')
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.jsonl", "d.jsonl")]
    assert read_texts(paths[:2], "train") == ["one", "two\n", "three"]
    with pytest.raises(ValueError, match=r"data\.train: '.*c\.jsonl', line 1: `text` is missing; the row has 'body'"):
        read_texts(paths[2], "train")
    with pytest.raises(ValueError, match=r"data\.heldout: '.*d\.jsonl' has no text"):
        read_texts(paths[3], "heldout")
    with pytest.raises(ValueError, match=r"data\.train: there is no file '.*e\.parquet'"):
        read_texts(str(tmp_path / "e.parquet"), "train")


def test_builtin_text_has_two_parts() -> None:
    (train,) = read_texts("builtin:wikitext2", "train")
    (heldout,) = read_texts("builtin:wikitext2", "heldout")
    assert len(train) > 500_000 and len(heldout) > 50_000
    # Long lines of one are not in the other: nothing is evaluated that was trained on.
    seen = {line for line in train.splitlines() if len(line) > 80}
    assert not seen & {line for line in heldout.splitlines() if len(line) > 80}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "there is no file", id="missing"),
        pytest.param("folder", "is a folder, not a file", id="folder"),
        pytest.param(b"", "has no text", id="empty"),
        pytest.param(b" \n\t\n", "has no text", id="blank"),
        pytest.param("é".encode("latin-1"), r"is not UTF-8 text \(byte 0", id="latin-1"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=rf"data\.heldout: .*{message}"):
        read_texts(str(path), "heldout")


@pytest.mark.parametrize("name", ["builtin:wikitext3", "builtin:", "builtin:../wikitext2", "builtin:wikitext2/.."])
def test_an_unknown_builtin_text_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"`data\.train` must be builtin:wikitext2 or the path of a text file, got 'builtin:.*'"
    ):
        read_texts(name, "train")


def test_no_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`data\.train` must name one or more text files .*, got no source"):
        read_texts([], "train")


@pytest.mark.parametrize("seed", range(5))
def test_tokenising_in_pieces_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    text = "".join(LINES[i] for i in torch.randint(len(LINES), (400,), generator=generator))
    monkeypatch.setattr(data, "_PIECE_CHARACTERS", 300)
    pieces = list(data._pieces(text, tokenizer))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and max(map(len, pieces)) < 1000
    ids = tokenize([text], tokenizer, progress=False)
    assert ids.dtype == torch.long
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_marks_starts_gets_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = marking_tokenizer()
    text = "".join(LINES) * 20
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer(text[:24], add_special_tokens=False)["input_ids"]
    second = tokenizer(text[24:], add_special_tokens=False)["input_ids"]
    assert first + second != whole  # what the cuts of the other tokenizer would do here
    monkeypatch.setattr(data, "_PIECE_CHARACTERS", 300)
    assert tokenize([text], tokenizer, progress=False).tolist() == whole


def test_texts_are_parted_by_the_end_token_if_there_is_one() -> None:
    tokenizer = byte_level_tokenizer()
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one\n", "two"))
    assert tokenize(["one\n", "two"], tokenizer, progress=False).tolist() == [*a, tokenizer.eos_token_id, *b]
    plain = byte_level_tokenizer(eos=None)
    a, b = (plain(text, add_special_tokens=False)["input_ids"] for text in ("one\n", "two"))
    assert tokenize(["one\n", "two"], plain, progress=False).tolist() == a + b


def test_progress_shows_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    tokenize(["some text"], byte_level_tokenizer(), progress=False)
    assert capsys.readouterr().err == ""
    tokenize(["some text"], byte_level_tokenizer(), progress=True)
    assert "tokenising: 100%" in capsys.readouterr().err


def test_a_tokenizer_with_too_many_tokens_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size + 64))
    with pytest.raises(ValueError, match=rf"id {size - 1}, but the model's vocab_size is {size - 1} "):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=size - 1))
    tokenizer.add_tokens(["<added>"])
    with pytest.raises(ValueError, match=rf"'<added>' has id {size}, but the model's vocab_size is {size} "):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))


def test_windows_are_the_text_in_order() -> None:
    windows = TokenWindows(torch.arange(23, dtype=torch.int32))
    assert len(windows) == 23
    assert windows.count(5) == 4
    assert windows.windows(5).tolist() == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    assert windows.windows(5).dtype == torch.long
    assert windows.windows(23).tolist() == [list(range(23))]


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [
        pytest.param(12, 4, id="divides"),
        pytest.param(7, 3, id="straddles-epochs"),
        pytest.param(3, 8, id="epochs-in-a-batch"),
        pytest.param(1, 2, id="one-window"),
    ],
)
def test_each_epoch_reads_each_window_once(count: int, batch_size: int) -> None:
    windows = TokenWindows(torch.arange(count * 4 + 2))
    steps = 6 * count
    order = [row[0] // 4 for step in range(steps) for row in windows.batch(step, batch_size, 4, seed=1).tolist()]
    epochs = [order[start : start + count] for start in range(0, len(order), count)]
    whole = [epoch for epoch in epochs if len(epoch) == count]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in whole)
    if count >= 7:
        assert len({tuple(epoch) for epoch in whole}) > len(whole) // 2  # another order each time
        assert list(range(count)) not in whole[:2]


def test_a_batch_is_a_function_of_its_arguments() -> None:
    ids = torch.randint(0, 1000, (1000,), generator=torch.Generator().manual_seed(0))
    straight = TokenWindows(ids)
    batches = [straight.batch(step, 4, 16, seed=5) for step in range(40)]
    assert all(batch.shape == (4, 16) and batch.dtype == torch.long for batch in batches)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for step in reversed(range(40)):
        assert torch.equal(TokenWindows(ids).batch(step, 4, 16, seed=5), batches[step])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(straight.batch(0, 4, 16, seed=6), batches[0])
    # The order is one of windows, whatever the batch: two steps of two are one of four.
    assert torch.equal(torch.cat([straight.batch(step, 2, 16, seed=5) for step in (6, 7)]), batches[3])


def test_the_order_of_the_windows_stays_from_version_to_version() -> None:
    windows = TokenWindows(torch.arange(10))
    assert [windows.batch(step, 5, 1, seed=0)[:, 0].tolist() for step in range(4)] == ORDER


def test_ids_given_are_not_shared() -> None:
    ids = torch.arange(8, dtype=torch.int32)
    windows = TokenWindows(ids)
    ids.zero_()
    windows.batch(0, 2, 4, seed=0).zero_()
    windows.windows(4).zero_()
    assert windows.windows(8).tolist() == [list(range(8))]


def test_fingerprint_is_of_the_ids_alone() -> None:
    ids = [5, 0, 70000, 1]
    expected = hashlib.sha256(struct.pack("<4i", *ids)).hexdigest()
    assert TokenWindows(torch.tensor(ids)).fingerprint() == expected
    assert TokenWindows(torch.tensor(ids, dtype=torch.int32)).fingerprint() == expected
    strided = torch.tensor([[token, 9] for token in ids])[:, 0]
    assert TokenWindows(strided).fingerprint() == expected
    for other in ([5, 0, 70000], [5, 0, 1, 70000], [5, 0, 70000, 2]):
        assert TokenWindows(torch.tensor(other)).fingerprint() != expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param(torch.zeros(2, 3, dtype=torch.long), r"`ids` must be .*, got shape \(2, 3\)", id="two-axes"),
        pytest.param(torch.zeros(3), r"`ids` must be \(tokens,\) integers, got .* of torch.float32", id="floats"),
        pytest.param(torch.zeros(3, dtype=torch.bool), "of torch.bool", id="bools"),
        pytest.param(torch.tensor([1, -1]), "`ids` must be from 0 to 2\\^31 - 1, got -1 to 1", id="negative"),
        pytest.param(torch.tensor([2**31]), "got 2147483648", id="too-large"),
    ],
)
def test_what_are_no_ids_is_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWindows(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"sequence_length": 9},
            "the text has 8 tokens, fewer than one window of sequence_length = 9",
            id="text-too-short",
        ),
        pytest.param({"sequence_length": 0}, "`sequence_length` must be at least 1, got 0", id="no-length"),
        pytest.param({"step": -1}, "`step` must be at least 0, got -1", id="step"),
        pytest.param({"batch_size": 0}, "`batch_size` must be at least 1, got 0", id="batch-size"),
        pytest.param({"seed": -1}, "`seed` must be at least 0, got -1", id="seed"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    windows = TokenWindows(torch.arange(8))
    good = {"step": 0, "batch_size": 2, "sequence_length": 4, "seed": 0}
    windows.batch(**good)
    with pytest.raises(ValueError, match=message):
        windows.batch(**{**good, **arguments})


def test_no_text_is_too_short_for_any_window() -> None:
    windows = TokenWindows(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        windows.windows(2)


def test_processes_share_a_batch_of_a_stage() -> None:
    """As accelerate shares out what a Trainer reads: over the processes in order they are the whole batch."""
    windows = TokenWindows(torch.arange(60))
    stage = {"name": "a", "objective": "logit_distillation", "batch_size": 6, "sequence_length": 5, "tokens": 90}
    stages = [StageSpec(**stage, learning_rate=1.0), StageSpec(**{**stage, "name": "b"}, learning_rate=1.0)]
    rows = StageWindows(windows, stages, 1, seed=0)
    assert len(rows) == 18
    for world in (1, 2, 3, 6):
        sampler = BatchSampler(range(len(rows)), 6 // world, drop_last=False)
        shares = [list(BatchSamplerShard(sampler, world, rank)) for rank in range(world)]
        for step in range(3):
            read = [rows[item]["input_ids"] for share in shares for item in share[step]]
            # The stage before it has read three steps.
            assert torch.equal(torch.stack(read), windows.batch(3 + step, 6, 5, seed=0))


@pytest.mark.parametrize("length", [8, 9, 100, 2048])
def test_a_repeated_passage_stands_twice_and_the_rest_remains(length: int) -> None:
    window = torch.arange(length)
    places = set()
    for seed in range(200):
        found = repeat_a_passage(window, seed)
        place, tokens = int((found != window).nonzero()[0]), int((found != window).sum())
        start = int(found[place])
        assert max(length // 32, 1) <= tokens <= length // 8 and start + tokens <= place
        assert torch.equal(found[place : place + tokens], window[start : start + tokens])
        assert torch.equal(torch.cat([found[:place], window[place : place + tokens], found[place + tokens :]]), window)
        places.add((start, place))
    assert len(places) > min(length, 100) // 4  # drawn, not fixed
    assert torch.equal(window, torch.arange(length))
    assert torch.equal(repeat_a_passage(window, 3), repeat_a_passage(window, 3))


def test_a_window_without_room_for_a_repetition_remains() -> None:
    assert torch.equal(repeat_a_passage(torch.arange(7), 0), torch.arange(7))


def test_a_stage_repeats_passages_in_its_share_of_the_sequences() -> None:
    windows = TokenWindows(torch.arange(6400))
    common = {"name": "a", "objective": "logit_distillation", "batch_size": 2, "sequence_length": 64, "tokens": 6400}
    for share, expected in ((0.0, 0), (0.25, 25), (1.0, 100)):
        stage = StageSpec(**common, learning_rate=1.0, repeats=share)
        rows = StageWindows(windows, [stage], 0, seed=0)
        plain = StageWindows(windows, [StageSpec(**common, learning_rate=1.0)], 0, seed=0)
        changed = [not torch.equal(rows[item]["input_ids"], plain[item]["input_ids"]) for item in range(100)]
        assert sum(changed) == expected
        if expected == 25:  # spread evenly
            assert all(sum(changed[start : start + 4]) == 1 for start in range(0, 100, 4))


def test_training_text_is_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("a.txt", "b.txt", "other/a.txt"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    train = ["a.txt", "builtin:wikitext2", "datasets:x,train", "b.txt@0.5"]
    heldout = ["other/a.txt", "builtin:wikitext2", "datasets:x,test"]
    assert heldout_in_training(train, heldout) == []
    both = [str(tmp_path / "other" / ".." / "a.txt"), "datasets:x,train", "b.txt"]
    assert heldout_in_training(train, [*heldout, *both]) == both
    note_heldout_in_training(train, heldout, "heldout")
    assert capsys.readouterr().out == ""
    note_heldout_in_training(train, ["b.txt"], "heldout")
    assert capsys.readouterr().out == "heldout: b.txt is training text, too. Its loss says nothing about new text.\n"
    texts = DataSpec(train="a.txt", heldout=["b.txt", "a.txt"])
    found = describe_texts(texts, TokenWindows(torch.arange(5)), TokenWindows(torch.arange(3)))
    assert (found["train_tokens"], found["heldout_tokens"], found["heldout_in_training"]) == (5, 3, ["a.txt"])
