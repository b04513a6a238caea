"""Bars for the kernels, their verdicts, and the report at the end of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kernel_cases import EAGER, FORWARD, GRAPH, HEADLINE, TRAINING

Row = dict[str, Any]

MEASURED, NOT_MEASURED, REFUSED = "measured", "not measured", "refused"
# Lengths from which an exponent is fitted: below, launches take much of the time.
FIT_FROM = 8192
MEMORY_BOUND = ("causal_conv1d", "rms_norm", "rms_norm_gated", "add_rms_norm")


@dataclass(frozen=True)
class Bar:
    """A number to reach.

    Attributes:
        name: what the report calls it.
        applies: whether it is about a case, given as one of its rows.
        peer: how the names of the peers begin that it compares with; None: it is about our row.
        value: reads the number from a measured row.
        limit: to reach.
        at_most: whether the limit is an upper one.
        stretch: a better number that is hoped for.
    """

    name: str
    applies: Callable[[Row], bool]
    peer: str | None
    value: Callable[[Row], float | None]
    limit: float
    at_most: bool = True
    stretch: float | None = None


def _ratio(row: Row) -> float:
    return row["ratio"]["median"]


def _ssd(mode: str, *lengths: int) -> Callable[[Row], bool]:
    """Return cases of the headline's shape."""

    def applies(row: Row) -> bool:
        wide = row["op"] == "ssd" and row["mode"] == mode and row["dtype"] == "bfloat16"
        return wide and row["sizes"] in [{**HEADLINE, "L": length} for length in lengths]

    return applies


def _scan(longest: float = math.inf) -> Callable[[Row], bool]:
    def applies(row: Row) -> bool:
        return row["op"] == "selective_scan" and row["mode"] == TRAINING and row["sizes"]["L"] <= longest

    return applies


BARS = (
    Bar("SSD forward / mamba_ssm", _ssd(FORWARD, 8192), "mamba_ssm", _ratio, 0.6, stretch=0.35),
    Bar("SSD forward+backward / mamba_ssm", _ssd(TRAINING, 8192), "mamba_ssm", _ratio, 0.6),
    Bar("SSD forward, L <= 512 / mamba_ssm", _ssd(FORWARD, 256, 512), "mamba_ssm", _ratio, 0.33),
    Bar("selective scan forward+backward / CUDA kernel", _scan(), "mamba_ssm", _ratio, 1.0),
    Bar("selective scan forward+backward / unfused torch", _scan(4096), "unfused torch", _ratio, 1 / 20),
    Bar(
        "bytes per second / copy",
        lambda row: row["op"] in MEMORY_BOUND,
        None,
        lambda row: row["fraction_of_copy"],
        0.8,
        at_most=False,
    ),
    Bar(
        "selected-query attention / FlexAttention",
        lambda row: row["op"] == "window_attention",
        "FlexAttention",
        _ratio,
        0.5,
    ),
    Bar(
        "masked mixing forward+backward, L >= 1024 / cuBLAS of tril(W)",
        lambda row: row["op"] == "masked_mix" and row["mode"] == TRAINING and row["sizes"]["L"] >= 1024,
        "cuBLAS",
        _ratio,
        0.65,
    ),
    Bar("decode step / mamba_ssm", lambda row: row["mode"] in (EAGER, GRAPH), "mamba_ssm", _ratio, 0.7),
    Bar(
        "peak memory / (inputs + outputs + chunk states)",
        lambda row: row["op"] in ("ssd", "selective_scan"),
        None,
        lambda row: row["memory_ratio"],
        1.2,
    ),
)


def judge(row: Row) -> list[Row]:
    """Return the bars that apply to a row, with value and verdict: "pass", "fail" or "not measured"."""
    found = []
    for bar in BARS:
        subject = row["peer"] is None if bar.peer is None else (row["peer"] or "").startswith(bar.peer)
        if not (row["full"] and subject and bar.applies(row)):
            continue
        value = bar.value(row) if row["status"] == MEASURED else None
        verdict = NOT_MEASURED
        if value is not None:
            verdict = "pass" if (value <= bar.limit if bar.at_most else value >= bar.limit) else "fail"
        elif row["status"] == REFUSED and row["peer"] is None:
            verdict = "fail"
        found.append(
            {
                "bar": bar.name,
                "limit": bar.limit,
                "at_most": bar.at_most,
                "stretch": bar.stretch,
                "value": value,
                "verdict": verdict,
            }
        )
    return found


