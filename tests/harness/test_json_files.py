"""The strict JSON reader: what it accepts, and what it refuses by the name of the file."""

import json
import os
from pathlib import Path

import pytest

from ssm_zoo.harness.json_files import json_text, parse_json, read_json, read_json_object, typed

REFUSED = {
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "has the key 'b' twice"),
    "NaN": ('{"a": NaN}', "the number NaN"),
    "Infinity": ("[-Infinity]", "the number -Infinity"),
    "a number without end": ("[1e999]", "the number 1e999"),
    "an integer of 5000 digits": ("1" * 5000, "must be JSON"),
    "text after the end": ("{} {}", "must be JSON"),
    "half a pair": (r'{"a": ["\ud800"]}', "half of a surrogate pair"),
    "half a pair in a key": (r'{"\udc00": 1}', "half of a surrogate pair"),
    "nothing": ("", "must be JSON"),
    "101 levels": ("[" * 102 + "]" * 102, "more than 100 levels"),
    "100,000 levels": ('{"a":' * 100_000, "more than 100 levels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_text_that_is_not_strict_json_is_refused_by_name(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^file.json .*{message}"):
        parse_json(text, "file.json")


def test_strict_json_is_read_as_python_reads_it() -> None:
    text = json.dumps({"a": [1, 2.5, None, True, "\U0001f600", {"b": {}}], "é": -1e-300})
    assert parse_json(text, "x") == parse_json(text.encode(), "x") == json.loads(text)
    deep = "[" * 100 + "]" * 100
    assert parse_json(deep, "x") == json.loads(deep)


def test_infinity_is_read_only_where_it_is_allowed_and_nan_never() -> None:
    infinity = float("inf")
    assert parse_json("[Infinity, -Infinity, 1e999]", "x", allow_infinity=True) == [infinity, -infinity, infinity]
    with pytest.raises(ValueError, match="NaN"):
        parse_json("NaN", "x", allow_infinity=True)


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, message in ((b"\xef\xbb\xbf1", "byte order mark"), (b"\xff{}", "UTF-8"), (b"[1,2]", "at most 4")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(path, max_bytes=4)
    with pytest.raises(ValueError, match="got a folder"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="special file"):
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"a"', "true"])
def test_a_file_that_holds_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^a\.json must be an object, got "):
        read_json_object(tmp_path / "a.json", "a.json")


def test_a_field_of_another_kind_is_named() -> None:
    assert typed(3, float, "a.json", "x") == 3 and typed(True, bool, "a.json", "x") is True
    for value, kind in ((True, int), (True, float), ("3", int), (None, dict), (1.5, int)):
        with pytest.raises(ValueError, match=r"^a\.json: `x` must be "):
            typed(value, kind, "a.json", "x")


def test_only_json_is_written() -> None:
    assert json.loads(json_text({"a": [1.5, None]}, "x")) == {"a": [1.5, None]}
    for value in (float("inf"), {"a": float("nan")}, {1, 2}):
        with pytest.raises(ValueError, match=r"^report\.json cannot be written as JSON"):
            json_text(value, "report.json")
