"""Text files of the user, with errors that say what is wrong and where."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text_file(path: str | Path, field: str) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Args:
        path: the file.
        field: what to call the argument in an error.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    if not Path(path).is_file():
        raise ValueError(f"{field}: there is no file {str(path)!r}")
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
        ValueError: if a line is not JSON.
    """
    # Not splitlines(): JSON texts may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
        yield number, value
