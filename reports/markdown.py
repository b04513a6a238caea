"""Numbers for people, and other people's text in Markdown: a name or a sample must never turn into markup.

Whatever comes out of a report (a file, after all) is written as code, where HTML, links and emphasis are letters.
"""

import re
from collections.abc import Sequence

MISSING = "—"

# Control characters other than tab and line feed: terminals obey some, and renderers drop or refuse the rest.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A measured number; a dash for None."""
    return MISSING if value is None else f"{value:{'+' if sign else ''},.{digits}f}"


def short(value: float | None) -> str:
    """A measured number in three significant digits, for what may be 0.01 or 10,000; a dash for None."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in per cent; a dash for None."""
    return MISSING if value is None else f"{value:.1%}"


def count(value: int) -> str:
    """A whole number, thousands apart."""
    return f"{value:,}"


def seconds(value: float) -> str:
    """Seconds, thousands apart; with a decimal below ten, unless there are none."""
    return f"{value:,.1f}" if 0 < value < 10 else f"{value:,.0f}"


def gibibytes(value: int | None) -> str:
    """Bytes in GiB; a dash for None."""
    return MISSING if value is None else f"{value / 2**30:.1f} GiB"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers with runs of three or more joined: "0, 2, 4-7"."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def code(text: str) -> str:
    """A text as one line of inline code, longer in its delimiters than any run of backticks in it."""
    line = re.sub(r"\s+", " ", _CONTROL.sub(" ", text)).strip()
    if not line:
        return MISSING
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """A text as a code block that nothing in the text can close."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    body = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")).rstrip("\n")
    return f"{ticks}{language}\n{body}\n{ticks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, its first `left` columns to the left and the others to the right; cells are Markdown."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
