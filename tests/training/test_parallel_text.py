"""Parallel text: every format gives the same pairs, and a mistake is one error with file and line."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ssm_zoo.harness.published import public_argument
from ssm_zoo.training.parallel_text import ParallelText, concatenated, read_parallel
from ssm_zoo.training.sources import public_sources

# With a character at which `str.splitlines` would split, a quote and a comma.
PAIRS = [("one\u2028a", 'eins "a"'), ("two, b", "zwei"), ("three", "drei\u00a0c")]
SOURCES, TARGETS = [list(side) for side in zip(*PAIRS, strict=True)]


def written(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def aligned(folder: Path, sources: str = "a\nb\n", targets: str = "c\nd\n") -> str:
    return f"{written(folder, 'text.en', sources)},{written(folder, 'text.de', targets)}"


FORMATS: dict[str, Callable[[Path], str]] = {
    "aligned": lambda folder: aligned(folder, "\n".join(SOURCES), "\ufeff" + "".join(f"{t}\r\n" for t in TARGETS)),
    "aligned.gz": lambda folder: ",".join(
        written(folder, f"{side}.gz", "\n".join(texts)) for side, texts in (("en", SOURCES), ("de", TARGETS))
    ),
    "tsv": lambda folder: written(folder, "p.tsv", "".join(f"{s}\t{t}\n" for s, t in PAIRS)),
    "tsv.gz": lambda folder: written(folder, "p.tsv.gz", "\n".join(f"{s}\t{t}" for s, t in PAIRS)),
    "jsonl": lambda folder: written(
        folder, "p.jsonl", "\n\n".join(json.dumps({"source": s, "target": t, "id": 1}) for s, t in PAIRS)
    ),
    "jsonl.gz": lambda folder: written(
        folder, "p.jsonl.gz", "\n".join(json.dumps({"source": s, "target": t}) for s, t in PAIRS)
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, kind: str) -> None:
    name = FORMATS[kind](tmp_path)
    assert read_parallel([name], "train") == ParallelText(SOURCES, TARGETS, [3])
    twice = read_parallel([name, name], "train", reverse=True)
    assert twice == ParallelText(TARGETS * 2, SOURCES * 2, [3, 3])


def test_columns_and_fields_have_the_names_that_are_given(tmp_path: Path) -> None:
    table = written(tmp_path, "verses.tsv", "Gen 1\tone\tuno\nGen 2\ttwo\tdos\n")
    found = read_parallel([table], "train", source_field="3", target_field="2")
    assert found == ParallelText(["uno", "dos"], ["one", "two"], [2])
    rows = written(tmp_path, "p.jsonl", '{"en": "a", "de": "b"}\n')
    assert read_parallel([rows], "train", source_field="en", target_field="de") == ParallelText(["a"], ["b"], [1])


MISTAKES: dict[str, tuple[Callable[[Path], str], str]] = {
    "lines": (lambda f: aligned(f, "a\nb\nc\n"), r"text.en' and '.*text.de' must have equally many lines, got 3 and 2"),
    "empty": (lambda f: aligned(f, "a\n \n"), r"text.en', line 2: the source must be a text that is not empty"),
    "empty-target": (lambda f: aligned(f, targets="\nd\n"), r"text.de', line 1: the target must be a text that is not"),
    "utf8": (lambda f: written(f, "a.tsv", b"a\tb\nc\t\xff\n"), r"a.tsv', line 2 is not UTF-8 text \(byte 2"),
    "no-tab": (lambda f: written(f, "a.tsv", "a\tb\nc d\n"), r"a.tsv', line 2 must have two texts with a tab .* got 1"),
    "tabs": (lambda f: written(f, "a.tsv", "a\tb\tc\n"), r"line 1 must have two .* got 3; choose two with `source_f"),
    "field": (lambda f: written(f, "a.jsonl", '{"source": "a"}'), r"a.jsonl', line 1: `target` is missing"),
    "number": (lambda f: written(f, "a.jsonl", '{"source": "a", "target": 1}'), r"line 1: `target` must be a text"),
    "list": (lambda f: written(f, "a.jsonl", '\n["a"]'), r"a.jsonl', line 2 must be an object"),
    "json": (lambda f: written(f, "a.jsonl", '{"source": "a", '), r"a.jsonl', line 1"),
    "gzip": (lambda f: written(f, "a.tsv", "not gzip") and _renamed(f), r"a.tsv.gz' cannot be read as gzip"),
    "nothing": (lambda f: written(f, "a.tsv", ""), r"a.tsv' has no pairs"),
    "missing": (lambda f: f"{f}/x.en,{f}/x.de", r"there is no file '.*x.en'"),
    "one-file": (lambda f: written(f, "a.txt", "x"), r"`train` must be SOURCE,TARGET"),
    "three-files": (lambda f: "a,b,c", r"`train` must be SOURCE,TARGET"),
}


def _renamed(folder: Path) -> str:
    return str((folder / "a.tsv").rename(folder / "a.tsv.gz"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_file_and_line(tmp_path: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        read_parallel([make(tmp_path)], "train")
    assert "\n" not in str(caught.value) and re.match("`?train", str(caught.value))


def test_a_field_without_effect_and_a_column_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`target_field` has no effect on .*got 'de'"):
        read_parallel([aligned(tmp_path)], "train", target_field="de")
    table = written(tmp_path, "a.tsv", "a\tb\n")
    with pytest.raises(ValueError, match=r"`source_field` must be the number of a column, from 1, .* got 'en'"):
        read_parallel([table], "train", source_field="en", target_field="2")
    with pytest.raises(ValueError, match=r"line 1 must have at least 3 columns, got 2"):
        read_parallel([table], "train", source_field="1", target_field="3")


def test_concatenations_hold_every_pair_once_and_never_cross_sources() -> None:
    pairs = ParallelText([f"s{i}" for i in range(40)], [f"t{i}" for i in range(40)], [33, 7])
    joined = concatenated(pairs, 5, seed=0)
    assert " ".join(joined.sources).split() == pairs.sources and " ".join(joined.targets).split() == pairs.targets
    sizes = [len(text.split()) for text in joined.sources]
    assert sizes == [len(text.split()) for text in joined.targets]
    assert set(sizes) == {1, 2, 3, 4, 5}
    first = joined.parts[0]
    assert sum(sizes[:first]) == 33 and sum(joined.parts) == len(joined)
    assert concatenated(pairs, 5, seed=0) == joined != concatenated(pairs, 5, seed=1)
    assert concatenated(pairs, 1, seed=0) == pairs


def test_folders_are_not_published() -> None:
    names = ["/srv/me/a.en,/srv/me/a.de", "data/a.tsv", "datasets:/srv/me/set,train", "a.en.gz,/srv/b.de.gz"]
    assert public_sources([*names, "/srv/me, her/a.txt"]) == [
        "a.en,a.de",
        "a.tsv",
        "datasets:set,train",
        "a.en.gz,b.de.gz",
        "a.txt",
    ]
    assert public_argument(names[0]) == "a.en,a.de"


def test_pairs_that_two_texts_share_are_counted() -> None:
    heldout = ParallelText(["a", "b", "c", "a"], ["x", "y", "z", "x"], [4])
    assert heldout.also_in(ParallelText(["c", "a", "b"], ["z", "x", "other"], [3])) == 3
