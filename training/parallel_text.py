"""Parallel text: sentences or passages and their translations, from files whose every mistake is named by its line."""

import gzip
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness.json_files import parse_json
from ..harness.text_files import read_text_file
from .sources import DATA_SETS, DATASETS, read_rows, text_at

ACCEPTED = f"SOURCE,TARGET (two files with a text on every line), a .tsv, .jsonl or .parquet file, or {DATA_SETS}"
_GZIP = ".gz"


@dataclass(frozen=True)
class ParallelText:
    """Texts and their translations, in the order of the sources.

    Attributes:
        sources: texts to translate.
        targets: the translation of each.
        parts: number of pairs of each source of data; texts of different sources do not follow each other.
    """

    sources: list[str]
    targets: list[str]
    parts: list[int]

    def __len__(self) -> int:
        return len(self.sources)

    def also_in(self, others: "ParallelText") -> int:
        """Return the number of pairs here that are there, too."""
        there = set(zip(others.sources, others.targets, strict=True))
        return sum(pair in there for pair in zip(self.sources, self.targets, strict=True))


def read_parallel(
    names: Sequence[str],
    field: str,
    *,
    source_field: str | None = None,
    target_field: str | None = None,
    reverse: bool = False,
) -> ParallelText:
    """Read the pairs of some sources of data, in order.

    Args:
        names: "SOURCE,TARGET", two UTF-8 files of which line n of one is the translation of line n of the other; a
            `.tsv` file without header or quoting; a `.jsonl` file, a JSON object a line; a `.parquet` file;
            "datasets:PATH,SPLIT" or "datasets:PATH,CONFIG,SPLIT". All but the last two may end in `.gz`.
        field: name of the setting, for errors.
        source_field: field of the texts, "source" if None; in a `.tsv` file the number of the column from 1, which may
            be None if there are two columns.
        target_field: as `source_field`, for the translations; "target" if None.
        reverse: exchange the two sides.

    Raises:
        ValueError: naming file and line of the first mistake: a missing file, lines that are not UTF-8, different
            numbers of lines, a missing or other field, or an empty text.
    """
    sides: tuple[list[str], list[str]] = [], []
    parts = []
    for name in names:
        count = 0
        for place, source, target in _pairs(name, field, source_field, target_field):
            for side, text, kept in zip(("source", "target"), (source, target), sides, strict=True):
                if not text.strip():
                    raise ValueError(f"{place}: the {side} must be a text that is not empty, got {text!r}.")
                kept.append(text)
            count += 1
        if not count:
            raise ValueError(f"{field}: {name!r} has no pairs.")
        parts.append(count)
    sources, targets = reversed(sides) if reverse else sides
    return ParallelText(sources, targets, parts)


def concatenated(pairs: ParallelText, most: int, seed: int) -> ParallelText:
    """Return every pair once, in random concatenations of 1 to `most` consecutive pairs of one source of data.

    This is CAT-N of arXiv 2407.05489. The number of pairs in a concatenation is uniform from 1 to N, except at the end
    of a source; texts are joined by a space.

    Args:
        pairs: the pairs.
        most: N.
        seed: seed of the numbers.
    """
    draw = random.Random(f"{seed}/concatenation")
    joined = ParallelText([], [], [])
    end = 0
    for part in pairs.parts:
        start, end, count = end, end + part, 0
        while start < end:
            stop = min(start + draw.randint(1, most), end)
            joined.sources.append(" ".join(pairs.sources[start:stop]))
            joined.targets.append(" ".join(pairs.targets[start:stop]))
            start, count = stop, count + 1
        joined.parts.append(count)
    return joined


def _pairs(name: str, field: str, source_field: str | None, target_field: str | None) -> Iterator[tuple[str, str, str]]:
    """Yield the place of every pair in words, its source and its target."""
    suffix = Path(name.removesuffix(_GZIP)).suffix
    if name.startswith(DATASETS) or suffix in (".jsonl", ".parquet"):
        keys = source_field or "source", target_field or "target"
        rows = _json_rows(name, field) if suffix == ".jsonl" and not name.startswith(DATASETS) else None
        for place, row in read_rows(name, field) if rows is None else rows:
            yield place, text_at(row, keys[0], place), text_at(row, keys[1], place)
    elif suffix == ".tsv" and ("," not in name or Path(name).exists()):
        yield from _columns(name, field, source_field, target_field)
    else:
        yield from _aligned(name, field, source_field, target_field)


def _json_rows(name: str, field: str) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in _lines(name, field):
        if line.strip():
            place = f"{field}: {name!r}, line {number}"
            row = parse_json(line, place)
            if not isinstance(row, dict):
                raise ValueError(f"{place} must be an object, got {row!r:.80}.")
            yield place, row


def _columns(
    name: str, field: str, source_field: str | None, target_field: str | None
) -> Iterator[tuple[str, str, str]]:
    numbers = None
    if source_field is not None or target_field is not None:
        numbers = _column(source_field, "source_field", name), _column(target_field, "target_field", name)
    for number, line in _lines(name, field):
        place, cells = f"{field}: {name!r}, line {number}", line.split("\t")
        if numbers is None and len(cells) != 2:
            more = "" if len(cells) < 2 else "; choose two with `source_field` and `target_field`"
            raise ValueError(f"{place} must have two texts with a tab between them, got {len(cells)}{more}.")
        first, second = numbers or (1, 2)
        if len(cells) < max(first, second):
            raise ValueError(f"{place} must have at least {max(first, second)} columns, got {len(cells)}.")
        yield place, cells[first - 1], cells[second - 1]


def _column(given: str | None, setting: str, name: str) -> int:
    if given is None or not given.isdecimal() or int(given) < 1:
        raise ValueError(f"`{setting}` must be the number of a column, from 1, for {name!r}, got {given!r}.")
    return int(given)


def _aligned(
    name: str, field: str, source_field: str | None, target_field: str | None
) -> Iterator[tuple[str, str, str]]:
    files = name.split(",")
    if len(files) != 2 or not all(files):
        raise ValueError(f"`{field}` must be {ACCEPTED}, got {name!r}.")
    for setting, given in (("source_field", source_field), ("target_field", target_field)):
        if given is not None:
            raise ValueError(f"`{setting}` has no effect on {name!r}, whose lines have no fields, got {given!r}.")
    lines = [list(_lines(file, field)) for file in files]
    counts = [len(found) for found in lines]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{field}: {files[0]!r} and {files[1]!r} must have equally many lines, got {counts[0]:,} and "
            f"{counts[1]:,}: line {min(counts) + 1:,} of the longer one has no counterpart."
        )
    for (number, source), (_, target) in zip(*lines, strict=True):
        file = files[0] if not source.strip() else files[1]
        yield f"{field}: {file!r}, line {number}", source, target


def _lines(path: str, field: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line of a UTF-8 file, which may be gzipped."""
    if not Path(path).is_file():
        read_text_file(path, field)  # says what is wrong
    content = Path(path).read_bytes()
    if path.endswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{field}: {path!r} cannot be read as gzip: {error}.") from None
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            # Not `splitlines`, which also splits at characters that a text may contain.
            yield number, line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{field}: {path!r}, line {number} is not UTF-8 text (byte {error.start}: {error.reason})."
            ) from None
