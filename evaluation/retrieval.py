"""How well the right texts are found: among all documents, and among a few.

A system is whatever scores all documents for some queries, an embedder or BM25; both are measured by the same code.
nDCG, MRR and recall are sentence-transformers'. Every relevant document counts alike there.

Symbols: N documents, R of them relevant to a query, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .embedder import require_sentence_transformers
from .retrieval_data import RetrievalData

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Scores = Callable[[slice], Tensor]
"""Scores (q, N), more for what fits better, of all documents for the queries in a slice."""

CUTOFFS = {"ndcg": (10,), "mrr": (10,), "recall": (10, 100), "accuracy": (1,)}
_DEEPEST = 100
# Bound on the scores alive at one time.
_SCORES_BYTES = 64 * 2**20


def embedder_scores(
    model: SentenceTransformer, data: RetrievalData, *, batch_size: int = 32, progress: bool = False
) -> Scores:
    """Embed all texts, the queries with the embedder's query prompt and the documents with that for documents.

    A document without text has no embedding: its similarity to everything is 0.

    Args:
        model: the embedder; its own similarity is used, the cosine if it does not say otherwise.
        data: the texts.
        batch_size: texts in one forward.
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
                f"model: its embeddings of {int(lost.sum()):,} of {len(lost):,} texts ({name} first: number "
                f"{int(lost.nonzero()[0])}) are not finite; nothing is measured"
            )
    documents = embedded.new_zeros(len(texts), embedded.shape[1])
    documents[filled.to(documents.device)] = embedded
    return lambda part: model.similarity(queries[part], documents).cpu()


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
        scores: the system; see :func:`embedder_scores` and `ssm_zoo.evaluation.bm25.bm25_scores`.
        pools: numbers of candidates, each 2 or more, of which one is relevant: drawn among the query's relevant
            documents, and the others among those that are not, the same for every system. A smaller pool is a part of a
            larger one.
        resamples: of the queries, for the interval of a pool's accuracy, positive.
        seed: of the pools and resamples.
        progress: show a progress bar.

    Returns:
        Means over the queries, in [0, 1]: "ndcg@10", "mrr@10", "recall@10", "recall@100" and "accuracy@1" among all
        documents; and "pools": for each "size", the "accuracy" with which the relevant one scores best (shared where it
        scores as others do), and "low" and "high", the 95 % interval of the bootstrap over the queries.

    Raises:
        ValueError: if a pool is smaller than 2 or larger than `data.largest_pool`, or the seed is not in [0, 2^32).
    """
    require_sentence_transformers()
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    for size in pools:
        if not 2 <= size <= data.largest_pool:
            raise ValueError(f"pools: got {size}; accepted: 2 to {data.largest_pool}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}; accepted: 0 to {2**32 - 1:,}")
    candidates = draw_pools(data, max(pools), seed)
    identities = list(data.documents)
    hits: list[list[dict[str, Any]]] = []
    right: dict[int, list[Tensor]] = {size: [] for size in pools}
    for part in tqdm(list(_parts(data)), desc="rank", leave=False, disable=not progress):
        scored = scores(part).float()
        # Stable: documents that score alike come in the order of the corpus, whatever the device.
        order = scored.argsort(dim=1, descending=True, stable=True)[:, :_DEEPEST]
        for row, places in zip(scored.gather(1, order).tolist(), order.tolist(), strict=True):
            ranked = zip(places, row, strict=True)
            hits.append([{"corpus_id": identities[place], "score": score} for place, score in ranked])
        among = scored.gather(1, candidates[part])
        for size in pools:
            best = among[:, :size].amax(dim=1, keepdim=True)
            tied = among[:, :size] == best
            right[size].append(tied[:, 0].double() / tied.sum(dim=1))
    evaluator = InformationRetrievalEvaluator(
        dict(data.queries),
        dict(data.documents),
        {query: set(relevant) for query, relevant in data.relevant.items()},
        ndcg_at_k=list(CUTOFFS["ndcg"]),
        mrr_at_k=list(CUTOFFS["mrr"]),
        precision_recall_at_k=list(CUTOFFS["recall"]),
        accuracy_at_k=list(CUTOFFS["accuracy"]),
        map_at_k=[_DEEPEST],
    )
    means = evaluator.compute_metrics(hits)  # pyright: ignore[reportArgumentType]
    measured: dict[str, Any] = {
        f"{name}@{cutoff}": float(means[f"{name}@k"][cutoff]) for name, cutoffs in CUTOFFS.items() for cutoff in cutoffs
    }
    measured["pools"] = [{"size": size, **_accuracy(torch.cat(right[size]), resamples, seed)} for size in pools]
    return measured


def chance_levels(data: RetrievalData, pools: Sequence[int] = (32,)) -> dict[str, Any]:
    """What a ranking at random gives on average, exactly, under the names of :func:`evaluate_retrieval`."""
    number, levels = len(data.documents), {}
    counts = [len(relevant) for relevant in data.relevant.values()]
    for name, cutoffs in CUTOFFS.items():
        for cutoff in cutoffs:
            of_one = {count: _chance(name, cutoff, number, count) for count in set(counts)}
            levels[f"{name}@{cutoff}"] = math.fsum(of_one[count] for count in counts) / len(counts)
    return {**levels, "pools": [{"size": size, "accuracy": 1 / size} for size in pools]}


def _chance(name: str, cutoff: int, number: int, count: int) -> float:
    """The mean of a measure over all orders of N documents, R of them relevant."""
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
    """(Q, size) places of documents: for each query a relevant one, then others that are not, all different."""
    place = {identity: index for index, identity in enumerate(data.documents)}
    pools = []
    for index, relevant in enumerate(data.relevant.values()):
        generator = np.random.default_rng([seed, index])
        known = sorted(place[identity] for identity in relevant)
        first = known[generator.integers(len(known))]
        # A whole order, so that a smaller pool is the beginning of a larger one.
        order = generator.permutation(len(place))
        pools.append([first, *order[~np.isin(order, known)][: size - 1].tolist()])
    return torch.tensor(pools)


def _parts(data: RetrievalData) -> Iterator[slice]:
    step = max(1, _SCORES_BYTES // (4 * len(data.documents)))
    return (slice(start, start + step) for start in range(0, len(data.queries), step))


def _accuracy(right: Tensor, resamples: int, seed: int) -> dict[str, float]:
    """The mean of (Q,) shares and its interval."""
    values, generator = right.numpy(), np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}
