"""The settings with which a reranker is finetuned, as typed data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..evaluation.long_documents import LongDocuments
from ..harness.settings import Option, check, refused, wrong
from .settings import Count, FinetuningSettings, Positive, Sources, Text

_LIMITS = {"firstp": 512, "maxp": 512, "longp": 1536}
_OF_PASSAGES = ("passage_tokens", "stride", "max_passages")


class RerankerSettings(FinetuningSettings):
    """The settings with which a model is finetuned to score how well documents answer queries.

    Groups of 1 positive and 7 negatives out of BM25's list, 8 groups a step, the learning rate of all weights and the
    limit of 1,536 tokens for long documents are those of RankMamba (arXiv 2403.18276) and of "State Space Models are
    Strong Text Rerankers" (arXiv 2412.14354).
    """

    learning_rates = {"lora": 2e-4, "full": 2e-5}

    train: Annotated[Sources, Option(metavar="DATA")]
    """Folder in BEIR's layout, FOLDER or FOLDER,SPLIT, or .jsonl file of groups; files may be repeated."""
    heldout: Annotated[list[Text], Option(metavar="DATA")] = []
    """The same, for the measurements before and after training; by default a part of the queries of --train."""
    heldout_share: Annotated[float | None, Field(gt=0, lt=1), Option(default="0.2 without --heldout")] = None
    """Share of the queries that is held out, drawn by the seed, if --train is one folder and --heldout is not given."""
    batch_size: Count = 8
    """Groups in one forward pass, in each process: a query with its documents."""
    gradient_accumulation: Count = 1
    """Forward and backward passes in one optimiser step."""
    learning_rate: Annotated[Positive | None, Option(default="2e-4 for adapters, 2e-5 for all weights")] = None
    """Peak learning rate."""
    loss: Literal["lce", "binary", "margin_mse", "listnet", "lambda"] = "lce"
    """lce: cross-entropy of the positive among its group; binary: cross-entropy of each document; margin_mse: margins
    of a teacher's scores, which the files bring; listnet and lambda: graded lists."""
    negatives: Count = 7
    """Documents in a group besides the positive, drawn from the first-stage list of its query; from a group of a .jsonl
    file at most as many with label 0 are drawn."""
    depth: Count = 100
    """Documents of a first-stage list that are used: to draw negatives from, and to re-rank for the measurements. Lists
    from .jsonl files are used whole."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Documents at the top of a first-stage list that are not used as negatives, since they may be relevant without
    being judged."""
    run: Annotated[Text | None, Option(metavar="FILE")] = None
    """First-stage lists for the folder in --train, as a run file in TREC's format; by default BM25's."""
    heldout_run: Annotated[Text | None, Option(metavar="FILE")] = None
    """First-stage lists for the folder in --heldout; by default BM25's."""
    documents: Literal["firstp", "maxp", "longp"] = "firstp"
    """Long documents: firstp reads the beginning, longp the same up to a larger --max-tokens, maxp scores passages and
    takes the best one."""
    max_tokens: Annotated[Count | None, Option(default="512, or 1536 for longp")] = None
    """Tokens of query, document and template together at most; the document is cut."""
    passage_tokens: Count = 256
    """Tokens of a passage (maxp)."""
    stride: Count = 128
    """Tokens between the beginnings of two passages (maxp)."""
    max_passages: Count = 8
    """Passages of a document at most (maxp)."""
    packing: Annotated[bool, Option(negative=True)] = True
    """Put several pairs into a row without padding, or give each a padded row of its own."""

    @property
    def limit(self) -> int:
        """`max_tokens`, or the default of the rule for long documents."""
        return self.max_tokens or _LIMITS[self.documents]

    @property
    def rule(self) -> LongDocuments:
        """The rule for long documents."""
        return LongDocuments(self.documents, self.passage_tokens, self.stride, self.max_passages)

    @property
    def share(self) -> float:
        """`heldout_share`, or its default."""
        return self.heldout_share or 0.2

    @property
    def in_folder(self) -> bool:
        """Whether the training data is a folder in BEIR's layout."""
        return not self.train[0].endswith(".jsonl")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> RerankerSettings:
        for field in ("train", "heldout"):
            given: list[str] = getattr(self, field)
            if len(given) > 1 and not all(source.endswith(".jsonl") for source in given):
                raise wrong(field, given, "one folder, or one or several .jsonl files")
        if not self.heldout and not self.in_folder:
            raise refused("heldout", "must be given where `train` is no folder, got []")
        if self.heldout and self.heldout_share is not None:
            raise refused("heldout_share", f"has no effect where `heldout` is given, got {self.heldout_share}")
        if self.run is not None and not self.in_folder:
            raise refused("run", f"has no effect where `train` is no folder, got {self.run!r}")
        if self.heldout_run is not None and (not self.heldout or self.heldout[0].endswith(".jsonl")):
            raise refused("heldout_run", f"has no effect where `heldout` is no folder, got {self.heldout_run!r}")
        if self.loss == "margin_mse" and self.in_folder:
            raise refused(
                "loss", "'margin_mse' needs a teacher's scores, which .jsonl files may have; `train` is a folder"
            )
        if not self.in_folder and self.heldout[0].endswith(".jsonl") and self.depth != 100:
            raise refused("depth", f"has no effect where `train` and `heldout` are no folders, got {self.depth}")
        if self.skip >= self.depth:
            raise wrong("skip", self.skip, f"less than `depth`, {self.depth}")
        if self.skip and not self.in_folder:
            raise refused("skip", f"has no effect where `train` is no folder, got {self.skip}")
        for field in _OF_PASSAGES:
            value = getattr(self, field)
            if self.documents != "maxp" and value != type(self).model_fields[field].default:
                raise refused(field, f"has no effect with documents {self.documents!r}, got {value}")
        if self.documents == "maxp" and self.stride > self.passage_tokens:
            raise wrong("stride", self.stride, f"at most `passage_tokens`, {self.passage_tokens}")
        if self.documents == "maxp" and self.passage_tokens >= self.limit:
            raise wrong("passage_tokens", self.passage_tokens, f"less than `max_tokens`, {self.limit}")
        return self


def parse_reranker_settings(values: dict[str, Any]) -> RerankerSettings:
    """Check the settings of a finetuning of a reranker; errors as `ssm_zoo.harness.settings.check`."""
    return check(RerankerSettings, values)
