"""What a finetuning of an embedder is, as typed data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .settings import Count, FinetuningSettings, Positive, Text, Utf8, check_settings, wrong


class EmbedderSettings(FinetuningSettings):
    """How a model is finetuned to embed texts, by InfoNCE with the other texts of a batch as negatives.

    The defaults of temperature, batch size, length, learning rate of all weights and pool are those of the masked
    mixers' retrieval (arXiv 2409.01482, `mixer_lm/infonce_retrieval.py` of blbadger/maskedmixers at 19427f3), which
    embeds by the token before the last; here the last real token is read.

    Attributes:
        train: sources of pairs; see `ssm_zoo.training.pairs.read_pairs`.
        heldout: sources of pairs that retrieval is measured on, before and after.
        batch_size: pairs in one forward and backward, in each process. An anchor's negatives are the other positives
            of the batch, those of all processes, and all its hard negatives.
        anchor: column of the texts to search with.
        positive: column of what they should find.
        negatives: columns of what they should not find.
        pooling: "last" embeds a text by its last token's hidden state, "mean" by the mean over its tokens.
        max_tokens: longer texts are cut.
        query_prompt: put before every anchor.
        document_prompt: put before every positive and negative.
        temperature: cosines are divided by it in the loss.
        symmetric: search for the anchor by the positive, too; the loss is the mean of both.
        mini_batch_size: texts in one forward, where a batch does not fit: embeddings are computed twice, the loss is
            the same (GradCache, arXiv 2101.06983). None: all at once.
        pool_size: candidates of the held-out accuracy, the right one included; fewer where there are fewer.
    """

    learning_rates = {"lora": 2e-4, "full": 1e-4}

    batch_size: Count = 32
    anchor: Text = "anchor"
    positive: Text = "positive"
    negatives: list[Text] = []
    pooling: Literal["last", "mean"] = "last"
    max_tokens: Count = 512
    query_prompt: Annotated[str, Utf8] = ""
    document_prompt: Annotated[str, Utf8] = ""
    temperature: Positive = 0.02
    symmetric: bool = False
    mini_batch_size: Count | None = None
    pool_size: Annotated[int, Field(ge=2)] = 32

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> EmbedderSettings:
        columns = [self.anchor, self.positive, *self.negatives]
        if len(set(columns)) < len(columns):
            raise wrong("negatives", self.negatives, f"columns other than {self.anchor!r} and {self.positive!r}, once")
        if self.batch_size == 1 and not self.negatives:
            raise wrong("batch_size", 1, "2 or more: the other pairs of a batch are the negatives")
        if self.mini_batch_size is not None and self.mini_batch_size >= self.batch_size:
            raise wrong("mini_batch_size", self.mini_batch_size, f"less than batch_size, {self.batch_size}")
        return self


def parse_embedder_settings(values: dict[str, Any]) -> EmbedderSettings:
    """Check the settings of a finetuning of an embedder; errors as `ssm_zoo.training.settings.check_settings`."""
    return check_settings(EmbedderSettings, values)
