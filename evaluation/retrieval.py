"""Measure how well queries find their relevant documents, among all documents and among a few.

A system is anything that scores all documents for some queries: an embedder, or BM25. All are measured by the same
code, with nDCG, MRR and recall of :class:`ssm_zoo.evaluation.metrics.Ranking`. All relevant documents count alike.

Symbols: N documents, R of them relevant to a query, Q queries.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..harness.text_files import read_json_lines_of, read_text_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Scores = Callable[[slice], Tensor]
"""Scores (q, N) of all documents for the queries in a slice, higher for better matches."""

CUTOFFS = {"ndcg": (10,), "mrr": (10,), "recall": (10, 100), "accuracy": (1,)}
_DEEPEST = 100
# Bound on the scores in memory at one time.
_SCORES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RetrievalData:
    """Queries with at least one relevant document each, and the documents to search.

    Attributes:
        queries: id to text.
        documents: id to text, which may be empty.
        relevant: id of every query to the ids of its relevant documents, one or more.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    relevant: Mapping[str, frozenset[str]]

    @property
    def largest_pool(self) -> int:
        """Largest pool of one relevant document and others that are not relevant, possible for every query."""
        return 1 + len(self.documents) - max(map(len, self.relevant.values()))


def read_beir(folder: str | Path, split: str = "test") -> RetrievalData:
    """Read a folder in the layout of BEIR (arXiv 2104.08663).

    It holds `corpus.jsonl` (objects with "_id", "text" and perhaps "title"), `queries.jsonl` ("_id" and "text") and
    `qrels/SPLIT.tsv` (a header, then query id, document id and grade). A title is put before its text unless the text
    begins with it. Every grade above 0 counts as relevant, without distinction. Queries without a relevant document
    are left out, as are judgements of documents that the corpus does not hold.

    Args:
        folder: the folder.
        split: name of the judgements.

    Raises:
        ValueError: if a file is missing or malformed, or no query is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}")
    documents = _read_texts(folder / "corpus.jsonl", titles=True)
    queries = _read_texts(folder / "queries.jsonl", titles=False)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = sorted(entry.stem for entry in path.parent.glob("*.tsv"))
        raise ValueError(
            f"`split` must be one of {str(folder / 'qrels')!r}, {', '.join(found) or 'none'}, got {split!r}"
        )
    relevant: dict[str, set[str]] = {}
    rows = csv.reader(io.StringIO(read_text_file(path, "folder"), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if number == 1 or not row:
            continue
        if len(row) != 3 or not row[2].strip().lstrip("-").isdigit():
            raise ValueError(f"{str(path)!r}, line {number} must have a query id, a document id and a whole number")
        query, document, grade = row
        if query not in queries:
            raise ValueError(f"{str(path)!r}, line {number}: queries.jsonl has no query {query!r}")
        if int(grade) > 0 and document in documents:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise ValueError(f"{str(path)!r} has no query with a relevant document")
    return RetrievalData(
        {query: text for query, text in queries.items() if query in relevant},
        documents,
        {query: frozenset(relevant[query]) for query in queries if query in relevant},
    )


def _read_texts(path: Path, *, titles: bool) -> dict[str, str]:
    """Read the texts of a file of objects with ids, each after its title if there is one."""
    name, found = repr(str(path)), {}
    for number, row in read_json_lines_of(path, "folder"):
        identity, text = (row.get("_id"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(identity, str) or not isinstance(text, str) or not (titles or text.strip()):
            raise ValueError(f"{name}, line {number} must be an object with texts under '_id' and 'text'")
        if identity in found:
            raise ValueError(f"{name}, line {number} repeats the id {identity!r}")
        title = row.get("title") if titles else None
        if isinstance(title, str) and not text.startswith(title):
            text = f"{title} {text}"
        found[identity] = text
    if not found:
        raise ValueError(f"{name} has no texts")
    return found


def embedder_scores(
    model: SentenceTransformer, data: RetrievalData, *, batch_size: int = 32, progress: bool = False
) -> Scores:
    """Embed all texts, queries and documents with the embedder's prompts for them, and return their similarities.

    A document without text has no embedding; its similarity to every query is 0.

    Args:
        model: the embedder. Its own similarity is used, which is the cosine unless it defines another.
        data: the texts.
        batch_size: number of texts in one forward pass.
        progress: show progress bars.

    Raises:
        ValueError: if an embedding is not finite.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": progress, "convert_to_tensor": True}
    texts = list(data.documents.values())
    filled = torch.tensor([bool(text.strip()) for text in texts])
    with torch.no_grad():
        queries = model.encode_query(list(data.queries.values()), **options).float()
        embedded = model.encode_document([text for text in texts if text.strip()], **options).float()
    for name, vectors in (("query", queries), ("document", embedded)):
        lost = ~vectors.isfinite().all(dim=1)
        if lost.any():
            raise ValueError(
                f"the model's embeddings must be finite, but those of {int(lost.sum()):,} of {len(lost):,} texts are "
                f"not; the first is {name} number {int(lost.nonzero()[0])}"
            )
    documents = embedded.new_zeros(len(texts), embedded.shape[1])
    documents[filled.to(documents.device)] = embedded
    return lambda part: model.similarity(queries[part], documents).cpu()


