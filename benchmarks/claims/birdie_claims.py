"""Birdie's claims (arXiv 2411.01030) at the size of `birdie.py`, and their verdicts from its summary alone."""

from __future__ import annotations

from typing import Any

from birdie_task import BANDIT, BLIND, CAUSAL, FIXED, NEXT, PREFIX
from synthetic_claims import Above, Bound, Claim, Condition

PAPER = "arXiv 2411.01030"
LEARNT = 5.0
"""Times the chance of a number of the book: at this accuracy an arm has learnt to look up."""


def claims(summary: dict[str, Any]) -> list[Claim]:
    """Return the claims about every number of entries of a summary.

    A control: one of the two arms has learnt to look up, which a Bound on the better one states.
    """
    found = []
    pairs = (
        ("mix", f"{FIXED}, {CAUSAL}", f"{NEXT}, {CAUSAL}", "The fixed mixture looks up more numbers than next tokens"),
        ("bandit", f"{BANDIT}, {CAUSAL}", f"{FIXED}, {CAUSAL}", "The bandit's rates are better than the fixed ones"),
        ("birdie", f"{BANDIT}, {PREFIX}", f"{NEXT}, {CAUSAL}", "Birdie (bandit, both directions) beats next tokens"),
        ("directions", f"{BANDIT}, {PREFIX}", f"{BANDIT}, {CAUSAL}", "Inputs in both directions help the bandit"),
    )
    for size, chance in summary["chance"].items():
        for name, arm, other, text in pairs:
            # The control only has to name an arm with results: without results the verdict is "not run".
            better = max((arm, other), key=lambda one: summary["arms"].get(one, {}).get(size, {"mean": 0.0})["mean"])
            control: Condition = Bound(size, better, "fresh", least=LEARNT * chance[BLIND])
            found.append(
                Claim(
                    f"{name}-{size}",
                    PAPER,
                    f"{text}, {size} entries.",
                    expected=(Above(size, arm, other, "fresh"),),
                    contrary=(Above(size, other, arm, "fresh"),),
                    controls=(control,),
                )
            )
    return found


def verdicts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict on each claim (`synthetic_claims`): every seed of an arm has to be above every other one."""
    results = {
        (size, arm): [{"tests": {"fresh": value}} for value in of[size]["seeds"]]
        for arm, of in summary["arms"].items()
        for size in summary["chance"]
    }
    return [claim.verdict(results) for claim in claims(summary)]
