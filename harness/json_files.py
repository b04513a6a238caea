"""Strict reading and writing of JSON: duplicate keys and values that JSON does not have are errors naming the file."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["json_text", "parse_json", "read_json", "read_json_object", "typed"]

MAX_BYTES = 256 * 2**20
"""Largest size of a JSON file. The largest tokenizers and indices have a few tens of MB."""

MAX_DEPTH = 100
"""Deepest nesting accepted. Configurations nest less than ten levels; Python's own limit depends on its version."""

_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}
_MARK = b"\xef\xbb\xbf"


def read_json_object(
    path: str | Path, name: str | None = None, *, allow_infinity: bool = False, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a file that holds one JSON object. Arguments and errors are those of :func:`read_json`."""
    value = read_json(path, name, allow_infinity=allow_infinity, max_bytes=max_bytes)
    return typed(value, dict, name or str(path), "")


def read_json(
    path: str | Path, name: str | None = None, *, allow_infinity: bool = False, max_bytes: int = MAX_BYTES
) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        name: what errors call it; its path by default.
        allow_infinity: accept the constants `Infinity` and `-Infinity`, which Python writes and JSON does not have, as
            many published config.json files hold them. `NaN` is never accepted.
        max_bytes: largest size read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, is too large, or is not strict JSON (see :func:`parse_json`).
        OSError: if it cannot be read.
    """
    path, name = Path(path), name or str(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must be a JSON file, got a {'folder' if path.is_dir() else 'special file'}.")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{name} must be a JSON file of at most {max_bytes:,} bytes, got a larger one.")
    return parse_json(content, name, allow_infinity=allow_infinity)


def parse_json(text: str | bytes, name: str, *, allow_infinity: bool = False) -> Any:
    """Parse JSON text.

    Args:
        text: the text, or its UTF-8 bytes.
        name: what errors call it.
        allow_infinity: see :func:`read_json`.

    Raises:
        ValueError: if it is not UTF-8, begins with a byte order mark, is not JSON, has a key twice in one object,
            holds a number that is not finite, half of a surrogate pair, or is nested too deeply.
    """
    if isinstance(text, bytes):
        if text.startswith(_MARK):
            raise ValueError(f"{name} begins with a byte order mark. Save it as UTF-8 without one.")
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} must be UTF-8 text, got {error.reason} at byte {error.start}.") from None

    def constant(word: str) -> float:
        if allow_infinity and word != "NaN":
            return float(word)
        raise _RefusedError(f"{name} holds the number {word}, which JSON does not have.")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not allow_infinity:
            raise _RefusedError(f"{name} holds the number {digits[:40]}, which is too large.")
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise _RefusedError(f"{name} has the key {twice!r} twice in one object. Remove one of the two.")
        return found

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"{name} must be JSON: {error}.") from None
    except RecursionError:
        _too_deep(name)
    _check_values(value, name)
    return value


def typed(value: Any, kind: type, name: str, field: str) -> Any:
    """Return a value read from JSON if it is of the given kind, otherwise raise an error that names the field.

    Args:
        value: the value that was read.
        kind: dict, list, str, bool, int or float. An integer is a number too, `true` is neither.
        name: name of the file.
        field: name of the field; empty for the whole file.

    Raises:
        ValueError: if the value is of another kind.
    """
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
        return value
    subject = f"{name}: `{field}`" if field else name
    got = next((text for each, text in _NAMES.items() if isinstance(value, each)), "null")
    shown = "" if value is None or isinstance(value, (dict, list)) else f" ({_short(value)})"
    raise ValueError(f"{subject} must be {_NAMES[kind]}, got {got}{shown}.")


def json_text(value: Any, name: str, *, indent: int | None = 2, sort_keys: bool = False) -> str:
    """Return a value as JSON text that every JSON parser accepts; the counterpart of :func:`parse_json`.

    Raises:
        ValueError: if the value contains NaN, an infinity, or an object of a type that JSON does not have.
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}.") from None


class _RefusedError(Exception):
    """JSON that Python's `json` accepts and :func:`parse_json` refuses."""


def _check_values(value: Any, name: str) -> None:
    """Check the depth and the strings of a value, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            _too_deep(name)
        below = []
        for each in level:
            texts = [each] if isinstance(each, str) else each if isinstance(each, dict) else ()
            for text in texts:
                if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise ValueError(f"{name} holds half of a surrogate pair in the string {_short(text)}.")
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        level, depth = below, depth + 1


def _too_deep(name: str) -> NoReturn:
    raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep.") from None


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
