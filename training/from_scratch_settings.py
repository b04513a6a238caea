"""The settings of a training from scratch, as typed data, and the recipes of the papers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..harness.settings import Option, accept, check, refused, wrong
from .objective_settings import ObjectiveMix, read_mix
from .settings import Count, NonNegative, Positive, Text, TrainingSettings

SMALLEST_VOCABULARY = 257
"""Entries of the smallest byte-level vocabulary: the 256 bytes and the end-of-text token."""

RECIPES: dict[str, dict[str, Any]] = {
    # Mamba (arXiv 2312.00752), appendix E.2, the improved recipe; Mamba-2 (arXiv 2405.21060) takes it over.
    "mamba": {
        # Five times GPT-3's 6e-4 for 125M parameters. The rates for 350M, 760M and 1.3B are 1.5e-3, 1.25e-3 and 1e-3.
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-5,
        # The paper does not give the length of the warm-up; a twentieth of the steps is our choice.
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
        # The paper does not give the betas; these are the defaults of torch's AdamW.
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
}
"""Optimiser and schedule by name: AdamW, linear warm-up, cosine. Norms, biases, decay rates and skips never decay."""


def number(text: str) -> int | float | str:
    """Return a text as an int or float, or unchanged if it is no number; the settings then refuse it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _configuration(value: Any) -> str | dict[str, Any] | None:
    return value if isinstance(value, dict) or (isinstance(value, str) and value) else None


def warmup_of(value: Any) -> int | float | None:
    """Return a number of warm-up steps or a share of all steps unchanged, and None for anything else."""
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if steps or (isinstance(value, float) and 0 <= value <= 0.5) else None


def warmup_length(warmup: int | float, steps: int, *, least: int = 0) -> int:
    """Return the number of warm-up steps.

    Args:
        warmup: number of steps, or share of all steps.
        steps: optimiser steps of the run.
        least: smallest number that a share stands for.

    Raises:
        ValueError: if the run is not longer than its warm-up.
    """
    length = warmup if isinstance(warmup, int) else max(round(warmup * steps), least)
    if length >= steps:
        raise ValueError(
            f"`warmup` must be shorter than the run, got {length} steps in a run of {steps}. Give fewer, or a share "
            "from 0.0 to 0.5."
        )
    return length


