"""The settings with which a model is trained to translate, as typed data."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..harness.settings import Option, accept, check, refused, wrong
from .from_scratch_settings import SMALLEST_VOCABULARY, number, warmup_length, warmup_of
from .settings import Count, FinetuningSettings, NonNegative, Positive, Sources, Text

# With PAD, SEP and BOS.
_SMALLEST = SMALLEST_VOCABULARY + 3


class TranslationSettings(FinetuningSettings):
    """The settings with which a model learns to translate, a new one or a pretrained one.

    Weight decay and schedule are those of arXiv 2407.05489 (AdamW, 1e-3, inverse square root). The paper smoothes the
    labels of one of its models only; here it is one setting, the same for every model.
    """

    learning_rates = {"lora": 2e-4, "full": 5e-5}
    learning_rate_of_new_models: ClassVar[float] = 1e-3
    """Default learning rate of a new model."""

    model: Annotated[Text, Option(argument=True, metavar="MODEL")]
    """Folder or Hub id of a zoo model with its tokenizer, or folder of a run. With --train-tokenizer a new model is
    trained, and this gives its sizes: a preset, a .yaml or .json file, or a folder or Hub id of a zoo model."""
    train: Annotated[Sources, Option(metavar="PAIRS")]
    """Pairs to train on: SOURCE,TARGET (two files, a text on every line), .tsv, .jsonl (also with .gz), .parquet, or
    datasets:PATH,SPLIT; may be repeated."""
    heldout: Annotated[Sources, Option(metavar="PAIRS")]
    """Pairs on which the loss is measured before and after training; may be repeated."""
    source_field: Annotated[Text | None, Option(metavar="NAME", default="source")] = None
    """Field of the texts to translate; in a .tsv file the number of its column."""
    target_field: Annotated[Text | None, Option(metavar="NAME", default="target")] = None
    """Field of the translations; in a .tsv file the number of its column."""
    reverse: bool = False
    """Translate from the target to the source."""
    train_tokenizer: Annotated[int | None, Field(ge=_SMALLEST), Option(metavar="N")] = None
    """Train a new model, with a byte-level BPE of N entries for both languages learnt from the training pairs."""
    overrides: Annotated[list[Text], Option(name="--set", metavar="KEY=VALUE")] = []
    """Replace a configuration key of a new model, e.g. hidden_size=256; may be repeated."""
    separator: Annotated[Text | None, Option(metavar="TOKEN", default="the tokenizer's own, or <sep>")] = None
    """Token between source and target for a pretrained decoder-only model; added to the tokenizer if it has no such
    token."""
    max_tokens: Count = 256
    """Tokens of a source, and of a target, at most."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Leave pairs out that have a longer side, or cut their sides; the report counts them."""
    concatenate: Count = 1
    """Train on random concatenations of up to so many consecutive pairs (CAT-N, arXiv 2407.05489)."""
    packing: Annotated[bool, Option(negative=True)] = True
    """Put several pairs into a row, or one pair into each padded row, with rows of similar length in a batch."""
    row_tokens: Annotated[int, Field(ge=2), Option(default="1024, or as many as the longest pair may have")] = 1024
    """Tokens of a packed row at most; of an encoder-decoder, on either side."""
    batch_size: Annotated[Count, Option(default="4, or 64 with --no-packing")] = 4
    """Rows in one forward pass, in each process."""
    gradient_accumulation: Count = 1
    """Forward and backward passes in one optimiser step."""
    method: Annotated[Literal["lora", "full"], Option(default="full with --train-tokenizer, otherwise lora")] = "lora"
    """Train adapters, which are merged into the weights at the end, or all weights."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target's probability that training spreads over the whole vocabulary. Held-out losses have none."""
    residual_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the outputs of mixers and MLPs that is dropped in training, below 1."""
    learning_rate: Annotated[
        Positive | None, Option(default="1e-3 for a new model, 2e-4 for adapters, 5e-5 for all weights of another")
    ] = None
    """Peak learning rate."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """Learning rate after the warm-up; inverse_sqrt is the peak times the root of warm-up steps over steps."""
    warmup: Annotated[
        int | float,
        accept("a whole number of steps, or a share from 0.0 to 0.5", warmup_of),
        Option(metavar="N|SHARE", parse=number, default="0.05"),
    ] = 0.05
    """Number of steps, or share of all steps, in which the learning rate rises from 0."""
    weight_decay: NonNegative = 1e-3
    """Decoupled weight decay of the matrices; the SSMs' decay rates are left out."""
    evaluate_every: Count | None = None
    """Optimiser steps between two held-out losses during training; without it there are none."""

    @property
    def is_new(self) -> bool:
        """Whether a new model is trained."""
        return self.train_tokenizer is not None

    @property
    def peak_learning_rate(self) -> float:
        new = self.learning_rate_of_new_models if self.is_new else None
        return self.learning_rate or new or self.learning_rates[self.method]

    def check_row_tokens(self, longest: int) -> TranslationSettings:
        """Return the settings with rows that have room for the longest pair, if `row_tokens` is not given.

        Args:
            longest: tokens of a pair with `max_tokens` on both sides, in the sequences of the model.

        Raises:
            ValueError: if `row_tokens` is given and less.
        """
        if not self.packing or self.row_tokens >= longest:
            return self
        if "row_tokens" in self.model_fields_set:
            raise ValueError(
                f"`row_tokens` must be at least {longest}, so that a pair with `max_tokens` {self.max_tokens} a side "
                f"fits into a row, got {self.row_tokens}."
            )
        return self.model_copy(update={"row_tokens": longest})

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `read_parallel` on the form of the data."""
        return {"source_field": self.source_field, "target_field": self.target_field, "reverse": self.reverse}

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of so many steps.

        Raises:
            ValueError: if the run is not longer than its warm-up.
        """
        # The schedule is defined by its warm-up, so there is at least one step.
        return warmup_length(self.warmup, steps, least=int(self.schedule == "inverse_sqrt"))

    def optimisation(self, steps: int) -> dict[str, Any]:
        return super().optimisation(steps) | {"warmup_steps": self.warmup_steps(steps)}

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> TranslationSettings:
        if self.is_new:
            if self.method == "lora":
                raise wrong("method", self.method, "'full' with `train_tokenizer`, as a new model has no base")
            if self.separator is not None:
                raise refused("separator", f"has no effect with `train_tokenizer`, got {self.separator!r}")
        elif self.overrides:
            raise refused("overrides", f"has no effect without `train_tokenizer`, got {self.overrides!r}")
        if not self.packing and "row_tokens" in self.model_fields_set:
            raise refused("row_tokens", f"has no effect without `packing`, got {self.row_tokens}")
        if self.schedule == "inverse_sqrt" and self.warmup == 0:
            accepted = "above 0 with schedule 'inverse_sqrt', which starts from it"
            raise wrong("warmup", self.warmup, accepted)
        return self


def parse_translation_settings(values: dict[str, Any]) -> TranslationSettings:
    """Check the settings of a training to translate; errors as `ssm_zoo.harness.settings.check`."""
    defaults: dict[str, Any] = {}
    if values.get("train_tokenizer") is not None:
        defaults["method"] = "full"
    if values.get("packing") is False:
        defaults["batch_size"] = 64
    return check(TranslationSettings, {**defaults, **values})