def summarise(rows: Iterable[Row]) -> list[Row]:
    """Return one entry per bar and case: the worst for us over the settings of a peer."""
    entries: dict[tuple[str, str], Row] = {}
    for row in rows:
        for bar in row.get("bars", ()):
            key = (bar["bar"], row["case"])
            entry = bar | {"case": row["case"], "reason": row.get("reason")}
            held = entries.get(key)
            if held is None or held["value"] is None or _worse(entry, held):
                entries[key] = entry if held is None or entry["value"] is not None else held
    order = {bar.name: index for index, bar in enumerate(BARS)}
    return sorted(entries.values(), key=lambda entry: order[entry["bar"]])


def _worse(entry: Row, held: Row) -> bool:
    return entry["value"] is not None and (entry["value"] > held["value"]) == entry["at_most"]


def exponents(rows: Iterable[Row]) -> list[Row]:
    """Fit value = c L^k over the lengths from `FIT_FROM`, per op, mode and shape: k of our time and of our memory."""
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        if (
            row["status"] == MEASURED
            and "seconds" in row
            and row["peer"] is None
            and row["sizes"].get("L", 0) >= FIT_FROM
        ):
            shape = " ".join(f"{symbol}{size}" for symbol, size in row["sizes"].items() if symbol != "L")
            sweeps.setdefault(f"{row['op']} {row['mode']} {shape} {row['dtype']}", []).append(row)
    fits = []
    for name, sweep in sweeps.items():
        if len(sweep) < 3:
            continue
        lengths = [math.log(row["sizes"]["L"]) for row in sweep]
        fit: Row = {"sweep": name, "lengths": sorted(row["sizes"]["L"] for row in sweep)}
        for field, read in (("time", lambda row: row["seconds"]["median"]), ("memory", lambda row: row["peak_bytes"])):
            values = [read(row) for row in sweep]
            fit[field] = (
                None if None in values else statistics.linear_regression(lengths, [*map(math.log, values)]).slope
            )
        fits.append(fit)
    return fits


def report(rows: list[Row]) -> str:
    """Return the run as Markdown: bars, fitted exponents and every measured comparison."""
    lines = ["| bar | case | value | limit | verdict |", "|---|---|---:|---:|---|"]
    missing: dict[tuple[str, str], int] = {}
    for entry in summarise(rows):
        sign = "<=" if entry["at_most"] else ">="
        stretch = f" (stretch {entry['stretch']:.2g})" if entry["stretch"] else ""
        limit = f"{sign} {entry['limit']:.2g}{stretch}"
        if entry["value"] is None:
            key = (f"{entry['bar']} | %s | | {limit}", f"{entry['verdict']}: {entry['reason']}")
            missing[key] = missing.get(key, 0) + 1
        else:
            lines.append(f"| {entry['bar']} | {entry['case']} | {entry['value']:.3f} | {limit} | {entry['verdict']} |")
    for (bar, verdict), count in missing.items():
        lines.append(f"| {bar % f'{count} case(s)'} | {verdict} |")
    fits = exponents(rows)
    if fits:
        lines += ["", f"| sweep, L >= {FIT_FROM} | time ~ L^k, k | memory, k |", "|---|---:|---:|"]
        for fit in fits:
            lines.append(f"| {fit['sweep']} | {fit['time']:.3f} | {_number(fit['memory'])} |")
    lines += ["", "| case | side | median (ms) | ours / peer | error |", "|---|---|---:|---:|---:|"]
    for row in rows:
        if row["status"] == MEASURED and "seconds" in row:
            ratio = f"{_ratio(row):.3f}" if row["peer"] else ""
            lines.append(
                f"| {row['case']} | {row['peer'] or 'ours'} | {1000 * row['seconds']['median']:.4g} | {ratio} | "
                f"{_number(row['error'], '.1e')} |"
            )
        elif row["status"] == REFUSED:
            lines.append(f"| {row['case']} | {row['peer'] or 'ours'} | {row['status']}: {row['reason']} | | |")
    return "\n".join(lines)


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)
