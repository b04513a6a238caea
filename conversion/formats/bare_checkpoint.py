"""Checkpoints of position mixers as their authors save them: weights without a configuration.

Sizes are inferred from tensor shapes. What shapes do not tell comes from the user's settings (:class:`Settings`) or has
a documented default.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...harness.yaml_values import override
from ...modeling.pretrained import ZooPreTrainedModel
from ..rules import Computed, LazyTensor, Rule

_WRAPPER = "module."  # of parallel training
_COMMON: dict[str, type] = {
    "pad_mode": str,
    "pad_token_id": int,
    "bos_token_id": int,
    "eos_token_id": int,
    "context_overflow": str,
}


class Settings:
    """The user's settings for a checkpoint: options that cannot be inferred from tensor shapes.

    Args:
        assignments: "name=YAML value" each.

    Raises:
        ValueError: if one is not an assignment.
    """

    def __init__(self, assignments: Sequence[str] = ()) -> None:
        self.given: dict[str, Any] = override({}, assignments)
        self._known: list[str] = []

    def take(self, name: str, kind: type, accepted: Sequence[Any] | None = None) -> Any:
        """Return the value of a setting that the checkpoint's class has; None if it is not given.

        Raises:
            ValueError: if the value has another type, or is not one of `accepted`.
        """
        self._known.append(name)
        value = self.given.get(name)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (accepted is not None and value not in accepted):
            choices = " or ".join(map(str, accepted)) if accepted is not None else f"a value of type {kind.__name__}"
            raise ValueError(f"--set {name} must be {choices}, got {self.given[name]!r}.")
        return value

    def positive(self, name: str, kind: type) -> Any:
        """Return the value of a setting as :meth:`take` does, after checking that it is above 0."""
        value = self.take(name, kind)
        if value is not None and not value > 0:
            raise ValueError(f"--set {name} must be above 0, got {value!r}.")
        return value

    def common(self, hidden_act: str | None = None) -> dict[str, Any]:
        """Return the settings that every masked mixer has, as far as they are given."""
        found = {name: self.take(name, kind) for name, kind in _COMMON.items()}
        if hidden_act is not None:
            found["hidden_act"] = self.take("hidden_act", str) or hidden_act
        return {name: value for name, value in found.items() if value is not None}

    def finish(self, name: str) -> None:
        """Raise a ValueError if a setting is given that the named class does not have."""
        for key in self.given:
            if key not in self._known:
                raise ValueError(f"--set {key} is no setting of {name}. It has {', '.join(sorted(self._known))}.")


class MixerCheckpoint:
    """The tensors of a checkpoint, with errors that name what is missing.

    Args:
        folder: the folder of the checkpoint.
        tensors: the weights.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
        if tensors and all(key.startswith(_WRAPPER) for key in tensors):
            tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in tensors.items()}
        self.folder, self.name = folder, folder.name
        self.tensors = dict(tensors)

    def has(self, pattern: str) -> bool:
        """Return whether a key matches a regular expression."""
        return any(re.fullmatch(pattern, key) for key in self.tensors)

    def count(self, prefix: str) -> int:
        """Return one more than the largest number that follows `prefix` and a dot in a key."""
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in self.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def shape(self, key: str, *ranks: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there, with one of these numbers of axes.

        Raises:
            ValueError: if it is missing, or has another number of axes.
        """
        if key not in self.tensors:
            raise ValueError(f"{self.name}: {key} is missing, from whose shape sizes are inferred.")
        shape = self.tensors[key].shape
        if len(shape) not in ranks or 0 in shape:
            raise ValueError(
                f"{self.name}: {key} must have {' or '.join(map(str, ranks))} axes, none of them empty, got shape "
                f"{list(shape)}."
            )
        return shape

    def square(self, key: str, *ranks: int) -> tuple[int, ...]:
        """Return the shape of matrices between positions as :meth:`shape` does.

        Raises:
            ValueError: if they are not square.
        """
        shape = self.shape(key, *ranks)
        if shape[0] != shape[1]:
            raise ValueError(f"{self.name}: {key} must have as many columns as rows, got shape {list(shape)}.")
        return shape

    def drop(self, *patterns: str) -> list[str]:
        """Leave out the keys that match one of these regular expressions, and return them."""
        gone = [key for key in self.tensors if any(re.fullmatch(pattern, key) for pattern in patterns)]
        for key in gone:
            del self.tensors[key]
        return gone

    def tie(self, embedding: str, head: str) -> bool:
        """Return whether the head is tied: either one is missing, or both are equal. A tied head is left out."""
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
    """A checkpoint whose kind and sizes are known.

    Attributes:
        name: name of its class in the authors' code.
        model_class: our model.
        config: our configuration.
        rules: rules from their keys to ours.
        notes: lines for the report, about tensors that were left out and about assumptions.
    """

    name: str
    model_class: type[ZooPreTrainedModel]
    config: PreTrainedConfig
    rules: list[Rule]
    notes: list[str] = field(default_factory=list)


def dropped(keys: Sequence[str], why: str) -> list[str]:
    """Return the line of the report about tensors that were left out; empty if there are none."""
    return [f"left out: {len(keys)} tensors, the first is {keys[0]}: {why}"] if keys else []


def constant(theirs: tuple[int, ...], value: Tensor) -> Computed:
    """Return a transform that gives a fixed value, in the dtype of a tensor of theirs, whose shape is `theirs`."""
    return Computed((theirs,), tuple(value.shape), lambda tensors: value)


def stacked(tensors: list[Tensor]) -> Tensor:
    """Stack H tensors into one (H, ...)."""
    return torch.stack(tensors)


def unstacked(tensor: Tensor) -> list[Tensor]:
    """Split (H, ...) into H tensors."""
    return list(tensor.unbind())
