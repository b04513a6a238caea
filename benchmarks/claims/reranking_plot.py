"""Draw a result file of `reranking.py`: nDCG@10 and MRR@10 of each arm by corpus, beside BM25 and chance."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from reranking_table import arms_of


def draw_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows that are compared into `path`: bars are means over the seeds, points are seeds."""
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    figure, axes = plt.subplots(len(corpora), 2, figsize=(11, 3.6 * len(corpora)), squeeze=False)
    for line, corpus in zip(axes, corpora, strict=True):
        own = [row for row in rows if row["corpus"] == corpus]
        for axis, measure in zip(line, ("ndcg@10", "mrr@10"), strict=True):
            _bars(axis, own, measure)
            axis.set_title(f"{corpus}, {own[0]['queries']} test queries")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Axes, rows: list[dict[str, Any]], measure: str) -> None:
    arms = arms_of(rows)
    for place, own in enumerate(arms.values()):
        values = [row[measure] for row in own]
        axis.barh(place, mean(values), color=f"C{place % 10}", alpha=0.6)
        axis.plot(values, [place] * len(values), "k.", markersize=5)
    axis.axvline(rows[0]["bm25"][measure], color="black", linestyle="--", label="BM25")
    axis.axvline(rows[0]["random"][measure], color="grey", linestyle=":", label="its list in random order")
    axis.set_yticks(range(len(arms)), list(arms))
    axis.set_ylim(len(arms) - 0.4, -1.6)  # the first arm on top, with room for the legend
    axis.set_xlabel({"ndcg@10": "nDCG@10", "mrr@10": "MRR@10"}[measure])
    axis.legend(fontsize="x-small", loc="upper left", ncols=2)
    axis.grid(alpha=0.3, axis="x")
