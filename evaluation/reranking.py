"""Re-rank first-stage lists with a cross-encoder, and measure the result.

How a long document is scored is the model's own: `ssm_zoo.evaluation.long_documents`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..conversion.load_model import check_finite, quiet_loading
from ..conversion.remote_code import check_remote_code
from .embedder import require_sentence_transformers
from .long_documents import TRUNCATION, LongDocuments, long_documents
from .reranking_data import JudgedCollection, Run, cut, trec_order

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

# Texts that are tokenised at a time to count their tokens.
_CHUNK = 256


def load_reranker(
    source: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    field: str = "model",
) -> CrossEncoder:
    """Load a cross-encoder with one score that sentence-transformers or `ssm-zoo finetune rerank` has saved.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit, for a Hub id.
        device: device of the model; None: the choice of sentence-transformers.
        trust_remote_code: run the code that the source brings.
        field: what to call the source in an error.

    Raises:
        ValueError: if sentence-transformers is not installed, the source is a plain language model without a score,
            has several scores, or its weights are missing or not finite.
    """
    require_sentence_transformers()
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification

    from ..conversion.load_model import load_model

    check_remote_code(
        source, trusted=trust_remote_code, field=field, revision=revision, auto_class="AutoModel", tokenizer=True
    )
    # Loaded once more without memory for the weights: sentence-transformers does not report a missing score.
    plain = load_model(
        source,
        AutoModelForSequenceClassification,
        field=field,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device_map="meta",
    )
    if plain.config.num_labels != 1:
        raise ValueError(f"`{field}` must be a reranker with one score, got {source} with {plain.config.num_labels}.")
    with quiet_loading(source, field):
        reranker = CrossEncoder(source, revision=revision, device=device, trust_remote_code=trust_remote_code)
    check_finite(reranker, f"{field}: {source}")
    return reranker


def pair_scores(
    reranker: CrossEncoder,
    pairs: Sequence[tuple[str, str]],
    rule: LongDocuments,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[float]:
    """Return the score of each (query, document) pair: the logit, without an activation.

    Args:
        reranker: the cross-encoder, whose own tokenizer makes the text of a pair.
        pairs: the pairs.
        rule: rule for long documents.
        batch_size: texts in one forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: if a score is not finite, or a query leaves no room for a document in a model that cuts documents
            alone. Others cut the query, too.
    """
    parts: dict[str, list[str]] = {}
    for _, document in pairs:
        if document not in parts:
            parts[document] = rule.parts(reranker.tokenizer, document)
    limit = reranker.max_seq_length
    if limit is not None and _cuts_documents_alone(reranker):
        queries = {query for query, _ in pairs}
        check_queries(
            *(reranker.tokenizer, queries, limit),
            name="the reranker's limit of tokens",
            remedy="Shorten the query, or leave it out.",
        )
    texts = [(query, part) for query, document in pairs for part in parts[document]]
    if not texts:
        return []
    scores: Any = reranker.predict(
        texts, batch_size=batch_size, show_progress_bar=progress, activation_fn=nn.Identity(), convert_to_tensor=True
    )
    values, best, place = scores.float().cpu(), [], 0
    for query, document in pairs:
        count = len(parts[document])
        best.append(float(values[place : place + count].max()))
        if not math.isfinite(best[-1]) or not bool(values[place : place + count].isfinite().all()):
            raise ValueError(f"the scores must be finite, but that of the query {query!r:.80} is {best[-1]}.")
        place += count
    return best


def pair_lengths(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], rule: LongDocuments, limit: int | None
) -> dict[str, float]:
    """Measure (query, document) pairs before they are cut.

    Args:
        tokenizer: the reranker's.
        pairs: the pairs, one or more.
        rule: rule for long documents.
        limit: tokens of a text at most; None: there is no limit.

    Returns:
        "tokens", the mean number of tokens of the texts that are scored, of which a passage is one; "cut", the share
        of the pairs of which a part is not read; and "largest", the largest token id.
    """
    parts: dict[str, list[str]] = {}
    cut: set[int] = set()
    texts: list[tuple[int, str, str]] = []
    short: set[str] = set()  # documents whose passages reach their end
    for number, (query, document) in enumerate(pairs):
        if document not in parts:
            parts[document] = rule.parts(tokenizer, document)
            if rule.has_all(tokenizer, document):
                short.add(document)
        if document not in short:
            cut.add(number)
        texts += [(number, query, part) for part in parts[document]]
    tokens = largest = 0
    for start in range(0, len(texts), _CHUNK):
        numbers, queries, documents = zip(*texts[start : start + _CHUNK], strict=True)
        encoded = tokenizer(list(queries), list(documents), truncation=False, verbose=False)["input_ids"]
        largest = max(largest, *map(max, encoded))
        tokens += sum(map(len, encoded))
        cut.update(one for one, ids in zip(numbers, encoded, strict=True) if limit is not None and len(ids) > limit)
    return {"tokens": tokens / len(texts), "cut": len(cut) / len(pairs), "largest": largest}


def _cuts_documents_alone(reranker: CrossEncoder) -> bool:
    transformer: Any = reranker[0]
    options = getattr(transformer, "processing_kwargs", None) or {}
    return {**options.get("common", {}), **options.get("text", {})}.get("truncation") == TRUNCATION


def check_queries(
    tokenizer: Any,
    queries: set[str],
    limit: int,
    *,
    name: str = "`max_tokens`",
    remedy: str = "Raise it, or shorten the query.",
) -> None:
    """Check that every query leaves room for at least one token of a document: only documents are cut.

    Args:
        tokenizer: tokenizer with the template of pairs.
        queries: texts of the queries.
        limit: tokens of a pair at most.
        name: what to call the limit in an error.
        remedy: last sentence of the error.

    Raises:
        ValueError: naming the longest query.
    """
    texts = sorted(queries)
    encoded = tokenizer(texts, [""] * len(texts), truncation=False, verbose=False)["input_ids"] if texts else []
    longest = max(range(len(texts)), key=lambda index: len(encoded[index]), default=None)
    if longest is not None and len(encoded[longest]) >= limit:
        raise ValueError(
            f"{name}, {limit:,}, must leave room for a document beside every query, but the query "
            f"{texts[longest]!r:.80} and the template have {len(encoded[longest]):,} tokens. {remedy}"
        )


def rerank(
    reranker: CrossEncoder,
    collection: JudgedCollection,
    run: Run,
    *,
    depth: int | None = 100,
    rule: LongDocuments | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Score the best documents of every query's list again.

    Args:
        reranker: the cross-encoder.
        collection: texts of queries and documents.
        run: first-stage lists.
        depth: documents of each list, by `trec_order`; the others are not in the result. None: all.
        rule: rule for long documents; None: that of the model's configuration.
        batch_size: texts in one forward pass.
        progress: show a progress bar.

    Returns:
        The lists with the new scores. Errors are those of :func:`pair_scores`.
    """
    if rule is None:
        transformer: Any = reranker[0]
        rule = long_documents(transformer.model.config)
    lists = cut(run, depth)
    pairs = [
        (collection.queries[query], collection.documents[document])
        for query, documents in lists.items()
        for document in documents
    ]
    with torch.no_grad():
        scores = iter(pair_scores(reranker, pairs, rule, batch_size=batch_size, progress=progress))
    return {query: {document: next(scores) for document in documents} for query, documents in lists.items()}


