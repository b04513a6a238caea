"""Files and folders that appear whole: they are written under a temporary name in the same folder, then renamed.

A temporary name is random, so that nobody can plant a link under it. The process that writes holds a lock on the file
or folder, which the kernel releases when the process ends, however it ends. A temporary name without a lock was left by
a process that was killed; it is removed when the next process writes into the same folder.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked and nothing is swept
    fcntl = None

TEMPORARY = ".tmp-"
"""Prefix of the names of files and folders that are being written."""

_OURS = f"{TEMPORARY}ssm-zoo-"
# Prefix of a folder that is being replaced, on file systems that cannot exchange two folders in one step.
_REPLACED = ".ssm-zoo-replaced-"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then rename it; a replaced file passes its permissions on.

    If several processes write into the same folder, `write` has to write into the file that is there, which is locked,
    and not to replace it.

    Raises:
        ValueError: if something other than a regular file has the name.
    """
    mode = _replaceable_mode(path)
    sweep(path.parent)
    temporary, lock = _new_file(path.parent)
    try:
        write(temporary)
        if mode is not None:
            os.chmod(temporary, mode)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
    flush(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as :func:`write_whole` does."""
    content = text.encode("utf-8")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def check_output_file(path: Path, field: str) -> None:
    """Check, before anything is computed, that :func:`write_whole` can write a file.

    Args:
        path: the file; it and the folders above it may be missing.
        field: what to call it in an error.

    Raises:
        ValueError: if something other than a regular file has the name, or its folder cannot be made or written to.
    """
    try:
        _replaceable_mode(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{field}: {error}") from None
    check_writable(path, path.absolute().parents, field)


def check_writable(path: Path, places: Iterable[Path], field: str) -> Path:
    """Return the first of `places` that exists, after checking that it is a folder that can be written to.

    Args:
        path: what is going to be written.
        places: the folders above it, from the innermost on.
        field: what to call it in an error.

    Raises:
        ValueError: if the place is no folder, or this process may not write into it.
    """
    above = next(place for place in places if os.path.lexists(place))
    if not above.is_dir():
        raise ValueError(f"{field}: {path} cannot be made, because {above} is no folder. Give another path.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{field}: {path} cannot be written: no permission to write in {above}.")
    return above


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when the body has ended; nothing is left of a failure.

    Args:
        folder: the name, which an empty folder may have. Parents are made as needed.
        overwrite: replace a folder that is not empty, in one step if the file system can.

    Raises:
        ValueError: if the name is that of a link, or something else has taken it in the meantime.
    """
    if folder.is_symlink():
        raise ValueError(f"folder: {folder} must be a new or empty folder, got a link. Give the folder it points to.")
    with _parents_of(folder):
        sweep(folder.parent)
        repair(folder)
        scratch, lock = _new_scratch(folder.parent)
        try:
            # One level down, because the scratch folder itself is readable by its owner only.
            made = scratch / folder.name
            made.mkdir()
            yield made
            _place(made, folder, overwrite)
        finally:
            _delete(scratch)
            if lock is not None:
                os.close(lock)
    flush(folder.parent)


def repair(folder: Path) -> None:
    """Restore a folder whose replacement was killed between its two renames, or remove the replaced one."""
    replaced = folder.with_name(f"{_REPLACED}{folder.name}")
    if not replaced.is_dir() or replaced.is_symlink():
        return
    if os.path.lexists(folder):
        _delete(replaced)
    else:
        os.replace(replaced, folder)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder: temporary files and folders that nobody holds a lock on."""
    if fcntl is None or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_OURS)]
    for path in found:
        # An error: it is gone by now, belongs to another user, or is a link, which this module never makes.
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same(handle, path):
                    _delete(path)
            finally:
                os.close(handle)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder for this, and writes its list of names through by itself
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(os.fsencode(first), os.fsencode(second), 2)  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        # Both relative to the working directory; 2 is RENAME_EXCHANGE.
        failed = library.renameat2(-100, os.fsencode(first), -100, os.fsencode(second), 2)
    else:
        return False
    return failed == 0  # otherwise the two renames that follow report the error


def _place(made: Path, folder: Path, overwrite: bool) -> None:
    """Rename a finished folder to its name."""
    if overwrite and folder.is_dir() and not folder.is_symlink():
        if exchange(made, folder):
            return  # the replaced one is in the scratch folder now
        replaced = folder.with_name(f"{_REPLACED}{folder.name}")
        os.replace(folder, replaced)
        try:
            os.replace(made, folder)
        except BaseException:
            os.replace(replaced, folder)
            raise
        _delete(replaced)
        return
    try:
        if os.name != "posix" and folder.is_dir():
            folder.rmdir()
        os.rename(made, folder)  # onto an empty folder, as it was at the start
    except OSError as error:
        if not os.path.lexists(folder):
            raise
        raise ValueError(
            f"folder: something else made or filled {folder} in the meantime ({error.strerror}). Give another."
        ) from None


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above a path, and remove them again if the body fails."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
        raise


def _new_scratch(parent: Path) -> tuple[Path, int | None]:
    """Make a folder that only its owner can read; return it with a handle that holds a lock on it."""
    while True:
        scratch = parent / f"{_OURS}{secrets.token_hex(8)}"
        scratch.mkdir(mode=0o700)
        if fcntl is None:
            return scratch, None
        try:
            lock = os.open(scratch, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # swept before it was locked
        _lock(lock)
        if _is_same(lock, scratch):
            return scratch, lock
        os.close(lock)


def _new_file(parent: Path) -> tuple[Path, int | None]:
    """Make an empty file; return it with a handle that holds a lock on it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    while True:
        path = parent / f"{_OURS}{secrets.token_hex(8)}"
        lock = os.open(path, flags, 0o666)
        if fcntl is None:  # Windows renames no open file
            os.close(lock)
            return path, None
        _lock(lock)
        if _is_same(lock, path):
            return path, lock
        os.close(lock)  # swept before it was locked


def _lock(handle: int) -> None:
    if fcntl is not None:
        # Some network file systems have no locks; nothing is swept there either.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)


def _is_same(handle: int, path: Path) -> bool:
    """Return whether the open file or folder still has its name."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _replaceable_mode(path: Path) -> int | None:
    """Return the permissions of the regular file with this name; None if there is nothing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"))
        kind = next((name for is_kind, name in kinds if is_kind(found.st_mode)), "a special file")
        raise ValueError(f"{path} must be a new name or a regular file, which is replaced, got {kind}.")
    return stat.S_IMODE(found.st_mode)


def _delete(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed is left for the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
