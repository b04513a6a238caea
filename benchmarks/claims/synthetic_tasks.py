"""Sequences of tokens of `synthetic.py`: copying, induction heads, needles and running sums.

Symbols: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences and their questions.

    Attributes:
        inputs: (B, T) ids, or (B, T, d) vectors.
        targets: (B, T) classes, or (B, T, o) numbers; read where `asked` only.
        asked: (B, T), true at the positions whose answer counts.
    """

    inputs: Tensor
    targets: Tensor
    asked: Tensor


@dataclass(frozen=True)
class Copying:
    """Symbols to be repeated in their order at the markers that end the sequence.

    Selective copying has the symbols at random places of the context, among noise; so which tokens to keep depends on
    what they are (arXiv 2312.00752, figure 2). With `spaced` the symbols are the first tokens, and each is asked for
    the same number of tokens later: the control, which a time-invariant model can solve.

    Args:
        symbols: n, symbols to copy.
        context: tokens before the markers.
        vocabulary: V tokens: 0 is noise, 1 the marker, the others are symbols.
        spaced: symbols come first, a constant number of tokens before they are asked for.
    """

    symbols: int = 4
    context: int = 32
    vocabulary: int = 16
    spaced: bool = False

    vectors = False
    last_only = False

    def __post_init__(self) -> None:
        if not 1 <= self.symbols <= self.context or self.vocabulary < 4:
            raise ValueError(
                "symbols must be from 1 to context, and vocabulary at least 4, got "
                f"{self.symbols}, {self.context} and {self.vocabulary}"
            )

    @property
    def inputs(self) -> int:
        return self.vocabulary

    @property
    def outputs(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def draw(self, count: int, generator: torch.Generator, context: int | None = None) -> Batch:
        """Draw sequences, with another context's length if given."""
        context, n = context or self.context, self.symbols
        random: dict[str, Any] = {"generator": generator, "device": generator.device}
        values = torch.randint(2, self.vocabulary, (count, n), **random)
        places = torch.arange(n, device=generator.device).expand(count, -1)
        if not self.spaced:
            places = torch.rand(count, context, **random).argsort(-1)[:, :n].sort(-1).values
        inputs = torch.zeros(count, context + n, dtype=torch.long, device=generator.device)
        inputs.scatter_(1, places, values)
        inputs[:, context:] = 1
        targets, asked = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
        targets[:, context:], asked[:, context:] = values, True
        return Batch(inputs, targets, asked)


@dataclass(frozen=True)
class InductionHeads:
    """A trigger, at a random place and followed by a random symbol, ends the sequence: the answer is that symbol.

    Only the last position is asked, as in Mamba's paper (arXiv 2312.00752, section 4.1.2).

    Args:
        length: T, at least 4.
        vocabulary: V tokens: 0 is the trigger, the others are symbols.
    """

    length: int = 64
    vocabulary: int = 16

    vectors = False
    last_only = True

    def __post_init__(self) -> None:
        if self.length < 4 or self.vocabulary < 3:
            raise ValueError(
                f"length must be at least 4 and vocabulary at least 3, got {self.length} and {self.vocabulary}"
            )

    @property
    def inputs(self) -> int:
        return self.vocabulary

    @property
    def outputs(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def draw(self, count: int, generator: torch.Generator, length: int | None = None) -> Batch:
        """Draw sequences, of another length if given."""
        random: dict[str, Any] = {"generator": generator, "device": generator.device}
        inputs = torch.randint(1, self.vocabulary, (count, length or self.length), **random)
        place = torch.randint(inputs.shape[1] - 2, (count, 1), **random)
        inputs.scatter_(1, place, 0)
        targets = torch.zeros_like(inputs)
        targets[:, -1:] = inputs.gather(1, place + 1)
        inputs[:, -1] = 0
        return Batch(inputs, targets, _last(inputs))


@dataclass(frozen=True)
class Needle:
    """Key-value pairs in filler, one of whose keys ends the sequence: the answer is its value.

    Args:
        length: T; one token for each pair's key and value and for the question, and at least one filler.
        pairs: n, pairs of different keys and values.
        keys: number of keys, and of values.
        fillers: number of tokens that are filler only.
    """

    length: int = 64
    pairs: int = 4
    keys: int = 8
    fillers: int = 8

    vectors = False
    last_only = True

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys or self.fillers < 1 or self.length < 2 * self.pairs + 2:
            raise ValueError(
                "pairs must be from 1 to keys, fillers at least 1 and length at least 2 * pairs + 2, got "
                f"{self.pairs}, {self.keys}, {self.fillers} and {self.length}"
            )

    @property
    def inputs(self) -> int:
        return 2 * self.keys + self.fillers

    @property
    def outputs(self) -> int:
        return 2 * self.keys + self.fillers

    @property
    def chance(self) -> float:
        """Return the share of one who names a value of the context at random, without reading the question."""
        return 1 / self.pairs

    def draw(
        self, count: int, generator: torch.Generator, length: int | None = None, depth: float | None = None
    ) -> Batch:
        """Draw sequences.

        Args:
            count: B.
            generator: of the device of the sequences.
            length: T; the task's if not given.
            depth: place of the pair that is asked for, 0 at the beginning to 1 before the question; the other pairs
                are anywhere. Any place if not given.
        """
        length, n = length or self.length, self.pairs
        random: dict[str, Any] = {"generator": generator, "device": generator.device}
        inputs = torch.randint(2 * self.keys, self.inputs, (count, length), **random)
        keys = torch.rand(count, self.keys, **random).argsort(-1)[:, :n]
        values = self.keys + torch.rand(count, self.keys, **random).argsort(-1)[:, :n]
        # Without the second token of every pair there are length - 1 - n places, of which the pairs take n.
        free = length - 1 - n
        scores = torch.rand(count, free, **random)
        if depth is not None:
            scores[:, round(depth * (free - 1))] = -1
        chosen = scores.argsort(-1)[:, :n]  # of the pair that is asked for first, if `depth` is given
        rank = (chosen[:, :, None] > chosen[:, None]).sum(-1)
        places = chosen + rank
        inputs.scatter_(1, places, keys)
        inputs.scatter_(1, places + 1, values)
        pick = torch.zeros(count, 1, dtype=torch.long, device=generator.device)
        if depth is None:
            pick = torch.randint(n, (count, 1), **random)
        inputs[:, -1:] = keys.gather(1, pick)
        targets = torch.zeros_like(inputs)
        targets[:, -1:] = values.gather(1, pick)
        return Batch(inputs, targets, _last(inputs))


@dataclass(frozen=True)
class RunningSum:
    """The sum of all digits so far modulo m, asked at every position; parity for m = 2.

    Args:
        modulus: m, at least 2; digits are 0 to m - 1.
        length: T.
    """

    modulus: int = 2
    length: int = 32

    vectors = False
    last_only = False

    def __post_init__(self) -> None:
        if self.modulus < 2 or self.length < 1:
            raise ValueError(f"modulus must be at least 2 and length at least 1, got {self.modulus} and {self.length}")

    @property
    def inputs(self) -> int:
        return self.modulus

    @property
    def outputs(self) -> int:
        return self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def draw(self, count: int, generator: torch.Generator, length: int | None = None, first: int = 0) -> Batch:
        """Draw sequences, of another length if given, in which positions from `first` on are asked."""
        size = (count, length or self.length)
        inputs = torch.randint(self.modulus, size, generator=generator, device=generator.device)
        asked = torch.zeros_like(inputs, dtype=torch.bool)
        asked[:, first:] = True
        return Batch(inputs, inputs.cumsum(1) % self.modulus, asked)


def _last(inputs: Tensor) -> Tensor:
    """Return a (B, T) mask of the last positions."""
    asked = torch.zeros_like(inputs, dtype=torch.bool)
    asked[:, -1] = True
    return asked
