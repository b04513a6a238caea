"""Text files of the user, with errors that say what is wrong and where."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .json_files import parse_json


def read_text_file(path: str | Path, field: str) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Args:
        path: the file.
        field: what to call the argument in an error.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    if not Path(path).is_file():
        kind = "is a folder, no file" if Path(path).is_dir() else "is no regular file"
        there = f"{str(path)!r} {kind}" if Path(path).exists() else f"there is no file {str(path)!r}"
        raise ValueError(f"{field}: {there}")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {str(path)!r} is not UTF-8 text (byte {error.start}: {error.reason})") from None


def read_json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, each with the number of its line from 1; empty lines are passed over.

    Args:
        text: the lines.
        name: what to call them in an error.

    Raises:
        ValueError: if a line is not strict JSON; see `json_files.parse_json`.
    """
    # Not splitlines(): JSON texts may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield number, parse_json(line, f"{name}, line {number}")


def check_text(text: str, field: str) -> None:
    """Raise a ValueError if a text holds what UTF-8 cannot, such as a byte that the shell gave undecoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} must be UTF-8 text, got {text[error.start]!r} at character {error.start}.") from None
