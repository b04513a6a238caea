"""The kinds of values in recipes, each with the words that tell a user what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

from ..evaluation.decoding import LEAST_CONTEXT
from ..harness.settings import accept

LAYERS_ACCEPTED = (
    "a list of distinct layer numbers counted from 0, 'all', 'odd', 'even', 'every:N' (N at least 1), 'except:N' "
    "(N at least 2) or 'interleave:FRACTION' (above 0, at most 1)"
)


def _number(low: float, high: float = 1e18, *, above: bool = False, below: bool = False) -> Callable[[Any], Any]:
    """Convert to a float in [low, high], the ends excluded where `above` and `below` say so."""

    def convert(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        inside = low <= value <= high and not (above and value == low) and not (below and value == high)
        return float(value) if inside else None

    return convert


def whole_number(low: int, high: float = 1e18) -> Callable[[Any], int | None]:
    """Convert to an int in [low, high]. Whole floats are accepted, since YAML reads 1e6 as a float."""

    def convert(value: Any) -> int | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return None
        return int(value) if value == int(value) else None

    return convert


def _pair(convert: Callable[[Any], float | None], *, ordered: bool) -> Callable[[Any], Any]:
    """Convert to a tuple of two numbers, the first not above the second if `ordered`."""

    def convert_pair(value: Any) -> tuple[float, float] | None:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return None
        first, second = convert(value[0]), convert(value[1])
        if first is None or second is None or (ordered and first > second):
            return None
        return first, second

    return convert_pair


def _half_life(value: Any) -> Any:
    return value if value == "calibrated" else _pair(_number(0, above=True), ordered=True)(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _sources(value: Any) -> str | list[str] | None:
    if isinstance(value, list) and value and all(_text(item) for item in value):
        return value
    return _text(value)


def _identifier(value: Any) -> str | None:
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789_")
    return value if isinstance(value, str) and value and set(value) <= letters else None


def layers(value: Any) -> str | list[int] | None:
    """Return a well-formed choice of layers (see `LAYERS_ACCEPTED`) unchanged, otherwise None."""
    if isinstance(value, str):
        kind, _, argument = value.partition(":")
        if kind in ("every", "except"):
            least = 1 if kind == "every" else 2
            return value if argument.isascii() and argument.isdecimal() and int(argument) >= least else None
        if kind == "interleave":
            return value if _fraction(argument) else None
        return value if value in ("all", "odd", "even") else None
    if not isinstance(value, list | tuple) or not all(type(number) is int and number >= 0 for number in value):
        return None
    return list(value) if 0 < len(value) == len(set(value)) else None


def _fraction(text: str) -> Fraction | None:
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    return fraction if 0 < fraction <= 1 else None


def _distinct(low: int) -> Callable[[Any], list[int] | None]:
    """Convert to a list of different ints of at least `low`, which may be empty."""

    def convert(value: Any) -> list[int] | None:
        if not isinstance(value, list | tuple):
            return None
        numbers = [whole_number(low)(item) for item in value]
        if None in numbers or len(set(numbers)) < len(numbers):
            return None
        return [number for number in numbers if number is not None]

    return convert


def _exact_heads(value: Any) -> list[tuple[int, int]] | None:
    """Convert to ascending pairs of a layer and a key-value head."""
    if not isinstance(value, list | tuple):
        return None
    pairs = [_pair(whole_number(0), ordered=False)(pair) for pair in value]
    return None if None in pairs or len(set(pairs)) < len(pairs) else sorted(pairs)


Text = Annotated[str, accept("a text that is not empty", _text)]
Identifier = Annotated[str, accept("lower-case letters, digits and underscores", _identifier)]
Sources = Annotated[str | list[str], accept("a path, 'builtin:NAME', or a list of them, not empty", _sources)]
Seed = Annotated[int, accept("a whole number from 0 to 2^32 - 1", whole_number(0, 2**32 - 1))]
Count = Annotated[int, accept("a whole number of 1 or more", whole_number(1))]
Whole = Annotated[int, accept("a whole number of 0 or more", whole_number(0))]
Length = Annotated[int, accept("a whole number of 2 or more (a token and its successor)", whole_number(2))]
Distances = Annotated[list[int], accept("a list of different whole numbers of 1 or more", _distinct(1))]
Pairs = Annotated[list[int], accept("a list of different whole numbers of 2 or more", _distinct(2))]
Contexts = Annotated[
    list[int], accept(f"a list of different whole numbers of {LEAST_CONTEXT} or more", _distinct(LEAST_CONTEXT))
]
Context = Annotated[int, accept(f"a whole number of {LEAST_CONTEXT} or more", whole_number(LEAST_CONTEXT))]
ConvKernel = Annotated[int, accept("a whole number from 2 to 8", whole_number(2, 8))]
Positive = Annotated[float, accept("a number above 0", _number(0, above=True))]
NonNegative = Annotated[float, accept("a number of 0 or more", _number(0))]
Share = Annotated[float, accept("a number from 0 to 1", _number(0, 1))]
UpToOne = Annotated[float, accept("a number above 0, at most 1", _number(0, 1, above=True))]
Part = Annotated[float, accept("a number above 0 and below 1", _number(0, 1, above=True, below=True))]
Warmup = Annotated[float, accept("a share of the steps from 0 to 0.5", _number(0, 0.5))]
Decay = Annotated[float, accept("a share of the steps above 0 and up to 1", _number(0, 1, above=True))]
Betas = Annotated[
    tuple[float, float], accept("two numbers from 0 to below 1", _pair(_number(0, 1, below=True), ordered=False))
]
Layers = Annotated[list[int] | str, accept(LAYERS_ACCEPTED, layers)]
ExactHeads = Annotated[
    list[tuple[int, int]],
    accept("a list of different pairs [layer, key-value head], both counted from 0", _exact_heads),
]
HalfLife = Annotated[
    Literal["calibrated"] | tuple[float, float],
    accept("'calibrated' or [shortest, longest] in tokens, above 0", _half_life),
]
