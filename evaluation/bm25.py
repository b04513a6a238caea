"""BM25 beside an embedder: what words alone find."""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .retrieval import Scores
from .retrieval_data import RetrievalData


def bm25_scores(data: RetrievalData, *, k1: float = 1.2, b: float = 0.75) -> Scores:
    """Index the documents by bm25s, in English: lower case, words of two letters or more without stop words, stemmed by
    Porter's rules.

    Args:
        data: the texts.
        k1: how fast a word's repetition stops counting, 0 or more; with `b` the default of Lucene.
        b: how much long documents are held back, from 0 to 1.

    Raises:
        ValueError: if bm25s or its stemmer is not installed, or an argument is out of its range.
    """
    for module, package in (("bm25s", "bm25s"), ("Stemmer", "PyStemmer")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"bm25: needs the package {package}, which is not installed: pip install bm25s[stem]")
    if k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"bm25: got k1 {k1} and b {b}; accepted: 0 or more, and 0 to 1")
    import bm25s
    from Stemmer import Stemmer

    how: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer("porter"), "show_progress": False, "return_ids": False}
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(bm25s.tokenize(list(data.documents.values()), **how), show_progress=False)
    queries: Any = bm25s.tokenize(list(data.queries.values()), **how)

    def scores(part: slice) -> Tensor:
        known = [index.get_tokens_ids(words) for words in queries[part]]
        return torch.from_numpy(np.stack([index.get_scores_from_ids(words) for words in known]))

    return scores