class FromScratchSettings(TrainingSettings):
    """The settings with which a causal language model is trained from scratch on text."""

    config: Annotated[
        str | dict[str, Any],
        accept("a name, a path, a Hub id or a mapping", _configuration),
        Option(argument=True, metavar="CONFIG"),
    ]
    """Name of a preset (e.g. mamba-130m, see `ssm-zoo list`), .yaml or .json file with model_type and configuration
    keys, or folder or Hub id of a zoo model whose sizes to use."""
    revision: Annotated[Text | None, Option(metavar="REVISION")] = None
    """Branch, tag or commit, if CONFIG is a Hub id."""
    overrides: Annotated[list[Text], Option(name="--set", metavar="KEY=VALUE")] = []
    """Replace a configuration key, e.g. hidden_size=256; may be repeated."""
    tokenizer: Annotated[Text | None, Option(metavar="TOKENIZER")] = None
    """Folder or Hub id of a tokenizer, or bytes, whose tokens are the 256 bytes."""
    train_tokenizer: Annotated[int | None, Field(ge=SMALLEST_VOCABULARY), Option(metavar="N")] = None
    """Learn a byte-level BPE with N entries from the training text, instead of --tokenizer."""
    recipe: Literal["mamba", "taipan"] = "mamba"
    """Recipe that supplies the settings of optimiser and schedule that are not given."""
    learning_rate: Annotated[Positive, Option(default="mamba 3e-3 (for 130M parameters), taipan 5e-4")]
    """Peak learning rate."""
    final_learning_rate: Annotated[NonNegative, Option(default="1e-5")]
    """Learning rate at the end of the cosine."""
    warmup: Annotated[
        int | float,
        accept("a whole number of steps, or a share from 0.0 to 0.5", warmup_of),
        Option(metavar="N|SHARE", parse=number, default="mamba 0.05, taipan 2000"),
    ]
    """Number of steps, or share of all steps, in which the learning rate rises from 0."""
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]],
        Field(min_length=2, max_length=2),
        Option(
            metavar="B1,B2",
            parse=lambda text: [number(beta) for beta in text.split(",")],
            default="mamba 0.9,0.95, taipan 0.9,0.999",
        ),
    ]
    """Betas of AdamW, each below 1."""
    weight_decay: Annotated[NonNegative, Option(default="mamba 0.1, taipan 0.01")]
    """Decoupled weight decay of the matrices; the SSMs' decay rates are left out."""
    max_grad_norm: Annotated[Positive, Option(default="1")]
    """Gradients of a larger norm are scaled down to it."""
    evaluate_every: Count | None = None
    """Optimiser steps between two held-out losses during training; without it there are none."""
    objectives: Annotated[
        ObjectiveMix | None, BeforeValidator(read_mix), Option(metavar="MIX|FILE", parse=lambda text: text)
    ] = None
    """Train on a mixture of objectives for recall instead of the next token alone: birdie (fixed rates), birdie_bandit
    (rates chosen during training) or a .yaml file; needs --steps."""

    @property
    def identity(self) -> dict[str, Any]:
        values = super().identity
        if self.objectives is None:
            del values["objectives"]  # runs of earlier versions do not have this key
        return values

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> FromScratchSettings:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            problem = f"or `train_tokenizer` must be given, and not both, got {self.tokenizer!r}"
            raise refused("tokenizer", f"{problem} and {self.train_tokenizer!r}")
        if self.train_tokenizer is not None and self.streamed:
            problem = "cannot be used with a streamed training text: give `tokenizer` instead"
            raise refused("train_tokenizer", f"{problem}, got {self.train_tokenizer}")
        if self.final_learning_rate > self.learning_rate:
            raise wrong("final_learning_rate", self.final_learning_rate, f"at most the peak, {self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _check_objectives(self) -> FromScratchSettings:
        if self.objectives is None:
            return self
        if self.steps is None:
            raise refused("steps", "must be given with `objectives`, whose samples have no end, got None")
        if self.streamed:
            raise refused(
                "objectives", "cannot be used with a streamed training text: leave out `streaming` and weights"
            )
        if not self.packing:
            raise refused("packing", "has no effect with `objectives`, whose samples are always packed, got False")
        bandit = self.objectives.bandit
        if bandit is not None:
            # A decision applies from the second step after it, and the first one has no losses to compare.
            decisions = sum(bandit.decides(done, self.steps) for done in range(1, self.steps - 1))
            if decisions < 2:
                problem = (
                    f"must leave two decisions that apply in the {self.steps} steps of the run, of which only the "
                    f"second compares losses, got {bandit.every}, which leaves {decisions}. Lower it or the warmup, or "
                    "raise `steps`"
                )
                raise refused("objectives.bandit.every", problem)
        return self

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps.

        Args:
            steps: optimiser steps of the run.

        Raises:
            ValueError: if the run is not longer than its warm-up.
        """
        return warmup_length(self.warmup, steps)

    def optimisation(self, steps: int) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            # As a share of the peak, since DeepSpeed's optimiser does not have the peak learning rate.
            "lr_scheduler_kwargs": {"min_lr_rate": self.final_learning_rate / self.learning_rate},
            "warmup_steps": self.warmup_steps(steps),
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }


def parse_from_scratch(values: dict[str, Any]) -> FromScratchSettings:
    """Check the settings of a training from scratch; the recipe supplies those that are not given.

    Raises:
        ValueError: as `ssm_zoo.harness.settings.check`.
    """
    recipe = values.get("recipe", "mamba")
    defaults = RECIPES.get(recipe) if isinstance(recipe, str) else None
    return check(FromScratchSettings, {**(defaults or RECIPES["mamba"]), **values})
