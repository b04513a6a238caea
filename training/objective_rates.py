"""The rates of a mixture of objectives: fixed, or chosen by a bandit from how the losses fall.

Source: Birdie (arXiv 2411.01030), section 4 and its published code. At a decision every objective with a mean training
loss over the steps since the last decision (new) and over those before (old) gets the reward

    r = clip(-100 e tanh(sqrt(new old) (d / old)^3 e), -1, 1),   d = new - old,   e = Euler's number,

which is positive where the loss falls. Birdie fits a network (4 layers of width 256) to rewards of mixtures and takes
the best of 4,096 random ones. Here each objective has one number, the exponential mean of its rewards Q, and the rates
are x p + (1 - x) softmax(Q / temperature), with the given rates p and the share x of exploration, which falls from its
first value to its second by a cosine over the first half of the steps. A run of a few thousand steps has a dozen
decisions, one reward per objective each: too few to fit a network to, and every number here can be read in the report.
There is nothing random in a decision, so a resumed run decides the same.

A decision after step s applies from the rows of step s + 2 on: those of step s + 1 may have been read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .objective_settings import ObjectiveMix


def reward(old: float, new: float) -> float:
    """Return the reward in [-1, 1] of an objective whose loss went from `old` (> 0) to `new`."""
    change = math.sqrt(max(new, 0.0) * old) * ((new - old) / old) ** 3 * math.e
    return min(max(-100 * math.e * math.tanh(change), -1.0), 1.0)


class Rates:
    """The rates of a mixture during a training.

    Args:
        mix: the mixture.
        steps: optimiser steps of the whole training.
    """

    def __init__(self, mix: ObjectiveMix, steps: int) -> None:
        self._mix, self._steps, count = mix, steps, len(mix.objectives)
        self._decisions: list[dict[str, Any]] = [{"from": 0, "rates": mix.rates}]
        self._values: list[float] = [0.0] * count
        self._last: list[float | None] = [None] * count
        self._sums, self._counts = [0.0] * count, [0.0] * count

    def at(self, step: int) -> list[float]:
        """Return the rates of the rows of a step, counted from 0."""
        return next(decision["rates"] for decision in reversed(self._decisions) if decision["from"] <= step)

    def add(self, sums: Sequence[float], counts: Sequence[float]) -> None:
        """Add a step's sums of losses, and numbers of targets, by objective."""
        self._sums = [total + part for total, part in zip(self._sums, sums, strict=True)]
        self._counts = [total + part for total, part in zip(self._counts, counts, strict=True)]

    def end_of_step(self, done: int) -> None:
        """Decide, if a decision is due after `done` optimiser steps."""
        bandit = self._mix.bandit
        if bandit is None or not bandit.decides(done, self._steps):
            return
        for index, (total, count) in enumerate(zip(self._sums, self._counts, strict=True)):
            if not count:
                continue  # without a sample since the last decision
            new, old = total / count, self._last[index]
            if old is not None and old > 0:
                value = reward(old, new)
                self._values[index] = bandit.memory * self._values[index] + (1 - bandit.memory) * value
            self._last[index] = new
        self._sums, self._counts = [0.0] * len(self._sums), [0.0] * len(self._counts)
        begin, end = bandit.exploration
        progress = min(2 * done / self._steps, 1.0)
        explored = end + (begin - end) * (1 + math.cos(math.pi * progress)) / 2
        best = max(self._values)
        weights = [math.exp((value - best) / bandit.temperature) for value in self._values]
        rates = [
            explored * given + (1 - explored) * weight / sum(weights)
            for given, weight in zip(self._mix.rates, weights, strict=True)
        ]
        self._decisions.append({"from": done + 1, "rates": rates})

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed training needs, as values that JSON represents exactly."""
        own = {"decisions": self._decisions, "values": self._values, "last": self._last}
        return {**own, "sums": self._sums, "counts": self._counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Set everything to what :meth:`state` returned."""
        self._decisions, self._values, self._last = state["decisions"], state["values"], state["last"]
        self._sums, self._counts = state["sums"], state["counts"]
