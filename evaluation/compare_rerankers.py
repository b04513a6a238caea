"""Evaluate several rerankers on the same first-stage lists, with paired tests of every pair of systems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..harness.text_files import read_text_file
from .embedder import require_sentence_transformers
from .long_documents import long_documents
from .metrics.metric import require_package
from .reranking import load_reranker, means, measure_names, measure_run, pair_lengths, rerank
from .reranking_data import JudgedCollection, bm25_run, cut, read_judged, read_run, without_list
from .significance import compare, holm, interval

TESTED = ("ndcg@10", "mrr@10")
"""Measures that the paired tests compare."""
_RunOf = dict[str, dict[str, float]]


def new_names(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind those that repeat an earlier one."""
    found: list[str] = []
    for name in names:
        number, made = 1, name
        while made in found:
            number += 1
            made = f"{name} ({number})"
        found.append(made)
    return found


def first_stage_name(run: str | Path | None, systems: Iterable[str]) -> str:
    """Return the name of the first stage among the systems: BM25, or the name of its run file."""
    name = "BM25" if run is None else Path(run).name
    return f"{name} (first stage)" if name in systems else name


def compare_rerankers(
    sources: Mapping[str, str],
    folder: str | Path,
    *,
    split: str | None = None,
    only: str | Path | None = None,
    run: str | Path | None = None,
    depth: int = 100,
    batch_size: int = 32,
    resamples: int = 10_000,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, _RunOf]]:
    """Re-rank the first stage's lists with every reranker, and measure and compare all.

    Args:
        sources: name of each system to the folder or Hub id of a reranker, or to a run file in TREC's format.
        folder: folder in BEIR's layout.
        split: name of the judgements; None: the only ones.
        only: file with the ids of the queries to use, one a line; None: all with a relevant document.
        run: first-stage lists, a run file; None: BM25's.
        depth: documents of each list.
        batch_size: texts in one forward pass.
        resamples: resamples of the paired tests.
        seed: seed of the resamples.
        revision: branch, tag or commit of the first source, if it is a Hub id.
        trust_remote_code: run the code that the sources bring.
        progress: show progress bars.

    Returns:
        The results: "queries", "without_relevant" (queries left out), "pairs", "first_stage" (its name), "systems"
        (name to the mean of each measure, its "intervals", 95 % by bootstrap, the values "by_query", the number of
        queries "without_list", and for a reranker its "rule" for long documents, its "max_tokens" and the share of the
        pairs that are "cut") and "comparisons" ("first", "second", "measure", the values of `significance.compare`,
        and "p_holm", the randomisation test corrected for the number of pairs of systems). And the lists by name.

    Raises:
        ValueError: naming file and line, if the data is malformed; naming the source, if it is no reranker or the
            scores are not finite.
    """
    require_sentence_transformers()
    require_package("ir_measures", "ir-measures", "reranking")
    judged = read_judged(folder, split)
    if only is not None:
        judged = judged.only(_ids(only, judged))
    lists = bm25_run(judged, depth) if run is None else cut(read_run(run, "run", judged), depth)
    first = first_stage_name(run, sources)
    # Run files are read before any model is loaded, so that a mistake in one is found at once.
    ranked: dict[str, _RunOf] = {
        name: cut(read_run(source, "against", judged), depth)
        for name, source in sources.items()
        if Path(source).is_file()
    }
    pairs = [(judged.queries[query], judged.documents[one]) for query, of in lists.items() for one in of]
    rules: dict[str, dict[str, Any]] = {}
    for number, (name, source) in enumerate(sources.items()):
        if name in ranked:
            continue
        reranker = load_reranker(
            source,
            revision=None if number else revision,
            trust_remote_code=trust_remote_code,
            field="against" if number else "model",
        )
        rule = long_documents(reranker.model.config if reranker.model is not None else None)
        limit = reranker.max_seq_length
        unread = pair_lengths(reranker.tokenizer, pairs, rule, limit)["cut"] if pairs else 0.0
        rules[name] = {"rule": rule.entry(), "max_tokens": limit, "cut": unread}
        ranked[name] = rerank(reranker, judged, lists, depth=depth, rule=rule, batch_size=batch_size, progress=progress)
    runs = {**{name: ranked[name] for name in sources}, first: lists}
    values = {name: measure_run(judged, of, depth) for name, of in runs.items()}
    systems = {
        name: {
            **means(of),
            "intervals": {key: interval(list(by.values()), resamples=resamples, seed=seed) for key, by in of.items()},
            "without_list": without_list(runs[name]),
            **rules.get(name, {}),
            "by_query": {key: of[key] for key in measure_names(depth)},
        }
        for name, of in values.items()
    }
    found = {
        "queries": len(judged.queries),
        "without_relevant": judged.without_relevant,
        "pairs": sum(map(len, lists.values())),
        "first_stage": first,
        "systems": systems,
        "comparisons": _comparisons(values, resamples, seed),
    }
    return found, runs


def _comparisons(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Compare every pair of systems by every tested measure."""
    found = []
    for measure in TESTED:
        rows = [
            {
                "first": one,
                "second": other,
                "measure": measure,
                **compare(values[one][measure], values[other][measure], resamples=resamples, seed=seed),
            }
            for one, other in combinations(values, 2)
        ]
        corrected = holm([row["p_randomisation"] for row in rows])
        found += [{**row, "p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return found


def _ids(path: str | Path, judged: JudgedCollection) -> list[str]:
    """Read the ids of queries, one a line."""
    found: list[str] = []
    for number, line in enumerate(read_text_file(path, "queries").split("\n"), start=1):
        identity, place = line.strip(), f"queries: {str(path)!r}, line {number}"
        if not identity:
            continue
        if identity not in judged.queries:
            raise ValueError(f"{place}: {identity!r} must be the id of a query with a relevant document in this split.")
        if identity in found:
            raise ValueError(f"{place} repeats the id {identity!r}.")
        found.append(identity)
    if not found:
        raise ValueError(f"queries: {str(path)!r} has no ids.")
    return found
