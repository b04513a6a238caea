"""The settings of a mixture of training objectives: which ones, with what parameters, at what rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ..harness.settings import SettingsBase, refused, wrong
from ..harness.text_files import read_text_file
from ..harness.yaml_values import read_yaml

PARAMETERS: dict[str, dict[str, Any]] = {
    "next_token": {},
    "prefix_lm": {"prefix": 0.75, "corruption": 0.0, "mean_span": 3.0},
    "infilling": {"corruption": 0.15, "mean_span": 3.0},
    "autoencoding": {"corruption": 0.5, "mean_span": 3.0},
    "copying": {},
    "selective_copying": {"spans": 4, "span_tokens": 8, "delimiter_tokens": (2, 16), "question": "before"},
    "deshuffling": {"share": 0.25},
}
"""The parameters of each objective, with their defaults."""
_NAMES = sorted({name for parameters in PARAMETERS.values() for name in parameters})
_WITH_SPANS = ("prefix_lm", "infilling", "autoencoding", "selective_copying")

Kind = Literal["next_token", "prefix_lm", "infilling", "autoencoding", "copying", "selective_copying", "deshuffling"]
Share = Annotated[float, Field(gt=0, lt=1)]


class ObjectiveSettings(SettingsBase):
    """One objective of a mixture; `objectives.py` describes them. A parameter of another objective is refused."""

    objective: Kind
    """Kind of the samples."""
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Share of the samples, relative to the other objectives' rates."""
    name: Annotated[str, Field(min_length=1)] = ""
    """Name in the log and the report; the objective with its changed parameters if not given."""
    prefix: Share | None = None
    """Share of the text that is input (prefix_lm)."""
    corruption: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the tokens that spans cover; 0 for none (prefix_lm only)."""
    mean_span: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Mean number of tokens of a span."""
    spans: Annotated[int, Field(ge=1)] | None = None
    """Spans to copy at most; fewer in a short text (selective_copying)."""
    span_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a span (selective_copying)."""
    delimiter_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Smallest and largest number of tokens of a delimiter (selective_copying)."""
    question: Literal["before", "after"] | None = None
    """Place of the question, relative to the context (selective_copying)."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the tokens that are permuted (deshuffling)."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in the defaults of the objective's parameters and its name."""
        if not isinstance(values, dict) or values.get("objective") not in PARAMETERS:
            return values
        kind = values["objective"]
        for name in _NAMES:
            if values.get(name) is not None and name not in PARAMETERS[kind]:
                known = ", ".join(PARAMETERS[kind]) or "none"
                problem = f"has no effect with objective {kind!r}, whose parameters are: {known}; got {values[name]!r}"
                raise refused(name, problem)
        for name in PARAMETERS[kind]:
            if name in values and values[name] is None:  # a key of YAML with nothing behind it
                raise refused(name, "must have a value or be left out, got None")
        if kind == "prefix_lm" and "mean_span" in values and not values.get("corruption"):
            raise refused("mean_span", f"has no effect without `corruption`, got {values['mean_span']!r}")
        completed = {**PARAMETERS[kind], **values}
        if isinstance(completed.get("delimiter_tokens"), list):
            completed["delimiter_tokens"] = tuple(completed["delimiter_tokens"])
        changed = [
            f"{completed[name]:g}" if isinstance(completed[name], float) else str(completed[name])
            for name in PARAMETERS[kind]
            if completed[name] != PARAMETERS[kind][name] and name != "delimiter_tokens"
        ]
        return {"name": "_".join([kind, *changed]), **completed}

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        if self.objective in ("infilling", "autoencoding") and self.corruption == 0:
            raise wrong("corruption", self.corruption, f"above 0 for {self.objective}")
        if self.delimiter_tokens is not None and self.delimiter_tokens[0] > self.delimiter_tokens[1]:
            raise wrong("delimiter_tokens", list(self.delimiter_tokens), "a smallest and a largest number, in order")
        return self


class BanditSettings(SettingsBase):
    """A bandit that chooses the rates during training; `objective_rates.py` describes it."""

    every: Annotated[int, Field(ge=1)] = 250
    """Optimiser steps between two decisions."""
    warmup: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the steps before the first decision."""
    exploration: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.5, 0.2)
    """Share of the samples that follow the given rates, at the beginning and from half of the steps on."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Weight of the earlier rewards in an objective's mean reward."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25
    """Difference of two mean rewards that makes one objective e times as frequent as the other."""

    def decides(self, done: int, steps: int) -> bool:
        """Return whether there is a decision after `done` of the `steps` optimiser steps of a training."""
        return done % self.every == 0 and done >= self.warmup * steps

    @model_validator(mode="before")
    @classmethod
    def _from_lists(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("exploration"), list):
            return {**values, "exploration": tuple(values["exploration"])}
        return values


