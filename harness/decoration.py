"""What only adorns a result, such as a plot: if it fails, a warning is given and the result written without it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

UNREADABLE = (OSError, ValueError, ArithmeticError, yaml.YAMLError, RecursionError)
"""What reading and rendering a decoration may raise: files, texts and front matter come from others."""


class DecorationWarning(UserWarning):
    """Says what is gone on without."""


def go_without(what: str, error: BaseException) -> None:
    """Warn that something is left out because of an error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    warnings.warn(f"{what}: {reason[:200]}; going on without it", DecorationWarning, stacklevel=3)


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Go on without what the body makes if it cannot be made.

    Args:
        what: its name, for the warning.
    """
    try:
        yield
    except UNREADABLE as error:
        go_without(what, error)
