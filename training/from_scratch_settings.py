"""What a training from scratch is, as typed data, and the papers' recipes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .settings import Count, NonNegative, Positive, Text, TrainingSettings, check_settings, wrong

# The 256 bytes and the end of a text.
_SMALLEST_VOCABULARY = 257

RECIPES: dict[str, dict[str, Any]] = {
    # Mamba (arXiv 2312.00752), appendix E.2, the improved recipe; Mamba-2 (arXiv 2405.21060) takes it over.
    "mamba": {
        # Five times GPT-3's 6e-4 for 125M parameters. For 350M, 760M and 1.3B it is 1.5e-3, 1.25e-3 and 1e-3.
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-5,
        # The length of the warm-up is not given; a twentieth of the steps is ours.
        "warmup": 0.05,
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    },
    # Taipan (arXiv 2410.18572), where a step has half a million tokens.
    "taipan": {
        "learning_rate": 5e-4,
        "final_learning_rate": 1e-5,
        "warmup": 2000,
        # Not given: those of torch's AdamW.
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
}
"""Name to optimiser and schedule: AdamW, linear warm-up, cosine. Norms, biases, decay rates and skips never decay."""


class FromScratchSettings(TrainingSettings):
    """How a causal language model is trained from scratch on text.

    Attributes:
        config: what model: a preset, a .yaml or .json file, a folder or Hub id of a model of the zoo, or a mapping; see
            `ssm_zoo.training.new_model.resolve_configuration`.
        revision: branch, tag or commit, where `config` is a Hub id. A report names the commit.
        overrides: "key=YAML value", to replace configuration keys.
        tokenizer: folder or Hub id of a tokenizer, or "bytes": the 256 bytes.
        train_tokenizer: learn a byte-level BPE of so many entries from the training text, instead of `tokenizer`.
        recipe: what the settings of optimiser and schedule are taken from that are not given.
        learning_rate: peak.
        final_learning_rate: that the cosine ends at.
        warmup: a whole number of steps, or a share of the steps up to 0.5, in which the learning rate rises from 0.
        betas: of AdamW, two numbers below 1.
        weight_decay: of matrices, without the SSMs' decay rates; decoupled.
        max_grad_norm: the gradient is scaled down to this norm.
        evaluate_every: optimiser steps from one held-out loss to the next on the way; None: none on the way.
    """

    config: Text | dict[str, Any]
    revision: Text | None = None
    overrides: list[Text] = []
    tokenizer: Text | None = None
    train_tokenizer: Annotated[int, Field(ge=_SMALLEST_VOCABULARY)] | None = None
    recipe: Literal["mamba", "taipan"] = "mamba"
    learning_rate: Positive
    final_learning_rate: NonNegative
    warmup: int | float
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: NonNegative
    max_grad_norm: Positive
    evaluate_every: Count | None = None

    @field_validator("warmup", mode="before")
    @classmethod
    def _refuse_a_warmup(cls, value: Any) -> Any:
        steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not steps and not (isinstance(value, float) and 0 <= value <= 0.5):
            raise wrong("warmup", value, "a whole number of steps, or a share from 0.0 to 0.5")
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> FromScratchSettings:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise wrong("tokenizer", self.tokenizer, "either a tokenizer or train_tokenizer, how large one to learn")
        if self.final_learning_rate > self.learning_rate:
            raise wrong("final_learning_rate", self.final_learning_rate, f"at most {self.learning_rate}, the peak")
        return self

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up, in a run of so many steps.

        Raises:
            ValueError: if the run is not longer than its warm-up.
        """
        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)
        if warmup >= steps:
            raise ValueError(
                f"warmup: got {warmup} steps in a run of {steps}; accepted: fewer steps than the run has, or a share "
                "of them from 0.0 to 0.5"
            )
        return warmup

    def optimisation(self, steps: int) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            # As a share of the peak: what DeepSpeed makes of an optimiser does not know its peak any more.
            "lr_scheduler_kwargs": {"min_lr_rate": self.final_learning_rate / self.learning_rate},
            "warmup_steps": self.warmup_steps(steps),
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }


def parse_from_scratch(values: dict[str, Any]) -> FromScratchSettings:
    """Check the settings of a training from scratch, those that are not given from the recipe.

    Raises:
        ValueError: as `ssm_zoo.training.settings.check_settings`.
    """
    recipe = values.get("recipe", "mamba")
    defaults = RECIPES.get(recipe) if isinstance(recipe, str) else None
    return check_settings(FromScratchSettings, {**(defaults or RECIPES["mamba"]), **values})
