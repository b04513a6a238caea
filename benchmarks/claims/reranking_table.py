"""Table and verdicts of `reranking.py`, computed from the rows of one corpus alone.

All tests are paired, on the value of each query averaged over an arm's seeds (`ssm_zoo.evaluation.significance`), with
Holm's correction over the arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from reranking_speed import TRANSFORMER
from synthetic_claims import CONFIRMED, REFUTED, UNDECIDED

from ssm_zoo.evaluation.significance import compare, holm

BIDIRECTIONAL = " bidirectional"
MEASURES = ("ndcg@10", "mrr@10", "map")
BM25, RANDOM = "BM25", "random order"
LEVEL = 0.05
MARGIN = 0.05
"""Loss of nDCG@10 below which an arm counts as competitive."""

Rows = list[dict[str, Any]]


def arms_of(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each arm."""
    arms: dict[str, Rows] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def query_means(rows: Rows, measure: str = "ndcg@10") -> dict[str, dict[str, float]]:
    """Return the values by query of BM25, of its lists in random order, and of each arm, averaged over its seeds."""
    means = {BM25: rows[0]["bm25_by_query"][measure], RANDOM: rows[0]["random_by_query"][measure]}
    for arm, own in arms_of(rows).items():
        values = [row["by_query"][measure] for row in own]
        means[arm] = {query: mean(of[query] for of in values) for query in values[0]}
    return means


def reference_of(arm: str, rows: Rows, pretrained: str | None) -> str | None:
    """Return the arm that an arm is compared with, if it has rows: the Transformer, or the first pretrained model."""
    from_scratch = next(row for row in rows if row["arm"] == arm)["pretrain_steps"] > 0
    wanted = TRANSFORMER if from_scratch else pretrained
    return wanted if wanted != arm and wanted in arms_of(rows) else None


def tests_of(rows: Rows, pretrained: str | None, measure: str = "ndcg@10") -> dict[str, dict[str, dict[str, Any]]]:
    """Return by baseline ("BM25", "random order", "reference") and arm the result of `compare` with "p_holm"."""
    means = query_means(rows, measure)
    found: dict[str, dict[str, dict[str, Any]]] = {BM25: {}, RANDOM: {}, "reference": {}}
    for arm in arms_of(rows):
        peers = {BM25: BM25, RANDOM: RANDOM, "reference": reference_of(arm, rows, pretrained)}
        for name, peer in peers.items():
            if peer is not None:
                found[name][arm] = compare(means[arm], means[peer])
    for of in found.values():
        corrected = holm([row["p_randomisation"] for row in of.values()])
        for row, p in zip(of.values(), corrected, strict=True):
            row["p_holm"] = p
    return found


def table_of(corpus: str, rows: Rows, pretrained: str | None = None) -> str:
    """Return a Markdown table of a corpus: means and ranges over the seeds, and corrected p-values.

    Args:
        corpus: name of the corpus.
        rows: its rows.
        pretrained: name of the pretrained model with which others are compared.
    """
    tests = {measure: tests_of(rows, pretrained, measure) for measure in MEASURES[:2]}
    first = rows[0]
    lines = [
        f"{corpus}: {first['queries']} test queries; p of nDCG@10 / MRR@10, by randomisation, Holm's correction",
        "| arm | parameters | rate | nDCG@10 | MRR@10 | MAP | p against BM25 | p against the reference | pairs/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, key in ((BM25, "bm25"), (f"{RANDOM} of its list (chance)", "random")):
        lines.append(f"| {name} | | | {' | '.join(f'{first[key][one]:.3f}' for one in MEASURES)} | | | |")
    for arm, own in arms_of(rows).items():
        cells = [f"{own[0]['parameters']:,}", f"{own[0]['rate']:g}"]
        for name in MEASURES:
            values = [row[name] for row in own]
            cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        for baseline in (BM25, "reference"):
            of = [tests[measure][baseline].get(arm) for measure in MEASURES[:2]]
            cells.append(" / ".join(f"{test['p_holm']:.3f}" for test in of if test is not None))
        # A group has a positive and up to 7 negatives.
        pairs = [8 * row["steps"] * row["batch"] / row["training_seconds"] for row in own]
        lines.append(f"| {arm} | {' | '.join(cells)} | {mean(pairs):.1f} |")
    return "\n".join(lines)


def verdict_of(test: Mapping[str, Any], learnt: bool) -> str:
    """Return the verdict on "competitive": not more than `MARGIN` of nDCG@10 below the reference.

    Args:
        test: comparison of the arm with the reference.
        learnt: whether the reference ranks better than chance; without that there is nothing to compare.
    """
    if not learnt:
        return UNDECIDED
    if test["p_holm"] < LEVEL and test["difference"] < 0:
        return REFUTED
    return CONFIRMED if test["low"] > -MARGIN else UNDECIDED


def verdicts_of(corpus: str, rows: Rows, pretrained: str | None = None) -> str:
    """Return a line for each arm: whether it beats chance and BM25, and is competitive with its reference."""
    tests = tests_of(rows, pretrained)

    def place(arm: str, baseline: str) -> str:
        test = tests[baseline][arm]
        if test["p_holm"] >= LEVEL:
            return "not apart from"
        return "above" if test["difference"] > 0 else "below"

    lines = []
    for arm in arms_of(rows):
        facts = [f"{place(arm, name)} {name}" for name in (RANDOM, BM25)]
        test = tests["reference"].get(arm)
        if test is not None:
            reference = reference_of(arm, rows, pretrained)
            assert reference is not None
            learnt = place(reference, RANDOM) == "above"
            difference = f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})"
            said = f"competitive with {reference}: {verdict_of(test, learnt)}, nDCG@10 {difference}"
            facts.append(said if learnt else f"{said}; {reference} itself is not above {RANDOM}")
        lines.append(f"{corpus}, {arm}: {'; '.join(facts)}")
    return "\n".join(lines)
