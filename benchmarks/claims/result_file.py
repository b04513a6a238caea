"""Parts that comparisons of trained models share: a result file that can be resumed, and the tuning search."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from circumstances import circumstances, write_rows


class ResultFile:
    """Rows of a result file, which is rewritten after each run, so that an interrupted comparison loses one run.

    Args:
        path: the file; where it exists its rows count as done.
        about: what every new row says of the machine (`circumstances`).
        minutes: after so many no further run is begun; None: no end.
    """

    def __init__(self, path: Path, about: dict[str, Any], minutes: float | None = None) -> None:
        self.path, self.about = path, about
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the first row that holds all of `wanted`; None if there is none."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def run(self, run: Any, execute: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of `run`, a dataclass whose fields tell it from all others: from the file, else by `execute`.

        Raises:
            SystemExit: if the run is not in the file and the time is up.
        """
        if found := self.find(dataclasses.asdict(run)):
            return found
        if self.end is not None and time.monotonic() > self.end:
            raise SystemExit(f"the minutes are over: continue with --resume {self.path}")
        return self.add({**dataclasses.asdict(run), **execute(run)})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a row."""
        self.rows.append({**row, **self.about})
        write_rows(self.rows, self.path)
        return self.rows[-1]

    def drop(self, stale: Callable[[dict[str, Any]], bool]) -> None:
        """Drop rows that have to be computed again, e.g. summaries; the file changes with the next row."""
        self.rows = [row for row in self.rows if not stale(row)]


def open_results(options: argparse.Namespace, script: str, arguments: list[str], *packages: str) -> ResultFile:
    """Return the result file that a command line continues (`options.resume`), or a new one in `options.output`.

    Args:
        options: the parsed command line; may have `minutes`.
        script: path of the script from benchmarks/.
        arguments: the command line.
        *packages: distributions to name in every row beside the usual ones.
    """
    now = datetime.now(UTC)
    path = options.resume or options.output / f"{Path(script).stem}-{now:%Y%m%dT%H%M%SZ}.jsonl"
    return ResultFile(path, circumstances(now, script, arguments, packages), getattr(options, "minutes", None))


def search(
    judge: Callable[..., float], point: tuple[float, ...], factors: Iterable[tuple[float, ...]]
) -> tuple[float, ...]:
    """Minimise `judge(*point)` by coordinate search, until no multiple of `point` by `factors` is better.

    Sides that are tuned by it from the same point with the same factors are tuned with equal effort.
    """
    steps = list(factors)
    least, moved = judge(*point), True
    while moved:
        moved = False
        for step in steps:
            neighbour = tuple(value * factor for value, factor in zip(point, step, strict=True))
            if (found := judge(*neighbour)) < least:
                point, least, moved = neighbour, found, True
    return point
