"""The settings of a training, as typed data, checked before anything is loaded or written.

The docstring of a field is also the help of its command-line option.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from ..harness.settings import Option, SettingsBase, accept, check, refused
from .sources import split_weight

Utf8 = Field(pattern="")
"""Constraint of a text: makes pydantic refuse characters that UTF-8 cannot encode."""
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sources = Annotated[list[Text], Field(min_length=1)]


def names(text: str) -> list[str]:
    """Split a text at its commas; an empty text has no names."""
    return text.split(",") if text else []


def _linear_layers(value: Any) -> str | list[str] | None:
    is_names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    return value if value == "all-linear" or is_names else None


class RunSettings(SettingsBase):
    """The settings that every training has."""

    train: Annotated[Sources, Option(metavar="TEXT")]
    """Training data; may be repeated."""
    heldout: Annotated[Sources, Option(metavar="TEXT")]
    """Data for the measurements before and after training; may be repeated."""
    batch_size: Count = 4
    """Rows in one forward pass, in each process."""
    epochs: Positive = 1.0
    """Passes over the training data."""
    steps: Count | None = None
    """Optimiser steps, instead of --epochs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the forward and backward passes; auto is bfloat16 on a GPU that supports it, float32 elsewhere. The
    trained weights are float32."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and recompute the rest in the backward pass: less memory for one more forward
    pass."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of the rows and dropout."""
    checkpoint_every: Count = 200
    """Optimiser steps between two checkpoints."""
    trust_remote_code: bool = False
    """Run the Python code that a model or tokenizer brings along. Read it first; models of the zoo need none."""
    report_to: Annotated[list[Text], Option(metavar="TRACKER")] = []
    """Tracker that receives the curve during training, by transformers' name: tensorboard (writes to `tensorboard/` in
    the run's folder), trackio, wandb; may be repeated."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that identify a run: all that affect its results."""
        return self.model_dump(mode="json", exclude={"report_to"})

    @model_validator(mode="after")
    def _refuse_two_lengths(self) -> RunSettings:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise refused("steps", f"must be left out where `epochs` is given, got {self.steps}")
        return self

    def optimisation(self, steps: int) -> dict[str, Any]:
        """Return the arguments of transformers' `TrainingArguments` for optimiser and schedule.

        Args:
            steps: optimiser steps of the run.
        """
        raise NotImplementedError


