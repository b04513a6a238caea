"""The user's text files: plain text, JSON lines and front matter, with errors that say what is wrong and where."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .json_files import parse_json


def read_text_file(path: str | Path, field: str) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Args:
        path: the file.
        field: what to call the argument in an error.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    _check_file(path, field)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, field, error.start, error.reason) from None


def _check_file(path: str | Path, field: str) -> None:
    if not Path(path).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "is not a regular file"
        there = f"{str(path)!r} {kind}" if Path(path).exists() else f"there is no file {str(path)!r}"
        raise ValueError(f"{field}: {there}.")


def _not_utf8(path: str | Path, field: str, place: int, reason: str) -> ValueError:
    return ValueError(f"{field}: {str(path)!r} is not UTF-8 text (byte {place}: {reason}).")


def read_json_lines_of(path: str | Path, field: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a file of JSON lines with their line numbers, one line in memory at a time.

    Args:
        path: the file, in UTF-8; a byte order mark is skipped.
        field: what to call the argument in an error.

    Raises:
        ValueError: if there is no such file, it is not UTF-8, or a line is not strict JSON; see `parse_json`.
    """
    _check_file(path, field)
    position = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, field, position + error.start, error.reason) from None
            position += len(line)
            if text.strip():
                yield number, parse_json(text, f"{field}: {str(path)!r}, line {number}")


def check_text(text: str, field: str) -> None:
    """Raise a ValueError if a text cannot be encoded as UTF-8, e.g. a byte that the shell passed undecoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} must be UTF-8 text, got {text[error.start]!r} at character {error.start}.") from None


def front_matter(card: Path) -> dict[str, Any]:
    """Return the values between the two lines `---` at the beginning of a model card; empty if it has none.

    Raises:
        ValueError: if they are not a YAML mapping, or the card is not UTF-8.
        OSError: if it cannot be read.
    """
    lines = card.read_text(encoding="utf-8-sig").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"]
    if not ends:
        raise ValueError(f"{card}: the front matter must end with a line ---.")
    try:
        values = yaml.safe_load("\n".join(lines[1 : ends[0]]))
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: the front matter is not YAML: {' '.join(str(error).split())}.") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{card}: the front matter must be a mapping, got {type(values).__name__}.")
    return values or {}
