"""Text that is published with a run, without the folders of the machine that made it."""

import re
import shlex

# The folders of an absolute path (POSIX, home, drive or share) where a path can start, without its last name. A single
# backslash starts no path: it is an escape, e.g. of a line break.
_FOLDERS = re.compile(
    r"""(?<![^\s=,:;"'\[({])(?:(?:~|[A-Za-z]:)[/\\]|/|\\\\(?=\w))(?:[^\s/\\,;"'\])}]+[/\\])*(?=[^\s/\\"'])"""
)

# The beginning of a path that leads out of the working folder, and what stands around paths in an argument.
_OUTSIDE = re.compile(r"\s*(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\\w|\.\.[/\\]|file:)")
_PIECES = re.compile(r"""([=,\[\]{}"'\n]|:\s|\bdatasets:|\bbuiltin:)""")


def without_folders(text: str) -> str:
    """Return a text with every absolute path in it reduced to its last name."""
    return _FOLDERS.sub("", text)


def public_argument(argument: str) -> str:
    """Return an argument, or the name of a source, with paths out of the working folder reduced to their last names.

    Unlike :func:`without_folders` this function knows where a path ends, so a path may contain spaces: an argument is a
    path, or contains paths after `=` and between commas and brackets.
    """
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


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\ "))[-1] or path
