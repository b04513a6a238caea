"""The list of a checkpoint's files with their sizes and SHA-256, written last, to tell whether all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from .fingerprint import sha256_of
from .run_folder import read_json_or_none, write_json

__all__ = ["MANIFEST", "damage", "newest_whole", "write_manifest"]

MANIFEST = "manifest.json"
_FORMAT = 1

Found = TypeVar("Found")


def write_manifest(folder: Path) -> None:
    """List all files of a folder in its `manifest.json`."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": _FORMAT, "files": files})


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder, by the list that `write_manifest` made of it; None if it is whole."""
    manifest = read_json_or_none(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") == _FORMAT else None
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST} is missing or damaged"
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or {"size", "sha256"} - expected.keys():
            return f"{MANIFEST} is damaged at {name}"
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{MANIFEST} names {name}, which is outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {expected['size']:,}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def newest_whole(
    paths: Iterable[Path], read: Callable[[Path], Found | str], report: Callable[[str], object]
) -> Found | None:
    """Return the content of the first whole checkpoint; None if there are no checkpoints.

    Args:
        paths: checkpoints, the newest first.
        read: returns the content of a checkpoint, or a text that says what is wrong with it.
        report: is called with one line for each damaged checkpoint that is passed over for an older one.

    Raises:
        ValueError: if there are checkpoints and none is whole, since a run must not silently start from the beginning.
    """
    problems: list[tuple[Path, str]] = []
    for path in paths:
        found = read(path)
        if not isinstance(found, str):
            for damaged, problem in problems:
                report(f"{damaged} is damaged ({problem}) and is passed over for {path.name}")
            return found
        problems.append((path, found))
    if problems:
        texts = "; ".join(f"{path.name}: {problem}" for path, problem in problems)
        raise ValueError(
            f"{problems[0][0].parent}: no checkpoint is whole ({texts}). Restore one of them from a copy, or delete "
            "this folder to start again from the beginning."
        )
    return None
