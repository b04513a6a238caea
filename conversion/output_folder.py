"""The folder of a run: whose it is; files and folders that are never seen half-written.

A run's folder is claimed by `run.json`, which holds what the run computes, so that the same run goes on in it and
another one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""How the names of files begin that are being written."""

_FORMAT = 1
_MARKER = "run.json"


def claim_output_folder(
    path: str | Path, recipe: Mapping[str, Any], kind: str = "ssm-zoo distillation run"
) -> dict[str, Any] | None:
    """Make a folder the output of a run, or find that it is this run's already.

    Args:
        path: the folder; made if missing.
        recipe: what the run computes, of the kinds that JSON knows (`recipe.as_mapping`).
        kind: what sort of run this is.

    Returns:
        None for a new folder; for the folder of an earlier start of the same run its marker, a dict with "kind",
        "format" and "recipe".

    Raises:
        ValueError: if the folder holds anything else, or a run of another recipe (then naming the keys that
            differ); nothing is written then.
    """
    path = Path(path)
    marker = {"kind": kind, "format": _FORMAT, "recipe": json.loads(json_text(recipe, "recipe"))}
    if path.exists() and not path.is_dir():
        raise ValueError(f"output folder: {path} is a file; accepted: a new or empty folder, or this run's own")
    if (path / _MARKER).is_file():
        found = read_json(path / _MARKER)
        if not isinstance(found, dict) or found.get("kind") != kind or found.get("format") != _FORMAT:
            raise ValueError(f"output folder: {path / _MARKER} is not the marker of a {kind} of format {_FORMAT}")
        if found.get("recipe") != marker["recipe"]:
            differences = "; ".join(_differences(found.get("recipe"), marker["recipe"]))
            raise ValueError(
                f"output folder: {path} holds a run of another recipe ({differences}); give another folder, or "
                "resume that run with its own recipe"
            )
        return found
    if path.is_dir() and any(not entry.name.startswith(TEMPORARY) for entry in path.iterdir()):
        raise ValueError(
            f"output folder: {path} is not empty and holds no {_MARKER} of a {kind}; accepted: a new or empty "
            "folder, or this run's own"
        )
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / _MARKER, marker)
    return None


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON so that the file is, at every moment, the old one or the new one.

    Raises:
        ValueError: if JSON does not know a kind of value in it; nothing is written then.
    """
    path = Path(path)
    text = json_text(value, path.name, indent=2) + "\n"
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then give it its own."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, anywhere, which takes its place and name when it is whole; nothing is left of a failure.

    Args:
        folder: where it goes; there may be an empty folder. Parents are made as needed.
        overwrite: take the place of a folder that is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        # One level down, because the scratch folder itself is readable by its owner only.
        made, replaced = Path(scratch) / folder.name, Path(scratch) / "replaced"
        made.mkdir()
        yield made
        if folder.exists() and overwrite:
            os.replace(folder, replaced)
        elif folder.exists():
            folder.rmdir()  # empty, as it was at the start; a folder that is not stays and is an error
        try:
            os.replace(made, folder)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, folder)
            raise


@contextmanager
def result_folder(folder: Path) -> Iterator[Path]:
    """As :func:`new_folder`, in a run's own folder: it takes the place of an earlier result, and what a killed run left
    under the temporary name goes when the next one comes here."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def json_text(value: Any, field: str, indent: int | None = None) -> str:
    """The value as JSON text.

    Raises:
        ValueError: if JSON does not know a kind of value in it, or has no word for a number that is not finite.
    """
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        accepted = "numbers, texts, true, false, none, and lists and dicts of them"
        raise ValueError(f"{field}: {error}; accepted: {accepted}") from None


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder for this, and writes its list of names through by itself
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(there: Any, here: Any, key: str = "") -> list[str]:
    """One text per place in which two JSON values differ, with its dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(index, there[index], here[index]) for index in range(len(here))]
    else:
        return [] if there == here else [f"{key}: {there!r} there, {here!r} here"]
    return [text for name, a, b in pairs for text in _differences(a, b, f"{key}.{name}" if key else str(name))]
