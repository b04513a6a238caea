"""Rows of samples of several training objectives: endless for training, or a fixed number of one objective.

The rows of an optimiser step are made together, from the texts behind those of the step before, with random choices
that depend on the seed and the number of the step alone, at the rates of that step. A position is therefore the number
of a step and a place in the texts, and a resumed training makes the same rows.

The texts of a pass are in an order of their own. A sample takes as many tokens of a text as the room in its row allows,
the next one goes on behind it.

Every objective that is drawn gets its sample, so that the rates are the shares of the samples whatever the lengths of
the texts. If a text is too short for the objective, the sample is made of the next text that is long enough, and the
short one waits for another objective. If the room in the row is too small, the row is closed, and the sample is the
first of the next row.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .objective_settings import ObjectiveMix
from .objectives import ObjectiveTokens, Sample, least, make_sample
from .packing import IGNORED, Row
from .stream import PositionedRows

_ROOM = 8
"""Room in tokens below which a row is closed."""
_WAITING = 256
"""Texts that wait for an objective for which they are long enough. If there are more, the one that was read first is
passed over until the next pass."""
_BEGINNING: dict[str, Any] = {"pass": 0, "read": 0, "waiting": [], "drawn": None}


class _Reader:
    """A place in texts that are read in passes, each in its own order.

    Args:
        texts: the texts.
        seed: seed of the orders.
        place: value of :attr:`place` to go on from.

    Attributes:
        drawn: number of an objective whose sample had no room in the last row, or None.
    """

    def __init__(self, texts: Sequence[list[int]], seed: int, place: dict[str, Any]) -> None:
        self._texts, self._seed = texts, seed
        self._pass, self._read, self.drawn = place["pass"], place["read"], place["drawn"]
        # The number of each text that has tokens left, and of the first of them.
        self._waiting: list[tuple[int, int]] = [(text, offset) for text, offset in place["waiting"]]
        self._order = self._shuffled()

    @property
    def place(self) -> dict[str, Any]:
        """The place, as values that JSON can represent."""
        waiting = [list(rest) for rest in self._waiting]
        return {"pass": self._pass, "read": self._read, "waiting": waiting, "drawn": self.drawn}

    def find(self, tokens: int) -> int:
        """Return the index of the first waiting text that has so many tokens left, after reading on if none has."""
        for index, (text, offset) in enumerate(self._waiting):
            if len(self._texts[text]) - offset >= tokens:
                return index
        while True:
            if self._read == len(self._order):
                self._pass, self._read = self._pass + 1, 0
                self._order = self._shuffled()
            text = self._order[self._read]
            self._read += 1
            self._waiting = [*self._waiting[-_WAITING + 1 :], (text, 0)]
            if len(self._texts[text]) >= tokens:
                return len(self._waiting) - 1

    def text(self, index: int) -> list[int]:
        """Return what is left of a waiting text."""
        text, offset = self._waiting[index]
        return self._texts[text][offset:]

    def use(self, index: int, tokens: int) -> None:
        """Go on behind some tokens of a waiting text, which no longer waits if fewer than two remain."""
        text, offset = self._waiting[index]
        rest = [(text, offset + tokens)] if len(self._texts[text]) - offset - tokens > 1 else []
        self._waiting[index : index + 1] = rest

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._texts)))
        _random(self._seed, "pass", self._pass).shuffle(order)
        return order


class ObjectiveStream(PositionedRows):
    """Rows of all objectives of a mixture.

    Args:
        documents: (length,) token ids of each text; shorter ones than two tokens are left out.
        mix: the mixture.
        tokens: ids of the objectives' tokens.
        budget: maximum number of tokens of a row.
        step_rows: rows of an optimiser step, of all processes.
        seed: seed of all random choices.
        prefixes: whether rows have a `prefix_mask`.

    Attributes:
        rates: returns the rates of the rows of a step; the mixture's own until it is replaced.

    Raises:
        ValueError: if the rows, or all texts, are too short for one of the objectives.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        mix: ObjectiveMix,
        tokens: ObjectiveTokens,
        budget: int,
        *,
        step_rows: int,
        seed: int,
        prefixes: bool,
    ) -> None:
        self._texts = [document.tolist() for document in documents if len(document) > 1]
        self._mix, self._tokens, self._budget, self._prefixes = mix, tokens, budget, prefixes
        self._step_rows, self._seed = step_rows, seed
        self._start: dict[str, Any] = {"row": 0, "step": 0, "place": _BEGINNING}
        self._steps: deque[dict[str, Any]] = deque()
        self.rates: Callable[[int], list[float]] = lambda step: mix.rates
        self._least = [least(objective) for objective in mix.objectives]
        self._check()

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows from the position, by default from the beginning."""
        self._steps.clear()
        step, place = self._start["step"], self._start["place"]
        while True:
            self._steps.append({"step": step, "place": place})
            rows, place = self._rows(step, place, self.rates(step))
            yield from rows
            step += 1

    def position(self, row: int) -> dict[str, Any]:
        step = row // self._step_rows
        while len(self._steps) > 1 and self._steps[1]["step"] <= step:
            self._steps.popleft()
        found = self._steps[0] if self._steps else self._start
        if found["step"] != step:  # the loader has not asked for the step's first row yet
            place = self._rows(found["step"], found["place"], self.rates(found["step"]))[1]
            found = {"step": step, "place": place}
        return {**found, "row": row}

    def go_to(self, position: dict[str, Any]) -> None:
        if not isinstance(position["place"], dict):
            raise ValueError(
                "output folder: its checkpoint is of an earlier version, which made other samples of the objectives. "
                "Finish the run with the version that began it, or give another folder."
            )
        self._start = position

    def first(self, count: int) -> list[Row]:
        rows: list[Row] = []
        step, place = 0, _BEGINNING
        while len(rows) < count:
            made, place = self._rows(step, place, self._mix.rates)
            rows, step = [*rows, *made], step + 1
        return rows[:count]

    def of_one(self, objective: int, rows: int) -> FixedRows:
        """Return some rows of samples of one objective, to measure its loss."""
        rates = [float(index == objective) for index in range(len(self._mix.objectives))]
        reader, rng = _Reader(self._texts, self._seed, _BEGINNING), _random(self._seed, "objective", objective)
        return FixedRows([self._row(reader, rates, rng) for _ in range(rows)])

    def _check(self) -> None:
        """Raise ValueError if the rows, or all texts, are too short for one of the objectives."""
        longest = max((len(text) for text in self._texts), default=0)
        for name, (text, room) in zip(self._mix.names, self._least, strict=True):
            if self._budget < room:
                raise ValueError(
                    f"objectives: {name!r} needs rows of at least {room} tokens, got {self._budget}. Raise row_tokens, "
                    "or leave the objective out."
                )
            if longest < text:
                raise ValueError(
                    f"objectives: no text is long enough for {name!r}, which needs {text} tokens (the longest has "
                    f"{longest}). Leave the objective out, or give longer texts."
                )

    def _rows(self, step: int, place: dict[str, Any], rates: list[float]) -> tuple[list[Row], dict[str, Any]]:
        """Return the rows of a step, from a place in the texts, and the place behind them."""
        reader, rng = _Reader(self._texts, self._seed, place), _random(self._seed, "step", step)
        return [self._row(reader, rates, rng) for _ in range(self._step_rows)], reader.place

    def _row(self, reader: _Reader, rates: list[float], rng: random.Random) -> Row:
        samples: list[tuple[int, Sample]] = []
        room = self._budget
        while room >= _ROOM or not samples:
            if reader.drawn is None:
                (reader.drawn,) = rng.choices(range(len(rates)), rates)
            objective: int = reader.drawn
            shortest, smallest = self._least[objective]
            if room < smallest:
                break
            text = reader.find(shortest)
            sample = make_sample(self._mix.objectives[objective], reader.text(text), room, self._tokens, rng)
            assert sample is not None
            reader.use(text, sample.used)
            reader.drawn = None
            samples.append((objective, sample))
            room -= len(sample.ids)
        return self._packed(samples)

    def _packed(self, samples: Sequence[tuple[int, Sample]]) -> Row:
        """Concatenate samples into the (length,) tensors of a row."""
        lengths = torch.tensor([len(sample.ids) for _, sample in samples])
        ids = torch.tensor([token for _, sample in samples for token in sample.ids])
        position = torch.cat([torch.arange(length) for length in lengths.tolist()])
        prefix = torch.tensor([sample.prefix for _, sample in samples]).repeat_interleave(lengths)
        row = {
            "input_ids": ids,
            "labels": ids.masked_fill((position < prefix) | (position == 0), IGNORED),
            "seq_idx": torch.arange(len(samples), dtype=torch.int32).repeat_interleave(lengths),
            "position_ids": position,
            "objective": torch.tensor([objective for objective, _ in samples]).repeat_interleave(lengths),
        }
        return {**row, "prefix_mask": (position < prefix).long()} if self._prefixes else row


class FixedRows(Dataset):
    """Rows without the number of their objective, as a model takes them.

    Attributes:
        targets: number of tokens that are predicted.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [{key: value for key, value in row.items() if key != "objective"} for row in rows]
        self.targets = sum(int((row["labels"] != IGNORED).sum()) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


def _random(seed: int, use: str, number: int) -> random.Random:
    """Return a generator for one use; a hash keeps neighbouring seeds apart."""
    digest = hashlib.sha256(f"{seed}/{use}/{number}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))