def measure_names(depth: int | None) -> dict[str, str]:
    """Return the measures of a run cut at `depth`, or whole with None: our names, and those of ir_measures."""
    names = {"ndcg@10": "nDCG@10", "mrr@10": "RR@10", "map": "AP", "recall@10": "R@10"}
    return names | ({f"recall@{depth}": f"R@{depth}"} if depth not in (None, 10) else {})


def measure_run(collection: JudgedCollection, run: Run, depth: int | None) -> dict[str, dict[str, float]]:
    """Measure a run by ir_measures, query by query.

    nDCG has trec_eval's linear gain of the grades. Recall, MRR and MAP count every grade above 0 alike, among all
    relevant documents of the collection, in the list or not. Equal scores are ordered as trec_eval does.

    Args:
        collection: the judgements.
        run: the lists, of which the best `depth` documents count; a query without a list has the value 0.
        depth: as above; None: all documents, without a recall at this depth.

    Returns:
        Name of each measure to query id to its value in [0, 1].

    Raises:
        ValueError: if ir_measures is not installed.
    """
    from .metrics.metric import require_package

    require_package("ir_measures", "ir-measures", "reranking")
    import ir_measures

    names = measure_names(depth)
    # The score is the rank alone, since the providers of ir_measures break ties differently.
    ranked = {
        query: {document: -float(rank) for rank, document in enumerate(trec_order(scores)[:depth])}
        for query, scores in run.items()
        if scores
    }
    judged = {query: dict(grades) for query, grades in collection.grades.items()}
    measures = {ir_measures.parse_measure(theirs): ours for ours, theirs in names.items()}
    values = {name: dict.fromkeys(collection.queries, 0.0) for name in names}
    if ranked:
        for found in ir_measures.iter_calc(list(measures), judged, ranked):
            values[measures[found.measure]][found.query_id] = float(found.value)
    return values


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the queries of each measure."""
    return {name: math.fsum(of.values()) / len(of) for name, of in values.items()}
