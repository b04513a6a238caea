"""A checkpoint of mixers of positions as its authors save it: weights without a configuration.

Sizes follow from shapes; what shapes do not tell is said by the user (:class:`Settings`) or a documented default.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...harness.yaml_values import override
from ...modeling.pretrained import ZooPreTrainedModel
from ..rules import Computed, LazyTensor, Rule

_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of parallel training
_COMMON: dict[str, type] = {
    "pad_mode": str,
    "pad_token_id": int,
    "bos_token_id": int,
    "eos_token_id": int,
    "context_overflow": str,
}


class Settings:
    """What the user says of a checkpoint, by name.

    Args:
        assignments: "name=YAML value", each.

    Raises:
        ValueError: if one is no assignment.
    """

    def __init__(self, assignments: Sequence[str] = ()) -> None:
        self.given: dict[str, Any] = override({}, assignments)
        self._known: list[str] = []

    def take(self, name: str, kind: type, accepted: Sequence[Any] | None = None) -> Any:
        """The value of a setting that the checkpoint's class has, None if it is not given.

        Raises:
            ValueError: if it is of another kind, or none of the accepted ones.
        """
        self._known.append(name)
        value = self.given.get(name)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (accepted is not None and value not in accepted):
            choices = ", ".join(map(str, accepted)) if accepted is not None else f"a value of type {kind.__name__}"
            raise ValueError(f"set: {name}: got {self.given[name]!r}; accepted: {choices}")
        return value

    def positive(self, name: str, kind: type) -> Any:
        """As :meth:`take`, of numbers above 0."""
        value = self.take(name, kind)
        if value is not None and not value > 0:
            raise ValueError(f"set: {name}: got {value!r}; accepted: a number above 0")
        return value

    def common(self, hidden_act: str | None = None) -> dict[str, Any]:
        """Fields of every masked mixer that shapes do not tell; without a value those that are not given."""
        found = {name: self.take(name, kind) for name, kind in _COMMON.items()}
        if hidden_act is not None:
            found["hidden_act"] = self.take("hidden_act", str) or hidden_act
        return {name: value for name, value in found.items() if value is not None}

    def finish(self, name: str) -> None:
        """Raise ValueError if something was said that the class named does not have."""
        for key in self.given:
            if key not in self._known:
                raise ValueError(f"set: {key}: says nothing of {name}; accepted: {', '.join(sorted(self._known))}")


class MixerCheckpoint:
    """Keys and shapes, with errors that name what is missing.

    Args:
        name: of the folder, for messages.
        tensors: the weights.
    """

    def __init__(self, name: str, tensors: Mapping[str, LazyTensor]) -> None:
        for wrapper in _WRAPPERS:
            if tensors and all(key.startswith(wrapper) for key in tensors):
                tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
        self.name = name
        self.tensors = dict(tensors)

    def has(self, pattern: str) -> bool:
        """Whether a key is of this pattern, a regular expression."""
        return any(re.fullmatch(pattern, key) for key in self.tensors)

    def count(self, prefix: str) -> int:
        """One more than the largest number that follows `prefix` and a dot in a key."""
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in self.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def shape(self, key: str, *ranks: int) -> tuple[int, ...]:
        """Shape of a tensor that has to be there, with one of these numbers of axes.

        Raises:
            ValueError: if it is not there, or has another number.
        """
        if key not in self.tensors:
            raise ValueError(f"{self.name}: 1 missing: {key}, of whose shape sizes are taken")
        shape = self.tensors[key].shape
        if len(shape) not in ranks or 0 in shape:
            raise ValueError(
                f"{self.name}: {key} is of shape {list(shape)}; accepted: {' or '.join(map(str, ranks))} axes"
            )
        return shape

    def square(self, key: str, *ranks: int) -> tuple[int, ...]:
        """As :meth:`shape`, of matrices between positions.

        Raises:
            ValueError: if they are not square.
        """
        shape = self.shape(key, *ranks)
        if shape[0] != shape[1]:
            raise ValueError(f"{self.name}: {key} is of shape {list(shape)}; accepted: as many columns as rows")
        return shape

    def drop(self, *patterns: str) -> list[str]:
        """Leave out the keys of these patterns, regular expressions, and return them."""
        gone = [key for key in self.tensors if any(re.fullmatch(pattern, key) for pattern in patterns)]
        for key in gone:
            del self.tensors[key]
        return gone

    def tie(self, embedding: str, head: str) -> bool:
        """Whether the head is the embedding: one of both is not there, or they are equal. Leaves the head out then."""
        if embedding not in self.tensors and head in self.tensors:
            self.tensors[embedding] = self.tensors.pop(head)
            return True
        if head not in self.tensors:
            return True
        pair = self.tensors[embedding], self.tensors[head]
        tied = pair[0].shape == pair[1].shape and torch.equal(pair[0].load(), pair[1].load())
        if tied:
            del self.tensors[head]
        return tied


@dataclass(frozen=True)
class MixerReading:
    """A checkpoint understood.

    Attributes:
        name: whose class it is of.
        model_class: our model.
        config: its configuration.
        rules: from their keys to ours.
        notes: what a reader of the report should know: what was left out, what was taken for granted.
    """

    name: str
    model_class: type[ZooPreTrainedModel]
    config: PreTrainedConfig
    rules: list[Rule]
    notes: list[str] = field(default_factory=list)


def dropped(keys: Sequence[str], why: str) -> list[str]:
    """The line of the report for tensors that were left out, if there are any."""
    return [f"left out: {len(keys)} tensors, {keys[0]} the first: {why}"] if keys else []


def constant(theirs: tuple[int, ...], value: Tensor) -> Computed:
    """How to come to a tensor that their module has not: in the dtype of another one, of shape `theirs`, of it."""
    return Computed((theirs,), tuple(value.shape), lambda tensors: value)


def stacked(tensors: list[Tensor]) -> Tensor:
    """(H, ...) of H tensors."""
    return torch.stack(tensors)


def unstacked(tensor: Tensor) -> list[Tensor]:
    """H tensors of (H, ...)."""
    return list(tensor.unbind())
