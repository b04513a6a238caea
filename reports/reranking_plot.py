"""The figure of an evaluation of rerankers: measures of every system, with intervals."""

from pathlib import Path
from typing import Any

from ..harness.whole_files import write_whole
from .plot_style import BLUE, GREEN, GREY, LABEL, ORANGE, TICK, TITLE, new_figure

_NAMES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map": "MAP", "recall@10": "recall@10"}
_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00")


def write_reranking_plot(report: dict[str, Any], path: Path) -> None:
    """Draw a bar for every system and measure, with its 95 % interval, into a PNG file, never seen half-written.

    Args:
        report: results of `ssm-zoo evaluate rerank`: "systems" by name, each with its measures and "intervals", and
            "first_stage", the name of the system that made the lists, which is drawn in grey.
        path: the file.
    """
    systems: dict[str, Any] = report["systems"]
    figure = new_figure(max(7.0, 1.6 * len(systems) + 4.0), 4.4)
    axes = figure.subplots()
    width = 0.8 / len(systems)
    colors = iter(_COLORS * (1 + len(systems) // len(_COLORS)))
    for index, (name, measured) in enumerate(systems.items()):
        color = GREY if name == report["first_stage"] else next(colors)
        places = [place + (index - (len(systems) - 1) / 2) * width for place in range(len(_NAMES))]
        values = [measured[key] for key in _NAMES]
        limits = [measured["intervals"][key] for key in _NAMES]
        below = [max(value - low, 0.0) for value, (low, _) in zip(values, limits, strict=True)]
        above = [max(high - value, 0.0) for value, (_, high) in zip(values, limits, strict=True)]
        axes.bar(places, values, width, color=color, label=name.replace("$", r"\$"))
        axes.errorbar(places, values, yerr=[below, above], color="black", capsize=2, linewidth=1, linestyle="none")
    axes.set_xticks(range(len(_NAMES)), list(_NAMES.values()), fontsize=LABEL)
    axes.tick_params(axis="y", labelsize=TICK)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    title = f"{report['queries']:,} queries, {report['settings']['depth']:,} documents of {report['first_stage']} each"
    axes.set_title(title, fontsize=TITLE, parse_math=False)
    figure.legend(loc="outside lower center", ncols=min(4, len(systems)), fontsize=TICK)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))
