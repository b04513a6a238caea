"""Tables of `translation.py`: means over the seeds with their ranges, beside the copied source and chance."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

from translation_arms import ARMS
from translation_tasks import chance_of_name

Rows = list[dict[str, Any]]


def is_joined(test: str) -> bool:
    """Return whether a test has joined sentences, of which those of one are also a corpus."""
    return test.endswith("sentences")


def tests_of(name: str, rows: Rows) -> list[str]:
    """Return the tests that a task of the command line is about: joined sentences for `length`, the others without."""
    tests = list(next((row["tests"] for row in rows if "tests" in row), {}))
    return [test for test in tests if is_joined(test) == (name == "length")]


def groups_of(rows: Rows) -> dict[tuple[str, int], Rows]:
    """Return the rows of each arm and number of joined training sentences: its seeds."""
    groups: dict[tuple[str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["concatenate"]), []).append(row)
    return groups


def label_of(arm: str, concatenate: int) -> str:
    """Return what tables and pictures call a group."""
    return ARMS[arm] + (f"; CAT-{concatenate}" if concatenate > 1 else "")


def tables(name: str, rows: Rows) -> str:
    """Return the tables of a task of the command line: names that are kept, or BLEU and chrF."""
    scores = ("entity_recall", "bleu") if name == "synthetic" else ("bleu", "chrf")
    return "\n\n".join(table_of(name, rows, score) for score in scores)


def table_of(name: str, rows: Rows, score: str) -> str:
    """Return a Markdown table of one task and score: means over the seeds that did not diverge, with their ranges.

    Args:
        name: name of the task.
        rows: its rows.
        score: "bleu", "chrf" or "entity_recall".
    """
    digits = 3 if score == "entity_recall" else 2
    tests = tests_of(name, rows)
    lines = [f"{name}: {score}", _line(["arm", "parameters", "seeds", *tests]), "|---|" + "---:|" * (len(tests) + 2)]
    for (arm, concatenate), seeds in groups_of(rows).items():
        group = [row for row in seeds if "tests" in row]
        diverged = len(seeds) - len(group)
        label = label_of(arm, concatenate)
        numbers = f"{len(seeds)}, {diverged} diverged" if diverged else str(len(seeds))
        if not group:
            lines.append(_line([label, "-", numbers, *("-" for _ in tests)]))
            continue
        cells = []
        for test in tests:
            values = [row["tests"][test][score] for row in group]
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(_line([label, f"{group[0]['parameters']:,}", numbers, *cells]))
    first = next((row["tests"] for row in rows if "tests" in row), None)
    if first is not None:
        for label, cell in baselines(first, score).items():
            lines.append(_line([label, "-", "-", *map(cell, tests)]))
    return "\n".join(lines)


def baselines(tests: dict[str, Any], score: str) -> dict[str, Callable[[str], str]]:
    """Return what a score is without a model, by label: a function of the test's name that returns the cell."""
    if score != "entity_recall":
        return {
            "copied source": lambda test: f"{tests[test]['copied'][score]:.2f}",
            "chance: the target of another pair": lambda test: f"{tests[test]['chance'][score]:.2f}",
        }

    def chance(test: str) -> str:
        found = re.match(r"names of (\d+),", test)
        assert found is not None
        return f"{chance_of_name(int(found[1])):.0e}"

    return {"copied source": lambda _: "1 by definition", "chance: random characters": chance}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
