"""The settings with which an embedder is finetuned, as typed data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..harness.settings import Option, check, refused, wrong
from .settings import Count, FinetuningSettings, Positive, Sources, Text, Utf8, names


class EmbedderSettings(FinetuningSettings):
    """The settings with which a model is finetuned to embed texts, by InfoNCE with in-batch negatives.

    The defaults of temperature, batch size, length, learning rate of all weights and pool are those of the masked
    mixers' retrieval (arXiv 2409.01482, `mixer_lm/infonce_retrieval.py` of blbadger/maskedmixers at 19427f3), which
    embeds by the token before the last; here the last real token is read.
    """

    learning_rates = {"lora": 2e-4, "full": 1e-4}

    train: Annotated[Sources, Option(metavar="PAIRS")]
    """Pairs to train on: .jsonl, .parquet, .csv, .tsv or datasets:PATH,SPLIT; may be repeated."""
    heldout: Annotated[Sources, Option(metavar="PAIRS")]
    """Pairs on which retrieval is measured before and after training; may be repeated."""
    batch_size: Count = 32
    """Pairs in one step, in each process. The texts of the other pairs are the negatives of an anchor."""
    learning_rate: Annotated[Positive | None, Option(default="2e-4 for adapters, 1e-4 for all weights")] = None
    """Peak learning rate."""
    anchor: Annotated[Text, Option(metavar="COLUMN")] = "anchor"
    """Column of the texts to search with."""
    positive: Annotated[Text, Option(metavar="COLUMN")] = "positive"
    """Column of the texts that an anchor should find."""
    negatives: Annotated[list[Text], Option(metavar="COLUMNS", parse=names)] = []
    """Columns of texts that an anchor should not find, e.g. negative_1,negative_2."""
    pooling: Literal["last", "mean"] = "last"
    """Embed a text by the hidden state of its last token, or by the mean over its tokens."""
    max_tokens: Count = 512
    """Tokens of a text at most; longer texts are truncated."""
    query_prompt: Annotated[str, Utf8, Option(metavar="TEXT")] = ""
    """Text put before every anchor."""
    document_prompt: Annotated[str, Utf8, Option(metavar="TEXT")] = ""
    """Text put before every positive and negative."""
    temperature: Positive = 0.02
    """Temperature of the loss: cosines are divided by it."""
    symmetric: bool = False
    """Also search for the anchor by the positive; the loss is the mean of both."""
    mini_batch_size: Count | None = None
    """Texts in one forward pass, if a batch does not fit into memory (GradCache, arXiv 2101.06983): embeddings are
    computed twice, the loss is the same."""
    pool_size: Annotated[int, Field(ge=2)] = 32
    """Candidates of the held-out accuracy, including the right one."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> EmbedderSettings:
        columns = [self.anchor, self.positive, *self.negatives]
        if len(set(columns)) < len(columns):
            accepted = f"distinct columns other than {self.anchor!r} and {self.positive!r}"
            raise wrong("negatives", self.negatives, accepted)
        if self.batch_size == 1 and not self.negatives:
            raise refused("batch_size", "must be at least 2, got 1: the other pairs of a batch are the negatives")
        if self.mini_batch_size is not None and self.mini_batch_size >= self.batch_size:
            raise wrong("mini_batch_size", self.mini_batch_size, f"less than `batch_size`, {self.batch_size}")
        return self


def parse_embedder_settings(values: dict[str, Any]) -> EmbedderSettings:
    """Check the settings of a finetuning of an embedder; errors as `ssm_zoo.harness.settings.check`."""
    return check(EmbedderSettings, values)
