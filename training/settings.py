"""What a training is, as typed data, checked before anything is loaded or written."""

from __future__ import annotations

import difflib
import reprlib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

Utf8 = Field(pattern="")
"""Of a text: pydantic looks into it and refuses what UTF-8 cannot hold."""
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# What has no effect without adapters, with its default.
_ADAPTER_FIELDS = ("rank", "alpha", "dropout", "dora", "target_modules", "load_in_4bit")


class RunSettings(BaseModel):
    """What every training is given.

    Attributes:
        train: sources of what is trained on.
        heldout: sources of what is measured on, before and after.
        batch_size: rows in one forward and backward, in each process.
        epochs: passes over what is trained on.
        steps: optimiser steps, instead of `epochs`.
        dtype: what forward and backward compute in; the trained weights are float32. "auto": bfloat16 on a GPU that
            has it, float32 elsewhere.
        gradient_checkpointing: keep the blocks' inputs alone and compute the rest anew in the backward.
        seed: of the initial weights, the order of the rows and dropout.
        checkpoint_every: optimiser steps from one checkpoint to the next.
        trust_remote_code: run the Python code that a model's or tokenizer's source brings.
        report_to: trackers that get the curve while it grows: "tensorboard" (in `tensorboard/` of the run's folder),
            "trackio", "wandb", or others that transformers knows by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: Annotated[list[Text], Field(min_length=1)]
    heldout: Annotated[list[Text], Field(min_length=1)]
    batch_size: Count = 4
    epochs: Positive = 1.0
    steps: Count | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    checkpoint_every: Count = 200
    trust_remote_code: bool = False
    report_to: list[Text] = []

    @property
    def identity(self) -> dict[str, Any]:
        """What a run computes, by which its folder is recognised: everything but where it reports to."""
        return self.model_dump(mode="json", exclude={"report_to"})

    @model_validator(mode="after")
    def _refuse_two_lengths(self) -> RunSettings:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise wrong("steps", self.steps, "either steps or epochs, not both")
        return self

    def optimisation(self, steps: int) -> dict[str, Any]:
        """Arguments of transformers' `TrainingArguments` for optimiser and schedule, in a run of so many steps."""
        raise NotImplementedError


class TrainingSettings(RunSettings):
    """What every training as a language model, on text, is given.

    Attributes:
        train: sources of the training text; see `ssm_zoo.training.texts.read_documents`.
        heldout: sources of the text that the loss is measured on, before and after.
        separator: what stands between the documents of a text file; None: a file is one document.
        text_field: where JSON lines and data sets hold the text.
        packing: put several documents into a row; False: each has a padded row of its own.
        row_tokens: most tokens of a row, 2 or more; longer documents are cut.
        gradient_accumulation: forwards and backwards in one optimiser step.
    """

    separator: Text | None = None
    text_field: Text = "text"
    packing: bool = True
    row_tokens: Annotated[int, Field(ge=2)] = 1024
    gradient_accumulation: Count = 1


Settings = TypeVar("Settings", bound=TrainingSettings)
Checked = TypeVar("Checked", bound=BaseModel)


class FinetuningSettings(RunSettings):
    """What every finetuning of a model is given.

    Attributes:
        model: folder or Hub id of the base model, with its tokenizer.
        revision: branch, tag or commit, for a Hub id.
        method: "lora" trains adapters, "full" all weights.
        rank: r of the adapters.
        alpha: their output is scaled by alpha / rank.
        dropout: share of the adapters' inputs that are dropped in training, below 1.
        dora: weight-decomposed adapters (DoRA, arXiv 2402.09353).
        target_modules: names of the linear layers that get adapters, or "all-linear": all but the head.
        learning_rate: peak; None: the method's own in `learning_rates`.
        schedule: what follows the warm-up; "cosine" and "linear" end at 0.
        warmup: share of the steps in which the learning rate rises from 0, at most 0.5.
        weight_decay: of matrices, without the SSMs' decay rates; decoupled.
        max_grad_norm: the gradient is scaled down to this norm.
    """

    learning_rates: ClassVar[dict[str, float]]
    """Method to learning rate where none is given."""

    model: Text
    revision: Text | None = None
    method: Literal["lora", "full"] = "lora"
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dora: bool = False
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    learning_rate: Positive | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the method's own."""
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
        if self.target_modules == []:
            raise wrong("target_modules", [], "'all-linear', or the names of one linear layer or more")
        if self.method == "full":
            for field in _ADAPTER_FIELDS:
                known = type(self).model_fields.get(field)
                if known is not None and getattr(self, field) != known.default:
                    raise wrong(field, getattr(self, field), "nothing with method 'full', where there are no adapters")
        return self


class LanguageModelSettings(FinetuningSettings, TrainingSettings):
    """How a causal language model is finetuned on text.

    Attributes:
        load_in_4bit: keep the base model's linear layers in 4 bits (QLoRA, arXiv 2305.14314); needs bitsandbytes.
    """

    # peft's usual one for adapters, and a tenth of what one pretrains with.
    learning_rates = {"lora": 2e-4, "full": 5e-5}

    load_in_4bit: bool = False


def parse_settings(values: dict[str, Any]) -> LanguageModelSettings:
    """Check the settings of a finetuning; errors as :func:`check_settings`."""
    return check_settings(LanguageModelSettings, values)


def check_settings(kind: type[Checked], values: dict[str, Any]) -> Checked:
    """Check settings of a kind.

    Raises:
        ValueError: with a sentence for every field that is unknown, missing or has a value that is not accepted, in the
            order of `values`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        position = {field: number for number, field in enumerate(values)}
        details = sorted(
            error.errors(include_url=False), key=lambda d: position.get(".".join(map(str, d["loc"][:1])), len(position))
        )
        # A union is wrong in each of its members: one sentence will do.
        problems = {str(detail["loc"][:1]): _describe(detail, kind) for detail in details}
        raise ValueError("\n".join(problems.values())) from None


def wrong(field: str, value: Any, accepted: str) -> PydanticCustomError:
    """What a validator raises: the field, the value, what is accepted."""
    text = "{field}: got {value}; accepted: {accepted}"
    return PydanticCustomError("wrong_field", text, {"field": field, "value": repr(value), "accepted": accepted})


def _describe(detail: ErrorDetails, settings: type[BaseModel]) -> str:
    """The field, the value, what is accepted."""
    kind, field = detail["type"], ".".join(map(str, detail["loc"][:1]))
    if kind == "wrong_field":
        return detail["msg"]
    if kind == "missing":
        return f"{field}: missing"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(field, settings.model_fields, n=1)
        suggestion = f"; did you mean {close[0]!r}?" if close else ""
        return f"{field}: unknown{suggestion}"
    if field == "target_modules":
        accepted = "'all-linear', or a list of names of linear layers"
    else:
        accepted = detail["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    return f"{field}: got {reprlib.repr(detail['input'])}; accepted: {accepted}"
