"""Rules that turn the tensors of one checkpoint layout into those of another, in either direction.

A format is a list of rules. A rule pairs a key pattern of theirs with key patterns of ours, in which `{layer}` stands
for the number of a block and `{rest}` for the remainder of a key; between them there may be a transform of the tensors.
Which of our keys there are is asked of the model itself, so that a list of rules is proven complete before a
checkpoint is read, and what a checkpoint has to hold follows from it.
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
        """This in another dtype."""
        return LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already, on the meta device say."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _zeros(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, lambda: torch.zeros(tensor.shape, dtype=tensor.dtype))


class Transform(Protocol):
    """How tensors of theirs become tensors of ours, and back; shapes are known without reading any."""

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Ours, of theirs."""
        ...

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Theirs, of ours."""
        ...


@dataclass(frozen=True)
class SplitRows:
    """One tensor of theirs is several of ours, one below the other.

    Attributes:
        sizes: rows of each.
    """

    sizes: tuple[int, ...]

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """The parts."""
        (tensor,), parts, start = theirs, [], 0
        for size in self.sizes:
            rows = slice(start, start + size)
            parts.append(
                LazyTensor((size, *tensor.shape[1:]), tensor.dtype, lambda rows=rows: tensor.load()[rows].clone())
            )
            start += size
        return parts

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """The whole, of parts which share a dtype."""
        shape = (sum(part.shape[0] for part in ours), *ours[0].shape[1:])
        return [LazyTensor(shape, ours[0].dtype, lambda: torch.cat([part.load() for part in ours]))]


@dataclass(frozen=True)
class Computed:
    """One tensor of ours is computed from tensors of theirs.

    Attributes:
        theirs: their shapes.
        ours: its shape.
        make: it, of theirs.
        undo: theirs, of it; None where that is lost.
    """

    theirs: tuple[tuple[int, ...], ...]
    ours: tuple[int, ...]
    make: Callable[[list[Tensor]], Tensor]
    undo: Callable[[Tensor], list[Tensor]] | None = None

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Ours, in the dtype of the first of theirs."""

        def load() -> Tensor:
            return self.make([tensor.load() for tensor in theirs]).to(theirs[0].dtype)

        return [LazyTensor(self.ours, theirs[0].dtype, load)]

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Theirs, each of which can be loaded where there is an `undo`."""
        (tensor,), undo = ours, self.undo

        def load(number: int) -> Tensor:
            assert undo is not None, "a format whose tensors cannot be computed back is only read"
            return undo(tensor.load())[number].contiguous()

        return [
            LazyTensor(shape, tensor.dtype, lambda number=number: load(number))
            for number, shape in enumerate(self.theirs)
        ]


@dataclass(frozen=True)
class Rule:
    """Key patterns of theirs, and ours.

    Attributes:
        theirs: pattern of the key in the other layout, or with `transform` several; None: it has no such tensor, and
            computes as with zeros.
        ours: patterns of the zoo's keys: one, or with `transform` several.
        transform: how one becomes the other; None where the tensor is the same.
        layers: blocks that the rule is for; None: all.
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
        rules: the format.
        model: every key of the model with its tensor, on the meta device.

    Raises:
        ValueError: if a key of the model is met by no rule or by several, or a rule meets none.
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
        problems = {"rules that meet nothing": unused, "keys of the model met twice": twice}
        problems["keys of the model without a rule"] = sorted(set(model) - set(met))
        problems["rules for keys that the model lacks"] = sorted(set(met) - set(model))
        _raise("rules", problems)

    def theirs_of(self, key: str) -> str:
        """Their key that one of ours comes from, or the first of several."""
        return next(theirs[0] for theirs, ours, _ in self._steps if theirs and key in ours)

    def expected(self) -> dict[str, LazyTensor]:
        """What a checkpoint in their layout holds: keys and shapes."""
        return self._from_ours(self.model)

    def to_ours(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The zoo's tensors, of theirs; :func:`check` them first."""
        result = {}
        for theirs, ours, transform in self._steps:
            if not theirs:
                result.update({key: _zeros(self.model[key]) for key in ours})
                continue
            given = [tensors[key] for key in theirs]
            result.update(zip(ours, given if transform is None else transform.to_ours(given), strict=True))
        return result

    def from_ours(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Their tensors, of the zoo's.

        Raises:
            ValueError: if a tensor that they do not have is not zero.
        """
        lacking = [key for theirs, ours, _ in self._steps if not theirs for key in ours]
        lost = [key for key in lacking if bool(tensors[key].load().any())]
        _raise("weights that the other layout has no place for must be 0", {"are not": lost})
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
    """Compare a checkpoint with what its configuration promises.

    Args:
        tensors: what there is.
        expected: what there has to be.
        where: name of the checkpoint, for the message.
        promise: what says so, for the message.
        hint: what the message ends with.

    Raises:
        ValueError: if keys are missing or left over, or shapes or dtypes are others: all of it in one message.
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
    """Raise a ValueError that says how many of each problem there are, and which the first are."""
    texts = []
    for problem, names in problems.items():
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            texts.append(f"{len(names)} {problem}: {', '.join(names[:_SHOWN])}{more}")
    if texts:
        raise ValueError(f"{what}: {'; '.join(texts)}{f'.{hint}' if hint else ''}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
