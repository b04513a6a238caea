"""Claims of papers and their verdicts, computed from the rows of results alone.

A claim is confirmed if its controls and all that it expects hold, refuted if its controls hold and something contrary
does, and undecided otherwise, e.g. where a control has not learned its task either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

CONFIRMED, REFUTED, UNDECIDED, NOT_RUN = "confirmed", "refuted", "undecided", "not run"
# Rows of the results of a task and an arm, one a seed.
Found = Mapping[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Bound:
    """A bound on an arm's score in a test, which two of three seeds have to keep.

    Args:
        task: name of the task.
        arm: the arm.
        test: the test.
        least: the score is at least this, if given.
        most: the score is at most this, if given.
    """

    task: str
    arm: str
    test: str
    least: float | None = None
    most: float | None = None

    def holds(self, found: Found) -> bool | None:
        """Return whether the bound is kept; None without results."""
        scores = scores_of(found, self.task, self.arm, self.test)
        if not scores:
            return None
        kept = [
            (self.least is None or score >= self.least) and (self.most is None or score <= self.most)
            for score in scores
        ]
        return 3 * sum(kept) >= 2 * len(kept)

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        limits = [f"{words} {bound:.3g}" for words, bound in bounds if bound is not None]
        return f"{self.arm} {' and '.join(limits)} in {self.task}, {self.test}"


@dataclass(frozen=True)
class Above:
    """One arm's score is above another's: every seed of it is above every seed of the other.

    Args:
        task: name of the task.
        arm: the arm.
        other: the arm below.
        test: the test.
        margin: least difference of the means.
    """

    task: str
    arm: str
    other: str
    test: str
    margin: float = 0.0

    def holds(self, found: Found) -> bool | None:
        """Return whether the arm is above; None without results of both."""
        ours, theirs = (scores_of(found, self.task, arm, self.test) for arm in (self.arm, self.other))
        if not ours or not theirs:
            return None
        return min(ours) > max(theirs) and mean(ours) - mean(theirs) >= self.margin

    def __str__(self) -> str:
        return f"{self.arm} above {self.other} in {self.task}, {self.test}, by {self.margin:.3g} on average"


@dataclass(frozen=True)
class NearBaseline:
    """An arm's squared error is at most `factor` times the estimator's, with two of three seeds.

    Args:
        task: name of the task, whose score is 1 minus the error in parts of the variance.
        arm: the arm.
        test: the test.
        factor: largest ratio of the errors; the condition is the contrary if `reverse`.
        reverse: the error is larger.
    """

    task: str
    arm: str
    test: str
    factor: float
    reverse: bool = False

    def holds(self, found: Found) -> bool | None:
        """Return whether the errors are so; None without results."""
        rows = found.get((self.task, self.arm), [])
        if not rows:
            return None
        kept = [
            (1 - row["tests"][self.test] <= self.factor * (1 - row["baseline"][self.test])) != self.reverse
            for row in rows
        ]
        return 3 * sum(kept) >= 2 * len(kept)

    def __str__(self) -> str:
        relation = "more than" if self.reverse else "at most"
        return f"{self.arm}'s error {relation} {self.factor:.3g} times the estimator's in {self.task}, {self.test}"


Condition = Bound | Above | NearBaseline


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        name: a name for tables.
        source: the paper.
        text: the claim in words, at the size that is run.
        expected: what has to hold for it to be confirmed.
        contrary: what refutes it, one being enough.
        controls: what has to hold for the runs to say anything.
    """

    name: str
    source: str
    text: str
    expected: tuple[Condition, ...]
    contrary: tuple[Condition, ...]
    controls: tuple[Condition, ...] = ()

    def verdict(self, found: Found) -> dict[str, Any]:
        """Return the claim's `verdict` and the conditions that failed (`because`)."""
        about = {"claim": self.name, "source": self.source, "text": self.text}
        conditions = (*self.controls, *self.expected, *self.contrary)
        if any(condition.holds(found) is None for condition in conditions):
            missing = sorted({f"{c.task}, {c.arm}" for c in conditions if c.holds(found) is None})
            return {**about, "verdict": NOT_RUN, "because": [f"no results of {pair}" for pair in missing]}
        failed = [f"control failed: {condition}" for condition in self.controls if not condition.holds(found)]
        if failed:
            return {**about, "verdict": UNDECIDED, "because": failed}
        against = [f"found: {condition}" for condition in self.contrary if condition.holds(found)]
        if against:
            return {**about, "verdict": REFUTED, "because": against}
        missed = [f"not found: {condition}" for condition in self.expected if not condition.holds(found)]
        return {**about, "verdict": UNDECIDED if missed else CONFIRMED, "because": missed}


def scores_of(found: Found, task: str, arm: str, test: str) -> list[float]:
    """Return the scores of an arm's seeds in a test."""
    return [row["tests"][test] for row in found.get((task, arm), []) if test in row["tests"]]
