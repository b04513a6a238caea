"""Formatting of numbers, and of texts that are not ours, which must not be interpreted as Markdown.

Names and samples from a report are written as code, in which HTML, links and emphasis have no effect.
"""

import re
from collections.abc import Sequence

MISSING = "—"

# Control characters other than tab and line feed. Terminals interpret some; renderers drop or refuse the others.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """Format a measured number; None gives a dash."""
    return MISSING if value is None else f"{value:{'+' if sign else ''},.{digits}f}"


def short(value: float | None) -> str:
    """Format a measured number of any magnitude with three significant digits; None gives a dash."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Format a share as a percentage; None gives a dash."""
    return MISSING if value is None else f"{value:.1%}"


def count(value: int) -> str:
    """Format an integer with thousands separators."""
    return f"{value:,}"


def seconds(value: float) -> str:
    """Format seconds with thousands separators, and with a decimal if they are more than zero and less than ten."""
    return f"{value:,.1f}" if 0 < value < 10 else f"{value:,.0f}"


def gibibytes(value: int | None) -> str:
    """Format bytes in GiB; None gives a dash."""
    return MISSING if value is None else f"{value / 2**30:.1f} GiB"


def binary_size(value: int) -> str:
    """Format bytes in the largest binary unit of which there is at least one, with three significant digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{short(value / size)} {unit}"
    return f"{value} bytes"


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending integers, with runs of three or more joined: "0, 2, 4-7"."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def code(text: str) -> str:
    """Return a text as one line of inline code, with delimiters longer than any run of backticks in it."""
    line = re.sub(r"\s+", " ", _CONTROL.sub(" ", text)).strip()
    if not line:
        return MISSING
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """Return a text as a code block that nothing in the text can close."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    body = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")).rstrip("\n")
    return f"{ticks}{language}\n{body}\n{ticks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table with the first `left` columns aligned left and the others right; cells are Markdown."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
