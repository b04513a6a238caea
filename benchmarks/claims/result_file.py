"""Parts that comparisons of trained models share: a result file that can be resumed, and the tuning search."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from circumstances import circumstances, write_rows

# Options that change no result.
_OF_THE_START = ("output", "resume", "minutes", "work", "plan")


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

    def prediction(self, left: Mapping[str, int], seconds: Mapping[str, float]) -> str:
        """Return in words the steps that are left and their CPU hours, at the mean CPU seconds per step of the rows.

        Args:
            left: steps by arm.
            seconds: CPU seconds of a step of arms without rows, as measured before.
        """
        known = [(row["arm"], row["cpu_seconds"], row["steps"]) for row in self.rows if "cpu_seconds" in row]
        total = 0.0
        for arm, steps in left.items():
            own = [(used, made) for name, used, made in known if name == arm]
            rate = sum(used for used, _ in own) / sum(made for _, made in own) if own else seconds.get(arm, 0.0)
            if steps and not rate:
                return f"{sum(left.values()):,} steps"
            total += steps * rate
        return f"{sum(left.values()):,} steps, {total / 3600:.1f} CPU hours predicted"

    def complete(self, names: Iterable[str], parser: argparse.ArgumentParser) -> None:
        """Give rows of an earlier version, which lack some options as fields, those of their commands."""
        for row in self.rows:
            for name in names:
                row.setdefault(name, option_of(row, name, parser, None))

    def drop(self, stale: Callable[[dict[str, Any]], bool]) -> None:
        """Drop rows that have to be computed again, e.g. summaries; the file changes with the next row."""
        self.rows = [row for row in self.rows if not stale(row)]


def finished_or(folder: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the report of the finished run in `folder`, left by a start that ended before its row, or of `train()`."""
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else train()


def open_results(
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    script: str,
    arguments: list[str],
    *packages: str,
    free: Iterable[str] = (),
) -> ResultFile:
    """Return the result file that a command line continues (`options.resume`), or a new one in `options.output`.

    Args:
        options: the parsed command line; may have `minutes`.
        parser: what parsed it.
        script: path of the script from benchmarks/.
        arguments: the command line.
        *packages: distributions to name in every row beside the usual ones.
        free: names of options whose values rows contain, or which choose among the rows. All rows of a file have the
            same values of the others.

    Raises:
        SystemExit: if a row of the file was measured with other options.
    """
    now = datetime.now(UTC)
    path = options.resume or options.output / f"{Path(script).stem}-{now:%Y%m%dT%H%M%SZ}.jsonl"
    here = option_values(options, vars(options).keys() - {*_OF_THE_START, *free})
    about = circumstances(now, script, arguments, packages)
    file = ResultFile(path, {"options": here, **about} if here else about, getattr(options, "minutes", None))
    for row in file.rows:
        for name, value in here.items():
            if (there := option_of(row, name, parser, value)) != value:
                raise SystemExit(
                    f"--resume: {path} has rows with {name} {there}, got {value}. Give the same options, or leave out "
                    "--resume to begin another file."
                )
    return file


def option_of(row: dict[str, Any], name: str, parser: argparse.ArgumentParser, default: Any) -> Any:
    """Return the value of an option with which a row was measured, as JSON has it; paths are their last parts.

    Args:
        row: the row. That of an earlier version has its command only.
        name: name of the option.
        parser: parser of the command.
        default: what to return if the row does not tell.
    """
    if name in row.get("options", {}):
        return row["options"][name]
    try:
        with redirect_stderr(io.StringIO()):  # about options of an earlier version
            found, _ = parser.parse_known_args(shlex.split(row.get("command", ""))[2:])
    except SystemExit:
        return default
    return option_values(found, [name])[name] if hasattr(found, name) else default


def option_values(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return options by name, in order, as values that JSON can hold; paths are reduced to their last parts."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return Path(value).name if isinstance(value, str | Path) else value

    return {name: plain(getattr(options, name)) for name in sorted(names)}


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
