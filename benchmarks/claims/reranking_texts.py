"""Corpora for `reranking.py`: a judged collection in three parts, and documentation with withheld summary lines."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ssm_zoo.evaluation.reranking_data import read_judged

SHARES = {"test": 0.4, "dev": 0.1}  # of the queries; the rest is trained on
MOST = {"test": 100, "dev": 40, "train": 900}  # queries of a part; what is above that is left out
LONGEST = 200  # words of a page's body
_WORDS = 20  # of a page's body at least
_SUMMARY = re.compile(r"\w+(?:\W+\w+){2,}")


def split_collection(
    source: Path, folder: Path, split: str | None = None, seed: int = 0, most: Mapping[str, int] = MOST
) -> dict[str, int]:
    """Write a collection with its queries split at random into train, dev and test.

    Args:
        source: folder in BEIR's layout.
        folder: folder to write.
        split: judgements of the source; None: the only ones.
        seed: seed of the split.
        most: largest number of queries of each part.

    Returns:
        The number of queries by part.
    """
    judged = read_judged(source, split)
    queries = list(judged.queries)
    order = [queries[index] for index in np.random.default_rng(seed).permutation(len(queries))]
    ends = np.cumsum([max(1, round(share * len(queries))) for share in SHARES.values()]).tolist()
    parts = {"test": order[: ends[0]], "dev": order[ends[0] : ends[1]], "train": order[ends[1] :]}
    parts = {name: part[: most[name]] for name, part in parts.items()}
    _write(folder, "corpus", [{"_id": one, "text": text} for one, text in judged.documents.items()])
    _write(folder, "queries", [{"_id": one, "text": text} for one, text in judged.queries.items()])
    (folder / "qrels").mkdir(exist_ok=True)
    for name, part in parts.items():
        rows = [f"{query}\t{document}\t{grade}" for query in part for document, grade in judged.grades[query].items()]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return {name: len(part) for name, part in parts.items()}


def pages(package: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, summary line and body of the docstrings of a package's public functions and classes.

    The source is parsed, never run. A body that repeats its summary line is left out, as are short ones.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"`package` must be an installed package, got {package!r}.")
    root = Path(found.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root.parent).with_suffix("")
        if "test" in str(place):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            summary, _, body = (ast.get_docstring(node) or "").partition("\n")
            summary, body = summary.strip(), body.strip()
            if _SUMMARY.search(summary) and len(body.split()) >= _WORDS and summary.lower() not in body.lower():
                yield f"{'.'.join(place.parts)}.{node.name}", summary, body


def documentation(packages: list[str], folder: Path, most: int | None = None, seed: int = 0) -> int:
    """Write a collection in which the summary line of a page retrieves its body.

    Bodies are cut to their first `LONGEST` words, which is more than the rerankers read. Pages with the same body count
    once, and those whose summary others share are documents without a query.

    Args:
        packages: installed packages.
        folder: folder in BEIR's layout to write.
        most: pages to keep, drawn by the seed; None: all.
        seed: seed of the draw.

    Returns:
        The number of pages.
    """
    unique: dict[str, tuple[str, str]] = {}
    for package in packages:
        for name, summary, body in pages(package):
            unique.setdefault(_beginning(body), (name, summary))
    kept = [(name, summary, body) for body, (name, summary) in unique.items()]
    if most is not None:
        kept = [kept[index] for index in sorted(np.random.default_rng(seed).permutation(len(kept))[:most])]
    counts: dict[str, int] = {}
    for _, summary, _ in kept:
        counts[summary.lower()] = counts.get(summary.lower(), 0) + 1
    asked = [(index, summary) for index, (_, summary, _) in enumerate(kept) if counts[summary.lower()] == 1]
    _write(folder, "corpus", [{"_id": f"d{index}", "text": body} for index, (_, _, body) in enumerate(kept)])
    _write(folder, "queries", [{"_id": f"q{index}", "text": summary} for index, summary in asked])
    (folder / "qrels").mkdir(exist_ok=True)
    rows = [f"q{index}\td{index}\t1" for index, _ in asked]
    (folder / "qrels" / "all.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return len(kept)


def _beginning(text: str) -> str:
    """Return a text up to its word number `LONGEST`, with its line breaks."""
    words = list(re.finditer(r"\S+", text))
    return text[: words[min(LONGEST, len(words)) - 1].end()]


def _write(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
