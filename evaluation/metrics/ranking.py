"""Metrics of rankings, computed by ir_measures."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import Value

from .metric import ZooMetric, require_package

# Names of ir_measures: MRR is the mean of RR, and the accuracy at k the share of queries with a success by rank k.
_MEASURES = {"ndcg": "nDCG", "mrr": "RR", "recall": "R", "accuracy": "Success", "precision": "P", "map": "AP"}


class Ranking(ZooMetric):
    """Means over the queries of measures of their rankings, by names such as "ndcg@10".

    Inputs: for every query, `predictions`: ids of documents, best first; `references`: ids of its relevant documents.
    All relevant documents count alike; nDCG has trec_eval's linear gain.
    """

    INPUTS = {"predictions": [Value("string")], "references": [Value("string")]}

    def __init__(self, measures: Sequence[str] = ("ndcg@10", "mrr@10"), **options: Any) -> None:
        """Create an empty metric.

        Args:
            measures: ndcg, mrr, recall, accuracy, precision or map, each with @ and a number of ranks.
            **options: see :class:`ZooMetric`.

        Raises:
            ValueError: if there is no such measure, or ir_measures is not installed.
        """
        require_package("ir_measures", "ir-measures", type(self).__name__)
        import ir_measures

        self.measures: dict[str, Any] = {}
        for name in measures:
            parts = re.fullmatch(rf"({'|'.join(_MEASURES)})@([1-9]\d*)", name)
            if parts is None:
                known = ", ".join(_MEASURES)
                raise ValueError(f"`measures` must be of {known}, with a number of ranks as in ndcg@10, got {name!r}")
            self.measures[name] = getattr(ir_measures, _MEASURES[parts[1]]) @ int(parts[2])
        super().__init__(**options)

    def _compute(
        self, *, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        import ir_measures

        run, judged = {}, {}
        for number, (ranked, relevant) in enumerate(zip(predictions, references, strict=True)):
            if len(set(ranked)) < len(ranked):
                raise ValueError(f"`predictions` must not name a document twice, as those of query {number} do")
            if not relevant:
                raise ValueError(f"`references` must name a relevant document for every query, got none for {number}")
            # The score is the rank alone, so that the order of documents with equal scores is the caller's.
            run[str(number)] = {document: -float(rank) for rank, document in enumerate(ranked)}
            judged[str(number)] = dict.fromkeys(relevant, 1)
        found = ir_measures.calc_aggregate(self.measures.values(), judged, run)
        return {name: float(found[measure]) for name, measure in self.measures.items()}
