"""Pairs of texts from files: every format, and mistakes by file, line and column."""

import json
import re
from pathlib import Path

import pytest

from ssm_zoo.training.pairs import Pairs, read_pairs

ROWS = [("a", 'b "quoted"'), ("c, d", "e\u2028f"), ("a", "g")]


def written(folder: Path, name: str) -> str:
    """The rows in a file of a format, with another column and a byte order mark, and an empty line."""
    path = folder / name
    if path.suffix == ".jsonl":
        lines = [json.dumps({"id": 1, "anchor": a, "positive": p}, ensure_ascii=False) for a, p in ROWS]
        text = "\n\n".join(lines)
    elif path.suffix == ".csv":
        quoted = [[f'"{text.replace(chr(34), chr(34) * 2)}"' for text in row] for row in ROWS]
        text = "\n".join(["positive,id,anchor", *(f"{p},1,{a}" for a, p in quoted), ""])
    else:
        text = "\n".join(["anchor\tid\tpositive", *(f"{a}\t1\t{p}" for a, p in ROWS), ""])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.tsv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    pairs = read_pairs([written(tmp_path, name)] * 2, "train")
    assert list(zip(pairs.anchors, pairs.positives, strict=True)) == ROWS * 2
    assert pairs.negatives == []
    assert pairs.documents == [positive for _, positive in ROWS]


def test_a_csv_text_may_go_over_lines_and_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'anchor,positive\r\n"a\nb","c"\r\n')
    (tmp_path / "a.tsv").write_text('anchor\tpositive\n"a\t"c"\n')
    assert read_pairs([str(tmp_path / "a.csv")], "train").anchors == ["a\nb"]
    pairs = read_pairs([str(tmp_path / "a.tsv")], "train")
    assert (pairs.anchors, pairs.positives) == (['"a'], ['"c"'])


def test_columns_have_the_names_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("q\tyes\tno\tnever\nq1\ty1\tn1\tx1\nq2\ty2\ty1\tx2\n")
    pairs = read_pairs([str(tmp_path / "a.tsv")], "train", anchor="q", positive="yes", negatives=["never", "no"])
    assert pairs == Pairs(["q1", "q2"], ["y1", "y2"], [["x1", "x2"], ["n1", "y1"]])
    assert list(pairs.columns) == ["anchor", "positive", "negative_1", "negative_2"]
    assert pairs.documents == ["y1", "y2", "x1", "x2", "n1"]
    assert len(pairs) == 2


def test_a_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}).to_parquet(tmp_path / "train.parquet")
    source = f"datasets:{tmp_path},train"
    assert read_pairs([source], "train").positives == ["b"]
    with pytest.raises(ValueError, match="has no column 'negative'; it has 'anchor', 'positive'"):
        read_pairs([source], "train", negatives=["negative"])


def test_the_fingerprint_is_of_texts_and_places() -> None:
    prints = {
        Pairs(*columns).fingerprint()
        for columns in [(["ab"], ["c"], []), (["a"], ["bc"], []), (["c"], ["ab"], []), (["ab"], ["c"], [["d"]])]
    }
    assert len(prints) == 4
    assert Pairs(["ab"], ["c"], []).fingerprint() in prints


MISTAKES = [
    pytest.param("a.txt", "x", "`train` must be a .jsonl, .parquet, .csv or .tsv file, .*, got 'a.txt'", id="suffix"),
    pytest.param("datasets:x", None, "`train` must be 'datasets:PATH,SPLIT' .*, got 'datasets:x'", id="data-set"),
    pytest.param("missing.tsv", None, "train: there is no file 'missing.tsv'", id="missing"),
    pytest.param("a.jsonl", "{", r"train: 'a.jsonl', line 1 must be JSON: ", id="torn"),
    pytest.param("a.jsonl", "\n[1]", "train: 'a.jsonl', line 2 must be an object, got .1.", id="no-object"),
    pytest.param(
        "a.jsonl", '{"anchor": "x"}', "'a.jsonl', line 1 has no column 'positive'; it has 'anchor'$", id="lacks"
    ),
    pytest.param(
        "a.csv",
        "anchor,positive,positive\n1,2,3\n",
        "'a.csv' has 2 columns 'positive', of which only one can be meant",
        id="column-twice",
    ),
    pytest.param("a.tsv", "anchor\tx\n1\t2\n", "'a.tsv' has no column 'positive'; it has 'anchor', 'x'$", id="column"),
    pytest.param("a.tsv", "anchor\tpositive\na\n", "'a.tsv', line 2 must have 2 texts, got 1", id="cells"),
    pytest.param("a.csv", 'anchor,positive\na,"b', "'a.csv', line 2: unexpected end of data", id="open-quote"),
    pytest.param(
        "a.csv",
        "anchor,positive\na, \n",
        "'a.csv', line 2: `positive` must be a text that is not empty, got ' '",
        id="white",
    ),
    pytest.param(
        "a.tsv",
        "anchor\tpositive\n\tb\n",
        "'a.tsv', line 2: `anchor` must be a text that is not empty, got nothing",
        id="empty",
    ),
    pytest.param(
        "a.jsonl",
        '{"anchor": 3, "positive": "b"}',
        "line 1: `anchor` must be a text that is not empty, got 3",
        id="number",
    ),
    pytest.param("a.jsonl", '{"anchor": null, "positive": "b"}', "line 1: `anchor` must be .*, got nothing", id="null"),
    pytest.param("a.csv", "anchor,positive\n", "train: 'a.csv' has no pairs", id="header-alone"),
    pytest.param("a.csv", "", "train: 'a.csv' has no pairs", id="nothing"),
    pytest.param("a.csv", b"caf\xe9", r"train: 'a.csv' is not UTF-8 text \(byte 3", id="latin"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_a_mistake_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs([name], "train")
    assert re.fullmatch(r"[^\n]*", str(caught.value))
