"""Text that is published with a run: without the folders of the machine that made it."""

import re
import shlex

# The folders of an absolute path (POSIX, home, drive or share) where a path can start; the last name stays. A backslash
# by itself starts none: it is an escape, that of a line break say.
_FOLDERS = re.compile(
    r"""(?<![^\s=,:;"'\[({])(?:(?:~|[A-Za-z]:)[/\\]|/|\\\\(?=\w))(?:[^\s/\\,;"'\])}]+[/\\])*(?=[^\s/\\"'])"""
)

# The beginning of a path that leads out of the working folder, and what stands around paths in an argument.
_OUTSIDE = re.compile(r"\s*(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\\w|\.\.[/\\]|file:)")
_PIECES = re.compile(r"""([=,\[\]{}"'\n]|:\s|\bdatasets:|\bbuiltin:)""")


def without_folders(text: str) -> str:
    """A text with every absolute path in it cut down to its last name: what is published names no machine."""
    return _FOLDERS.sub("", text)


def public_argument(argument: str) -> str:
    """One argument of a command line, or one name of a source, with every path that leads out of the working folder cut
    down to its last name.

    Unlike :func:`without_folders` it knows where a path ends, so that spaces may be in it: an argument is a path, or
    paths stand in it after `=` and between commas and brackets.
    """
    if _OUTSIDE.match(argument):
        return _last_name(argument)
    return "".join(
        _last_name(piece) if _OUTSIDE.match(piece) else without_folders(piece) for piece in _PIECES.split(argument)
    )


def public_command(command: str) -> str:
    """A command line, quoted as a shell wants it, with its arguments as :func:`public_argument` has them."""
    try:
        return shlex.join(map(public_argument, shlex.split(command)))
    except ValueError:  # not quoted as a shell wants it
        return without_folders(command)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\ "))[-1] or path
