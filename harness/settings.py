"""Settings as typed data: each is declared once, with its help text, and checked before anything is loaded.

A class of settings declares a field with its type, its default and, in the docstring below it, its help:

    class MySettings(SettingsBase):
        rank: Count = 16
        \"\"\"Rank of the adapters.\"\"\"

`ssm_zoo.cli.options` makes command-line options of the fields, and :func:`check` turns pydantic's errors into one
sentence per mistake: "`rank` must be at least 1, got 0".
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

__all__ = ["Option", "SettingsBase", "accept", "check", "refused", "wrong"]


class SettingsBase(BaseModel):
    """Base of all settings: unknown keys are refused, values are not converted, a field's docstring is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Option:
    """A command-line option for a field, as far as it does not follow from the field's name, type and default.

    Attributes:
        name: name of the option; by default that of the field, e.g. `--batch-size` for `batch_size`.
        metavar: name of the value in the help.
        argument: make it a positional argument instead of an option.
        parse: turns the text that was typed into the field's value.
        default: describes a default that depends on other settings; a required field then becomes optional.
        negative: add an option that switches a boolean off, beside the one that switches it on.
    """

    name: str | None = None
    metavar: str | None = None
    argument: bool = False
    parse: Callable[[str], Any] | None = None
    default: str | None = None
    negative: bool = False


Checked = TypeVar("Checked", bound=BaseModel)

# What is accepted, for the kinds of error whose pydantic message uses Python's terms.
_ACCEPTED = {
    "bool_type": "true or false",
    "invalid_key": "a text, like every key",
    "list_type": "a list",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_unicode": "text that UTF-8 can encode",
}
_WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid": "a",
}


def check(kind: type[Checked], values: Any, source: str | None = None) -> Checked:
    """Build settings from nested dicts and lists, after checking them.

    Args:
        kind: the class of the settings.
        values: the dicts and lists.
        source: name of the values in an error, if they need one.

    Raises:
        ValueError: with a sentence for each setting that is unknown, missing or not accepted, in the order in which
            they were given.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        order = {key: number for number, key in enumerate(values)} if isinstance(values, Mapping) else {}
        details = sorted(error.errors(include_url=False), key=lambda d: order.get(next(iter(d["loc"]), ""), len(order)))
        problems = [_describe(detail, kind) for detail in details]
        if source is None:
            raise ValueError("\n".join(problems)) from None
        separator = "\n  " if len(problems) > 1 else " "
        raise ValueError(separator.join([f"{source}:", *problems])) from None


def wrong(field: str, value: Any, accepted: str) -> PydanticCustomError:
    """Return the error of a validator that does not accept a field's value; `accepted` follows "must be"."""
    return refused(field, f"must be {accepted}, got {value!r}")


def refused(field: str, problem: str) -> PydanticCustomError:
    """Return the error of a validator about a field; `problem` continues a sentence that begins with its name."""
    return PydanticCustomError("refused", "{field} {problem}", {"field": field, "problem": problem})


def accept(accepted: str, convert: Callable[[Any], Any]) -> BeforeValidator:
    """Return a validator that replaces a value with the result of `convert`, and refuses it if that is None.

    pydantic's own messages name one broken bound at a time and, for unions, every branch that failed. This one names
    everything that is accepted.
    """

    def validate(value: Any) -> Any:
        converted = convert(value)
        if converted is None:
            raise PydanticCustomError("not_accepted", "Input should be {accepted}", {"accepted": accepted})
        return converted

    return BeforeValidator(validate)


def _describe(detail: ErrorDetails, settings: type[BaseModel]) -> str:
    """Return the sentence for one mistake, with the dotted key, what is accepted, and the value."""
    kind, location, value = detail["type"], detail["loc"], reprlib.repr(detail["input"])
    key = ".".join(map(str, location))
    name = f"`{key}`" if key else "the top level"
    if kind == "refused":
        context = detail.get("ctx", {})
        return f"`{'.'.join([*map(str, location), context['field']])}` {context['problem']}"
    if kind == "missing":
        required = [
            name for name, field in _class_at(location[:-1], settings).model_fields.items() if field.is_required()
        ]
        return f"{name} is missing; required: {', '.join(required)}"
    if kind == "extra_forbidden":
        known = list(_class_at(location[:-1], settings).model_fields)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        suggestion = f"did you mean {close[0]!r}? " if close else ""
        return f"{name} is unknown (got {value}); {suggestion}accepted keys: {', '.join(known)}"
    if kind == "model_type":
        keys = ", ".join(_class_at(location, settings).model_fields)
        return f"{name} must be a mapping with the keys {keys}, got {value}"
    accepted = _ACCEPTED.get(kind, detail["msg"].removeprefix("Input should be "))
    if kind in ("too_short", "too_long"):
        bound, key = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        number = detail.get("ctx", {})[key]
        accepted = f"a list of at {bound} {number} item{'' if number == 1 else 's'}"
    for theirs, ours in _WORDS.items():
        accepted = accepted.replace(theirs, ours)
    return f"{name} must be {accepted}, got {value}"


def _class_at(location: tuple[int | str, ...], settings: type[BaseModel]) -> type[BaseModel]:
    """Return the class of the mapping at a place in nested settings."""
    for key in location:
        if isinstance(key, str):
            annotation = settings.model_fields[key].annotation
            options = (annotation, *get_args(annotation))
            settings = next(part for part in options if isinstance(part, type) and issubclass(part, BaseModel))
    return settings