def bm25_scores(data: RetrievalData, *, k1: float = 1.2, b: float = 0.75) -> Scores:
    """Index English documents with bm25s and return their scores by BM25.

    Words of at least two letters are lower-cased and stemmed by Porter's rules; stop words are left out.

    Args:
        data: the texts.
        k1: saturation of a word's frequency, at least 0. The defaults are Lucene's.
        b: normalisation by document length, from 0 to 1.

    Raises:
        ValueError: if bm25s or its stemmer is not installed, or an argument is out of range.
    """
    for module, package in (("bm25s", "bm25s"), ("Stemmer", "PyStemmer")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"BM25 needs the package {package}, which is not installed: pip install bm25s[stem]")
    if k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"`k1` must be at least 0 and `b` from 0 to 1, got {k1} and {b}")
    import bm25s
    from Stemmer import Stemmer

    how: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer("porter"), "show_progress": False, "return_ids": False}
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    documents: Any = bm25s.tokenize(list(data.documents.values()), **how)
    if not any(documents):  # none has a word
        return lambda part: torch.zeros(len(list(data.queries)[part]), len(data.documents))
    index.index(documents, show_progress=False)
    queries: Any = bm25s.tokenize(list(data.queries.values()), **how)

    def scores(part: slice) -> Tensor:
        known = [index.get_tokens_ids(words) for words in queries[part]]
        return torch.from_numpy(np.stack([index.get_scores_from_ids(words) for words in known]))

    return scores


