"""Claims about translation (arXiv 2407.05489) at the size of `translation.py`, and their verdicts from rows alone.

One arm is above another if every seed of it is above every seed of the other. "At least" is refuted by the contrary.
"""

from __future__ import annotations

import re
from statistics import mean
from typing import Any

from synthetic_claims import Above, Bound, Claim, Condition
from translation_arms import ARMS, DEFAULT, MAMBA

PAPER = "arXiv 2407.05489"
HYBRID, RETNET, TRANSFORMER = "mamba-mha", "retnet", "transformer"
LONGEST_NAME, LONGEST_SENTENCE = 8, 20
"""Names and sentences of the training of `synthetic`."""
NAMES, BLEU, LONG = "names", "BLEU", "BLEU of 5 and 10 sentences"
KEPT = "share of the BLEU of single sentences that is left for 10"
# A task is learnt from there on: names that are kept, BLEU.
LEARNT_NAMES, LEARNT_BLEU = 0.1, 5.0
CLOSE = 2.0
"""BLEU by which arms that are called competitive may differ."""


def cat(arm: str) -> str:
    """Return the name of an arm that is trained on concatenations."""
    return f"{arm}, CAT"


def names_kept(tests: dict[str, Any]) -> float:
    """Return the mean share of names that are kept in the tests that are no longer than training."""
    values = []
    for test, scores in tests.items():
        found = re.match(r"names of (\d+), (\d+) words", test)
        if found and int(found[1]) <= LONGEST_NAME and int(found[2]) <= LONGEST_SENTENCE:
            values.append(scores["entity_recall"])
    return mean(values) if values else 0.0


def scores_of_run(name: str, row: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a row that the claims are about."""
    tests = row["tests"]
    if name == "synthetic":
        return {NAMES: names_kept(tests)}
    if name == "length":
        long = [tests[test]["bleu"] for test in ("5 sentences", "10 sentences")]
        single = tests["1 sentences"]["bleu"]
        return {BLEU: single, LONG: mean(long), KEPT: long[-1] / single if single else 0.0}
    return {BLEU: mean(scores["bleu"] for test, scores in tests.items() if not test.endswith("sentences"))}


def _order(arm: str, other: str, *, strictly: bool) -> Claim:
    above: Condition = Above("synthetic", arm, other, NAMES)
    contrary: Condition = Above("synthetic", other, arm, NAMES)
    # Without an arm that has learnt to copy, an order says nothing.
    control = Bound("synthetic", HYBRID, NAMES, least=LEARNT_NAMES)
    words = "more unseen names than" if strictly else "at least as many unseen names as"
    text = f"{ARMS[arm]}: keeps {words} {ARMS[other]}."
    return Claim(f"names-{arm}-{other}", PAPER, text, (above,) if strictly else (), (contrary,), (control,))


def _competitive(task: str, arm: str) -> Claim:
    text = f"{task}: {ARMS[arm]} is at most {CLOSE:g} BLEU below the Transformer."
    contrary = Above(task, TRANSFORMER, arm, BLEU, margin=CLOSE)
    control = Bound(task, TRANSFORMER, BLEU, least=LEARNT_BLEU)
    return Claim(f"{task}-{arm}", PAPER, text, (), (contrary,), (control,))


def _lifted(arm: str) -> Claim:
    text = f"CAT-5 raises the BLEU of 5 and 10 sentences of {ARMS[arm]}."
    control = Bound("length", arm, BLEU, least=LEARNT_BLEU)
    expected, contrary = Above("length", cat(arm), arm, LONG), Above("length", arm, cat(arm), LONG)
    return Claim(f"cat-{arm}", PAPER, text, (expected,), (contrary,), (control,))


def _falls(arm: str) -> Claim:
    text = f"{ARMS[arm]}, trained on single sentences, loses half of its BLEU at 10."
    control = Bound("length", arm, BLEU, least=LEARNT_BLEU)
    expected, contrary = Bound("length", arm, KEPT, most=0.5), Bound("length", arm, KEPT, least=0.8)
    return Claim(f"falls-{arm}", PAPER, text, (expected,), (contrary,), (control,))


CLAIMS = {
    "synthetic": [
        _order(HYBRID, TRANSFORMER, strictly=False),
        _order(TRANSFORMER, MAMBA, strictly=True),
        _order(MAMBA, RETNET, strictly=True),
        _order(HYBRID, MAMBA, strictly=True),
    ],
    "en-de": [_competitive("en-de", arm) for arm in (MAMBA, HYBRID, RETNET)],
    "en-fr": [_competitive("en-fr", arm) for arm in (MAMBA, HYBRID, RETNET)],
    "length": [*map(_falls, DEFAULT), *map(_lifted, DEFAULT)],
}


def verdicts(compared: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the verdict on each claim about the tasks that were run.

    Args:
        compared: rows that are compared, by task of the command line.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, rows in compared.items():
        for row in rows:
            if "tests" in row:  # a run that diverged has none
                arm = row["arm"] if row["concatenate"] == 1 else cat(row["arm"])
                found.setdefault((name, arm), []).append({"tests": scores_of_run(name, row)})
    return [claim.verdict(found) for name in compared for claim in CLAIMS[name]]
