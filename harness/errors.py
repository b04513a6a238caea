"""Errors that a run survives: a part that only decorates a result, e.g. a plot, is left out with a warning."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

UNREADABLE = (OSError, ValueError, ArithmeticError, yaml.YAMLError, RecursionError)
"""Exceptions of reading and rendering a decoration: its files, texts and front matter come from others."""


class DecorationWarning(UserWarning):
    """Names a part that a result lacks."""


def go_without(what: str, error: BaseException) -> None:
    """Warn that a part is left out because of an error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    warnings.warn(f"{what}: {reason[:200]}; going on without it", DecorationWarning, stacklevel=3)


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Continue without the part that the body makes, if it cannot be made.

    Args:
        what: name of the part, for the warning.
    """
    try:
        yield
    except UNREADABLE as error:
        go_without(what, error)