def evaluate_retrieval(
    data: RetrievalData,
    scores: Scores,
    *,
    pools: Sequence[int] = (32,),
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a system.

    Args:
        data: queries, documents and what is relevant.
        scores: the system; see :func:`embedder_scores` and :func:`bm25_scores`.
        pools: numbers of candidates, each at least 2. One is drawn from the query's relevant documents and the others
            from the rest, the same for every system. A smaller pool is a part of a larger one.
        resamples: number of bootstrap resamples of the queries, positive; for the interval of a pool's accuracy.
        seed: seed of the pools and resamples.
        progress: show a progress bar.

    Returns:
        Means over the queries, in [0, 1]: "ndcg@10", "mrr@10", "recall@10", "recall@100" and "accuracy@1" among all
        documents; and "pools": for each "size", the "accuracy" with which the relevant document scores best (a tie
        counts in part), and the limits of its 95 % bootstrap interval, "low" and "high".

    Raises:
        ValueError: if a pool is smaller than 2 or larger than `data.largest_pool`, the seed is not in [0, 2^32), or
            ir_measures is not installed.
    """
    from .metrics import Ranking  # evaluate and datasets take seconds to import

    ranking = Ranking([f"{name}@{cutoff}" for name, cutoffs in CUTOFFS.items() for cutoff in cutoffs])
    for size in pools:
        if not 2 <= size <= data.largest_pool:
            raise ValueError(f"`pools` must be from 2 to {data.largest_pool} with these documents, got {size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1:,}, got {seed}")
    candidates = draw_pools(data, max(pools), seed)
    identities, relevant = list(data.documents), [sorted(each) for each in data.relevant.values()]
    right: dict[int, list[Tensor]] = {size: [] for size in pools}
    for part in tqdm(list(_parts(data)), desc="rank", leave=False, disable=not progress):
        scored = scores(part).float()
        # Stable, so that the cut among documents with equal scores is the same on every device.
        order = scored.argsort(dim=1, descending=True, stable=True)[:, :_DEEPEST]
        rankings = []
        for places, row in zip(order.tolist(), scored.gather(1, order).tolist(), strict=True):
            # Equal scores in the order of the ids, as sentence-transformers ranks them.
            hits = sorted((-score, identities[place]) for place, score in zip(places, row, strict=True))
            rankings.append([identity for _, identity in hits])
        ranking.add_batch(predictions=rankings, references=relevant[part])
        among = scored.gather(1, candidates[part])
        for size in pools:
            best = among[:, :size].amax(dim=1, keepdim=True)
            tied = among[:, :size] == best
            right[size].append(tied[:, 0].double() / tied.sum(dim=1))
    measured = ranking.compute()
    measured["pools"] = [{"size": size, **_accuracy(torch.cat(right[size]), resamples, seed)} for size in pools]
    return measured


def chance_levels(data: RetrievalData, pools: Sequence[int] = (32,)) -> dict[str, Any]:
    """Compute the expected values for a random ranking, under the names of :func:`evaluate_retrieval`."""
    number, levels = len(data.documents), {}
    counts = [len(relevant) for relevant in data.relevant.values()]
    for name, cutoffs in CUTOFFS.items():
        for cutoff in cutoffs:
            of_one = {count: _chance(name, cutoff, number, count) for count in set(counts)}
            levels[f"{name}@{cutoff}"] = math.fsum(of_one[count] for count in counts) / len(counts)
    return {**levels, "pools": [{"size": size, "accuracy": 1 / size} for size in pools]}


def _chance(name: str, cutoff: int, number: int, count: int) -> float:
    """Return the mean of a measure over all orders of N documents, R of them relevant."""
    ranks = range(1, min(cutoff, number) + 1)
    if name == "recall":
        return len(ranks) / number
    if name == "ndcg":
        ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, min(cutoff, count) + 1))
        return count / number * math.fsum(1 / math.log2(rank + 1) for rank in ranks) / ideal
    total, none_before = 0.0, 1.0
    for rank in ranks:
        left = number - rank + 1
        weight = 1 / rank if name == "mrr" else 1.0
        total += weight * none_before * count / left
        none_before *= (left - count) / left
    return total


def draw_pools(data: RetrievalData, size: int, seed: int = 0) -> Tensor:
    """Draw (Q, size) indices of documents: for every query a relevant one, then different ones that are not."""
    place = {identity: index for index, identity in enumerate(data.documents)}
    pools = []
    for index, relevant in enumerate(data.relevant.values()):
        generator = np.random.default_rng([seed, index])
        known = sorted(place[identity] for identity in relevant)
        first = known[generator.integers(len(known))]
        # A permutation of all, so that a smaller pool is the beginning of a larger one.
        order = generator.permutation(len(place))
        pools.append([first, *order[~np.isin(order, known)][: size - 1].tolist()])
    return torch.tensor(pools)


def _parts(data: RetrievalData) -> Iterator[slice]:
    """Yield slices of the queries whose scores fit into memory."""
    step = max(1, _SCORES_BYTES // (4 * len(data.documents)))
    return (slice(start, start + step) for start in range(0, len(data.queries), step))


def _accuracy(right: Tensor, resamples: int, seed: int) -> dict[str, float]:
    """Return the mean of (Q,) shares and its bootstrap interval."""
    values, generator = right.numpy(), np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}
