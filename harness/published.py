"""Text that is safe to publish, without folders of the machine, and parts of a result that may fail."""

import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

UNREADABLE = (OSError, ValueError, ArithmeticError, yaml.YAMLError, RecursionError)
"""Exceptions of reading and rendering an optional part: its files, texts and front matter are not ours."""

# The folders of an absolute path (POSIX, home, drive or share) where a path can start, without its last name. A single
# backslash starts no path: it is an escape, e.g. of a line break.
_FOLDERS = re.compile(
    r"""(?<![^\s=,:;"'\[({])(?:(?:~|[A-Za-z]:)[/\\]|/|\\\\(?=\w))(?:[^\s/\\,;"'\])}]+[/\\])*(?=[^\s/\\"'])"""
)

# The beginning of a path that leads out of the working folder, and the text between the paths of an argument.
_OUTSIDE = re.compile(r"\s*(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\\w|\.\.[/\\]|file:)")
_PIECES = re.compile(r"""([=,\[\]{}"'\n]|:\s|\bdatasets:|\bbuiltin:)""")


class DecorationWarning(UserWarning):
    """Names a part that a result lacks."""


def go_without(what: str, error: BaseException) -> None:
    """Warn that a part is left out because of an error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    warnings.warn(f"{what}: {reason[:200]}; going on without it", DecorationWarning, stacklevel=3)


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Continue without an optional part of a result, e.g. a plot, if the body cannot make it.

    Args:
        what: name of the part, for the warning.
    """
    try:
        yield
    except UNREADABLE as error:
        go_without(what, error)


def without_folders(text: str) -> str:
    """Return a text with every absolute path in it reduced to its last name."""
    return _FOLDERS.sub("", text)


def public_argument(argument: str) -> str:
    """Return an argument, or the name of a source, with paths out of the working folder reduced to their last names.

    An argument is a path, or contains paths after `=` and between commas and brackets. So the end of a path is known,
    and it may contain spaces, which :func:`without_folders` cannot allow.
    """
    paths = argument.split(",")
    if all(map(_OUTSIDE.match, paths)) or all(map(_is_file, paths)):  # one, or the two files of parallel text
        return ",".join(_last_name(path) if _OUTSIDE.match(path) else without_folders(path) for path in paths)
    if _OUTSIDE.match(argument):
        return _last_name(argument)
    return "".join(
        _last_name(piece) if _OUTSIDE.match(piece) else without_folders(piece) for piece in _PIECES.split(argument)
    )


def public_command(command: str) -> str:
    """Return a shell command line with :func:`public_argument` applied to its arguments."""
    try:
        return shlex.join(map(public_argument, shlex.split(command)))
    except ValueError:  # the quotes are not balanced
        return without_folders(command)


def _is_file(path: str) -> bool:
    """Return whether the last name of a path has a suffix, as names of files have."""
    return re.search(r"\w\.\w+$", _last_name(path)) is not None


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\ "))[-1] or path