class TrainingSettings(RunSettings):
    """The settings of every training as a language model."""

    train: Annotated[Sources, Option(metavar="TEXT")]
    """Training text: .txt, .jsonl, .parquet, datasets:PATH,SPLIT or builtin:wikitext2; may be repeated."""
    heldout: Annotated[Sources, Option(metavar="TEXT")]
    """Text on which the loss is measured before and after training; may be repeated."""
    separator: Annotated[Text | None, Option(metavar="TEXT", parse=lambda text: text.replace("\\n", "\n"))] = None
    r"""Text between two documents of a .txt file, e.g. \n\n; without it a file is one document."""
    text_field: Annotated[Text, Option(metavar="NAME")] = "text"
    """Field of .jsonl files, .parquet files and data sets that holds the text."""
    streaming: bool = False
    """Read the training text during training instead of before it, from the beginning again when it ends; needs
    --steps. A weight for every --train, e.g. a.txt@0.7 and b.jsonl@0.3, mixes the sources and also streams them."""
    packing: Annotated[bool, Option(negative=True)] = True
    """Put several documents into a row, or give each a padded row of its own."""
    row_tokens: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row at most; longer documents are cut into several rows."""
    gradient_accumulation: Count = 1
    """Forward and backward passes in one optimiser step."""

    @property
    def mixture(self) -> list[tuple[str, float | None]]:
        """The training sources, each with its weight or None."""
        return [split_weight(source) for source in self.train]

    @property
    def streamed(self) -> bool:
        """Whether the training text is read during training."""
        return self.streaming or any(weight is not None for _, weight in self.mixture)

    @property
    def identity(self) -> dict[str, Any]:
        values = super().identity
        if not self.streaming:
            del values["streaming"]  # runs of earlier versions do not have this key
        return values

    @model_validator(mode="after")
    def _refuse_streams_without_end(self) -> TrainingSettings:
        try:
            weighted = [weight is not None for _, weight in self.mixture]
        except ValueError as error:
            raise refused("train", str(error)) from None
        if any(weighted) and not all(weighted):
            raise refused("train", f"must give a weight to every source or to none, got {self.train!r}")
        if self.streamed and self.steps is None:
            raise refused("steps", "must be given for a streamed training text, which has no end, got None")
        return self


Settings = TypeVar("Settings", bound=TrainingSettings)


class FinetuningSettings(RunSettings):
    """The settings of every finetuning of a model."""

    learning_rates: ClassVar[dict[str, float]]
    """Default learning rate by method."""

    model: Annotated[Text, Option(argument=True, metavar="MODEL")]
    """Folder or Hub id of a zoo model with its tokenizer, or folder of a run."""
    revision: Annotated[Text | None, Option(metavar="REVISION")] = None
    """Branch, tag or commit, if MODEL is a Hub id."""
    method: Literal["lora", "full"] = "lora"
    """Train adapters, or all weights."""
    rank: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' inputs that is dropped in training, below 1."""
    dora: bool = False
    """Train weight-decomposed adapters (DoRA, arXiv 2402.09353)."""
    target_modules: Annotated[
        str | list[str],
        accept("'all-linear', or a list of names of linear layers", _linear_layers),
        Option(metavar="NAMES", parse=lambda text: text if text == "all-linear" else names(text)),
    ] = "all-linear"
    """Linear layers that get adapters, e.g. in_proj,out_proj; all-linear is all but the LM head."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at 0."""
    warmup: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the steps in which the learning rate rises from 0, at most 0.5."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the matrices; the SSMs' decay rates are left out."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger norm are scaled down to it."""

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the method's default."""
        return self.learning_rate or self.learning_rates[self.method]

    def optimisation(self, steps: int) -> dict[str, Any]:
        return {
            "learning_rate": self.peak_learning_rate,
            "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(self.schedule, self.schedule),
            "warmup_steps": round(self.warmup * steps),
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> FinetuningSettings:
        if self.method == "full":
            for field in ("rank", "alpha", "dropout", "dora", "target_modules", "load_in_4bit"):
                known = type(self).model_fields.get(field)
                if known is not None and getattr(self, field) != known.default:
                    value = getattr(self, field)
                    raise refused(field, f"has no effect with method 'full', which has no adapters, got {value!r}")
        return self


class LanguageModelSettings(FinetuningSettings, TrainingSettings):
    """The settings with which a causal language model is finetuned on text."""

    # For adapters peft's usual rate; for all weights a tenth of a usual rate of pretraining.
    learning_rates = {"lora": 2e-4, "full": 5e-5}

    examples: Literal["text", "messages", "prompt_completion"] = "text"
    """Content of the rows of files and data sets: text; messages, a conversation for the tokenizer's chat template; or
    prompt_completion, a prompt and its completion. For the last two the loss is on the answers only."""
    learning_rate: Annotated[Positive | None, Option(default="2e-4 for adapters, 5e-5 for all weights")] = None
    """Peak learning rate."""
    load_in_4bit: bool = False
    """Keep the linear layers of the base model in 4 bits (QLoRA, arXiv 2305.14314); needs bitsandbytes."""

    @property
    def identity(self) -> dict[str, Any]:
        values = super().identity
        if self.examples == "text":
            del values["examples"]  # runs of earlier versions do not have this key
        return values

    @model_validator(mode="after")
    def _refuse_settings_of_text(self) -> LanguageModelSettings:
        for field in ("separator", "text_field"):
            value = getattr(self, field)
            if self.examples != "text" and value != type(self).model_fields[field].default:
                raise refused(field, f"has no effect with examples {self.examples!r}, got {value!r}")
        return self


def parse_settings(values: dict[str, Any]) -> LanguageModelSettings:
    """Check the settings of a finetuning; errors as `ssm_zoo.harness.settings.check`."""
    return check(LanguageModelSettings, values)
