"""Rules that turn the tensors of one checkpoint layout into those of another, in either direction.

A format is a list of rules. A rule pairs a key pattern of the other layout with key patterns of ours, in which
`{layer}` stands for the number of a block and `{rest}` for the remainder of a key. It may also transform the tensors.
Our keys are those of the model itself, so that a list of rules is known to be complete before a checkpoint is read; the
keys that a checkpoint must have follow from it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 3


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        load: reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """Return the tensor in another dtype."""
        return LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))


def lazy(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that exists already, e.g. on the meta device."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _zeros(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, lambda: torch.zeros(tensor.shape, dtype=tensor.dtype))


class Transform(Protocol):
    """A conversion between their tensors and ours, which computes shapes without reading any tensor."""

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Return our tensors, computed from theirs."""
        ...

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Return their tensors, computed from ours."""
        ...


@dataclass(frozen=True)
class SplitRows:
    """Transform for a tensor of theirs whose rows are several tensors of ours.

    Attributes:
        sizes: number of rows of each of ours.
        groups: number of equal groups, e.g. heads, in each of which the rows of all of ours follow one another.
        transposed: whether their tensor is transposed, i.e. its columns are our rows.
    """

    sizes: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Split the rows."""
        (tensor,), parts, start = theirs, [], 0
        width = tensor.shape[:1] if self.transposed else tensor.shape[1:]
        for size in self.sizes:
            first, last = start // self.groups, (start + size) // self.groups

            def load(first: int = first, last: int = last) -> Tensor:
                whole = tensor.load().T if self.transposed else tensor.load()
                rows = whole.unflatten(0, (self.groups, -1))[:, first:last].flatten(0, 1)
                return rows.clone(memory_format=torch.contiguous_format)

            parts.append(LazyTensor((size, *width), tensor.dtype, load))
            start += size
        return parts

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Join the rows of tensors that share a dtype."""
        shape = (sum(part.shape[0] for part in ours), *ours[0].shape[1:])

        def load() -> Tensor:
            rows = [part.load().unflatten(0, (self.groups, -1)) for part in ours]
            whole = torch.cat(rows, dim=1).flatten(0, 1)
            return whole.T.contiguous() if self.transposed else whole

        return [LazyTensor(shape[::-1] if self.transposed else shape, ours[0].dtype, load)]


@dataclass(frozen=True)
class Computed:
    """Transform for a tensor of ours that is computed from tensors of theirs.

    Attributes:
        theirs: shapes of theirs.
        ours: shape of ours.
        make: computes ours from theirs.
        undo: computes theirs from ours; None if that is impossible.
    """

    theirs: tuple[tuple[int, ...], ...]
    ours: tuple[int, ...]
    make: Callable[[list[Tensor]], Tensor]
    undo: Callable[[Tensor], list[Tensor]] | None = None

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Return our tensor, in the dtype of the first of theirs."""

        def load() -> Tensor:
            return self.make([tensor.load() for tensor in theirs]).to(theirs[0].dtype)

        return [LazyTensor(self.ours, theirs[0].dtype, load)]

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Return their tensors, which can be loaded if there is an `undo`."""
        (tensor,), undo = ours, self.undo

        def load(number: int) -> Tensor:
            assert undo is not None, "a format without `undo` is only read"
            return undo(tensor.load())[number].contiguous()

        return [
            LazyTensor(shape, tensor.dtype, lambda number=number: load(number))
            for number, shape in enumerate(self.theirs)
        ]


@dataclass(frozen=True)
class Rule:
    """A pair of key patterns, theirs and ours.

    Attributes:
        theirs: pattern of a key in the other layout, or several if there is a transform. None means that it lacks this
            tensor, which is then zero.
        ours: pattern of a key of the zoo, or several if there is a transform.
        transform: converts the tensors; None if they are the same.
        layers: blocks to which the rule applies; None for all.
    """

    theirs: str | tuple[str, ...] | None
    ours: str | tuple[str, ...]
    transform: Transform | None = None
    layers: Collection[int] | None = None


def _tuple(patterns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns or ()


class Mapper:
    """Rules applied to the keys of one model.

    Args:
        rules: the rules of a format.
        model: all tensors of the model by key, on the meta device.

    Raises:
        ValueError: if a key of the model matches no rule or several, or a rule matches no key.
    """

    def __init__(self, rules: list[Rule], model: Mapping[str, Tensor]) -> None:
        self.model = {key: lazy(tensor) for key, tensor in model.items()}
        self._steps: list[tuple[tuple[str, ...], tuple[str, ...], Transform | None]] = []
        unused = []
        for rule in rules:
            patterns, others = _tuple(rule.ours), _tuple(rule.theirs)
            found = [match for match in map(_expression(patterns[0]).fullmatch, model) if match]
            fields = [match.groupdict() for match in found]
            fields = [each for each in fields if rule.layers is None or int(each["layer"]) in rule.layers]
            unused += [] if fields else [(others or patterns)[0]]
            for each in fields:
                ours, theirs = (tuple(key.format(**each) for key in keys) for keys in (patterns, others))
                self._steps.append((theirs, ours, rule.transform))
        met = [key for _, keys, _ in self._steps for key in keys]
        twice = sorted({key for key in met if met.count(key) > 1}) if len(met) != len(set(met)) else []
        problems = {"rules that match no key": unused, "keys of the model with several rules": twice}
        problems["keys of the model without a rule"] = sorted(set(model) - set(met))
        problems["rules for keys that the model lacks"] = sorted(set(met) - set(model))
        _raise("rules", problems)

    def theirs_of(self, key: str) -> str:
        """Return the key of theirs from which one of ours is made, or the first of several."""
        return next(theirs[0] for theirs, ours, _ in self._steps if theirs and key in ours)

    def expected(self) -> dict[str, LazyTensor]:
        """Return the keys and shapes of a checkpoint in their layout."""
        return self._from_ours(self.model)

    def to_ours(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Return the zoo's tensors, made from theirs, which must have passed :func:`check`."""
        result = {}
        for theirs, ours, transform in self._steps:
            if not theirs:
                result.update({key: _zeros(self.model[key]) for key in ours})
                continue
            given = [tensors[key] for key in theirs]
            result.update(zip(ours, given if transform is None else transform.to_ours(given), strict=True))
        return result

    def from_ours(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Return their tensors, made from the zoo's.

        Raises:
            ValueError: if a tensor that their layout lacks is not zero.
        """
        lacking = [key for theirs, ours, _ in self._steps if not theirs for key in ours]
        lost = [key for key in lacking if bool(tensors[key].load().any())]
        _raise("weights that the target layout does not have must be zero", {"are not": lost})
        return self._from_ours(tensors)

    def _from_ours(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        result = {}
        for theirs, ours, transform in self._steps:
            if not theirs:
                continue
            parts = [tensors[key] for key in ours]
            result.update(zip(theirs, parts if transform is None else transform.from_ours(parts), strict=True))
        return result


def check(
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, LazyTensor],
    where: str,
    promise: str = "config.json",
    hint: str = "",
) -> None:
    """Compare the tensors of a checkpoint with those that its configuration promises.

    Args:
        tensors: the tensors of the checkpoint.
        expected: the expected tensors.
        where: name of the checkpoint, for the message.
        promise: source of the expectation, for the message.
        hint: end of the message.

    Raises:
        ValueError: if keys are missing or left over, or have other shapes or dtypes; one message lists all of it.
    """
    common = [key for key in expected if key in tensors]
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
        for key in common
        if tensors[key].shape != expected[key].shape
    ]
    dtypes = [f"{key} {_name(tensors[key].dtype)}" for key in common if tensors[key].dtype not in _WEIGHTS]
    _raise(
        f"{where}: the weights are not what {promise} promises",
        {
            "missing": [key for key in expected if key not in tensors],
            "left over": [key for key in tensors if key not in expected],
            "of another shape": shapes,
            f"of a dtype other than {', '.join(map(_name, _WEIGHTS))}": dtypes,
        },
        hint,
    )


def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    return re.compile(escaped)


def _raise(what: str, problems: dict[str, list[str]], hint: str = "") -> None:
    """Raise a ValueError that gives the number and the first names of each problem, if there is any."""
    texts = []
    for problem, names in problems.items():
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            texts.append(f"{len(names)} {problem}: {', '.join(names[:_SHOWN])}{more}")
    if texts:
        raise ValueError(f"{what}: {'; '.join(texts)}{f'.{hint}' if hint else ''}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
