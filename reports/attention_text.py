"""The report of `ssm-zoo show` as a table in plain text, readable without a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["rollout_line", "stack_lines"]

_TITLES = {
    "layers": "",
    "encoder": "Encoder",
    "decoder": "Decoder",
    "cross": "Cross-attention, from decoder to encoder",
}
_MOST_HEADS = 12
_TOP = 5


def stack_lines(stack: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of a stack.

    Args:
        stack: output of `evaluation.attention_report.describe_stack`.
    """
    rows: Sequence[Mapping[str, Any]] = stack["layers"]
    paired = any("to_teacher" in row for row in rows)
    head = ["layer", "mixer", "heads", "distance", "first", "entropy"]
    cells = [[*head, *(["JS", "same top"] if paired else []), "entropy by head"]]
    for row in rows:
        means = [_pair(row, key, digits) for key, digits in (("distance", 1), ("first", 2), ("entropy", 2))]
        compared = row.get("to_teacher")
        if paired:
            means += ["", ""] if compared is None else [_number(compared["js"]["mean"], 3), _share(compared)]
        cells.append([str(row["layer"]), row["mixer"], f"{row['num_heads']:,}", *means, _by_head(row)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {1, len(widths) - 1}
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    title = _TITLES[stack["name"]]
    return [title, *lines] if title else lines


def rollout_line(shares: Sequence[float], tokens: Sequence[str], name: str) -> str:
    """Return a sentence on the input tokens of which the last token's output consists.

    Args:
        shares: last row of the rollout.
        tokens: the tokens' texts.
        name: of the model.
    """
    rest = sum(shares[1:])
    order = sorted(range(1, len(shares)), key=lambda place: -shares[place])[:_TOP]
    parts = [f"{shares[place] / rest:.0%} {tokens[place]!r} ({place})" for place in order if rest > 0]
    last = f"{tokens[-1]!r} ({len(tokens) - 1})"
    rested = ", ".join(parts) or "nothing"
    return f"Rollout of {name} to the last token {last}: {shares[0]:.1%} from the first token; of the rest {rested}."


def _pair(row: Mapping[str, Any], key: str, digits: int) -> str:
    """Return the mean of a statistic, with the teacher's behind a slash."""
    if key not in row:
        return "-"
    text = _number(row[key]["mean"], digits)
    return text if "teacher" not in row else f"{text} / {_number(row['teacher'][key]['mean'], digits)}"


def _by_head(row: Mapping[str, Any]) -> str:
    entropy = row["entropy"]
    if "heads" not in entropy:
        return " ".join(f"{name} {_number(entropy[name], 2)}" for name in ("min", "median", "max"))
    values = entropy["heads"]
    if len(values) <= _MOST_HEADS:
        return " ".join(_number(value, 1) for value in values)
    known = sorted(value for value in values if value is not None)
    return f"min {known[0]:.2f} max {known[-1]:.2f}" if known else "-"


def _share(compared: Mapping[str, Any]) -> str:
    value = compared["same_top"]["mean"]
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
