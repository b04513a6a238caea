"""The folder of a run: which run owns it, and a lock so that one process at a time writes into it.

A run claims its folder with `run.json`, which describes what the run computes: the same run is resumed in it, any other
is refused. While it runs, its main process holds a lock on the folder, which the kernel releases when the process ends,
however it ends.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .json_files import json_text
from .whole_files import TEMPORARY, check_writable, repair, sweep, write_text_whole

try:
    import fcntl
except ImportError:  # Windows, where no folder is locked
    fcntl = None

__all__ = [
    "check_claim",
    "check_output_folder",
    "claim_output_folder",
    "claimed_folders_end",
    "read_json_or_none",
    "recorded_recipe",
    "write_json",
]

_FORMAT = 1
_MARKER = "run.json"
_ACCEPTED = "a new or empty folder, or this run's own"
# A run does not start with less: the report and the card, which are written last, need room as well.
_LEAST_FREE_BYTES = 32 * 2**20

# Handles on the folders that this process has claimed, by device and inode.
_locks: dict[tuple[int, int], int] = {}


def check_output_folder(path: str | Path, *, bytes_needed: int = 0) -> None:
    """Check, before anything is loaded or computed, that a run can write into a folder.

    Args:
        path: the folder; it and those above it may be missing.
        bytes_needed: minimum that the run is going to write.

    Raises:
        ValueError: if it is a file, holds something other than a run, is in use by another process, cannot be written
            to, or has no room.
    """
    path = Path(path)
    _check_is_folder(path)
    above = check_writable(path, (path, *path.absolute().parents), "output folder")
    free, needed = shutil.disk_usage(above).free, max(bytes_needed, _LEAST_FREE_BYTES)
    if free < needed:
        raise ValueError(
            f"output folder: {path} has {free / 2**20:,.0f} MiB of free disk space, but the run needs at least "
            f"{needed / 2**20:,.0f} MiB. Free some, or give a folder on another disk."
        )
    if path.is_dir():
        if not (path / _MARKER).is_file():
            _check_is_empty(path, "run")
        _unlock(_lock(path))


@contextmanager
def claimed_folders_end() -> Iterator[None]:
    """Release the locks of the folders that the body claims when it ends. Also decorates a function."""
    before = set(_locks)
    try:
        yield
    finally:
        for key in _locks.keys() - before:
            os.close(_locks.pop(key))


def _check_is_folder(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        what = "a link to nothing" if path.is_symlink() else "a file"
        raise ValueError(f"output folder: {path} must be {_ACCEPTED}, got {what}.")


def _check_is_empty(path: Path, kind: str) -> None:
    if any(not entry.name.startswith(TEMPORARY) for entry in path.iterdir()):
        raise ValueError(
            f"output folder: {path} must be {_ACCEPTED}, got one that is not empty and holds no {_MARKER} of a {kind}."
        )


def _lock(path: Path) -> tuple[int, int] | None:
    """Lock a folder for this process; return the key of the lock, or None if this process holds it already.

    Raises:
        ValueError: if another process holds it.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    status = os.fstat(handle)
    key = (status.st_dev, status.st_ino)
    if key in _locks:
        os.close(handle)
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"output folder: {path} is in use by another process, whose run has not ended. Wait for it, or give "
                "another folder."
            ) from None
        return None  # a file system without locks
    _locks[key] = handle
    return key


def _unlock(key: tuple[int, int] | None) -> None:
    if key is not None:
        os.close(_locks.pop(key))


def claim_output_folder(
    path: str | Path, recipe: Mapping[str, Any], kind: str = "ssm-zoo distillation run"
) -> dict[str, Any] | None:
    """Claim a folder as the output of a run, unless it belongs to this run already.

    Args:
        path: the folder; made if missing.
        recipe: what the run computes, as values that JSON can hold (`recipe.as_mapping`).
        kind: name of this kind of run, for the marker and for errors.

    Returns:
        None for a new folder. If the same run was started in the folder before, its marker: a dict with "kind",
        "format" and "recipe".

    Raises:
        ValueError: if the folder holds anything else, or a run of another recipe; the error then names the keys that
            differ. Nothing is written in either case.
    """
    path, marker = Path(path), _marker(recipe, kind)
    _check_is_folder(path)
    if path.is_dir():
        taken = _lock(path)
        try:
            found = _earlier_start(path, marker)
        except BaseException:
            _unlock(taken)
            raise
        if found is not None:
            _tidy(path)
            return found
    path.mkdir(parents=True, exist_ok=True)
    _lock(path)
    write_json(path / _MARKER, marker)
    return None


def check_claim(path: str | Path, recipe: Mapping[str, Any], kind: str = "ssm-zoo distillation run") -> None:
    """Check that :func:`claim_output_folder` would accept a folder, without claiming it; nothing is written.

    Raises:
        ValueError: as there.
    """
    path = Path(path)
    _check_is_folder(path)
    if path.is_dir():
        _earlier_start(path, _marker(recipe, kind))


def _marker(recipe: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the content of the marker of a run."""
    return {"kind": kind, "format": _FORMAT, "recipe": json.loads(json_text(dict(recipe), "recipe"))}


def _earlier_start(path: Path, marker: dict[str, Any]) -> dict[str, Any] | None:
    """Return the marker in a folder if it is that of the same run; None if the folder is empty."""
    kind = marker["kind"]
    if not (path / _MARKER).is_file():
        _check_is_empty(path, kind)
        return None
    found = read_json_or_none(path / _MARKER)
    if not isinstance(found, dict) or found.get("kind") != kind or found.get("format") != _FORMAT:
        raise ValueError(f"output folder: {path / _MARKER} is not the marker of a {kind} of format {_FORMAT}.")
    if found.get("recipe") != marker["recipe"]:
        differences = "; ".join(_differences(found.get("recipe"), marker["recipe"]))
        raise ValueError(
            f"output folder: {path} holds a run of another recipe ({differences}). Give another folder, or "
            "resume that run with its own recipe."
        )
    return found


def _tidy(path: Path) -> None:
    """Remove what a killed process left half-written, and restore what it was about to replace."""
    for folder in (path, path / "plots"):
        sweep(folder)
    for name in ("student", "model", "adapter"):
        repair(path / name)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, so that the file is at every moment the old one or the new one.

    Raises:
        ValueError: if JSON cannot hold the value, or something other than a regular file has the name; nothing is
            written then.
    """
    path = Path(path)
    write_text_whole(path, json_text(value, path.name) + "\n")


def recorded_recipe(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Return the recipe that the run in a folder recorded; empty if there is no run, or one of another kind."""
    marker = read_json_or_none(path / _MARKER)
    if not isinstance(marker, dict) or kind not in (None, marker.get("kind")):
        return {}
    recipe = marker.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def read_json_or_none(path: Path) -> Any:
    """Return the value in a JSON file of a run; None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _differences(there: Any, here: Any, key: str = "") -> list[str]:
    """Return a text for each place at which two JSON values differ, with its dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(index, there[index], here[index]) for index in range(len(here))]
    else:
        return [] if there == here else [f"{key}: {there!r} there, {here!r} here"]
    return [text for name, a, b in pairs for text in _differences(a, b, f"{key}.{name}" if key else str(name))]