class ObjectiveMix(SettingsBase):
    """A mixture of objectives, at fixed rates or at rates that a bandit chooses."""

    objectives: Annotated[list[ObjectiveSettings], Field(min_length=1)]
    """The objectives and their rates."""
    sentinels: Annotated[int, Field(ge=1)] = 128
    """Sentinel tokens, which limit the number of spans, and so the length, of a sample."""
    bandit: BanditSettings | None = None
    """Choose the rates during training; the given ones are then those of the exploration."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> ObjectiveMix:
        names = [objective.name for objective in self.objectives]
        for name in names:
            if names.count(name) > 1:
                raise refused("objectives", f"must have different names, got {name!r} {names.count(name)} times")
        if self.bandit is not None and len(names) < 2:
            raise refused("bandit", "has no effect with one objective")
        kinds = {objective.objective for objective in self.objectives}
        if "sentinels" in self.model_fields_set and not kinds & {*_WITH_SPANS}:
            raise refused("sentinels", f"has no effect without {', '.join(_WITH_SPANS)}, got {self.sentinels}")
        spans = max((objective.spans or 0 for objective in self.objectives), default=0)
        if spans > self.sentinels:
            raise wrong("sentinels", self.sentinels, f"at least the number of spans of selective_copying, {spans}")
        return self

    @property
    def names(self) -> list[str]:
        """The names of the objectives."""
        return [objective.name for objective in self.objectives]

    @property
    def rates(self) -> list[float]:
        """The given rates, with a sum of 1."""
        total = sum(objective.rate for objective in self.objectives)
        return [objective.rate / total for objective in self.objectives]


# The objectives and parameters of Birdie's code. The rates are our choice: a fifth each for next token and prefix LM,
# and a tenth or a fifth for every other objective, divided among its variants.
_BIRDIE: list[dict[str, Any]] = [
    {"objective": "next_token", "rate": 0.2},
    {"objective": "prefix_lm", "rate": 0.1},
    {"objective": "prefix_lm", "corruption": 0.15, "rate": 0.1},
    {"objective": "infilling", "rate": 0.05},
    {"objective": "infilling", "mean_span": 8.0, "rate": 0.05},
    {"objective": "infilling", "corruption": 0.5, "rate": 0.05},
    {"objective": "infilling", "corruption": 0.5, "mean_span": 64.0, "rate": 0.05},
    {"objective": "autoencoding", "rate": 0.1},
    {"objective": "copying", "rate": 0.1},
    {"objective": "selective_copying", "rate": 0.05},
    {"objective": "selective_copying", "span_tokens": 16, "question": "after", "rate": 0.05},
    {"objective": "deshuffling", "rate": 0.05},
    {"objective": "deshuffling", "share": 0.75, "rate": 0.05},
]
MIXES: dict[str, dict[str, Any]] = {
    "birdie": {"objectives": _BIRDIE},
    "birdie_bandit": {"objectives": _BIRDIE, "bandit": {}},
}
"""Mixtures by name."""


def _not_accepted(accepted: str) -> PydanticCustomError:
    return PydanticCustomError("not_accepted", "Input should be {accepted}", {"accepted": accepted})


def read_mix(value: Any) -> Any:
    """Return the mapping of a mixture for its name or for a .yaml file; other values unchanged."""
    if not isinstance(value, str):
        return value
    if value in MIXES:
        return MIXES[value]
    if Path(value).suffix not in (".yaml", ".yml"):
        raise _not_accepted(f"{', '.join(MIXES)}, a .yaml file or a mapping")
    if not Path(value).is_file():
        raise _not_accepted("an existing file")
    found = read_yaml(read_text_file(Path(value), "objectives"), value)
    if isinstance(found, dict) and found.get("bandit", {}) is None:
        # YAML's value of a key with nothing behind it, which would mean fixed rates.
        raise _not_accepted("a mapping with a mapping under `bandit`, e.g. {} for its defaults, or without `bandit`")
    return found
