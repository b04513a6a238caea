"""The stages of a recipe: objective, trained weights, length and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from ..harness.settings import SettingsBase, refused, wrong
from .recipe_values import (
    Betas,
    Count,
    Decay,
    Identifier,
    Layers,
    Length,
    NonNegative,
    Part,
    Positive,
    Share,
    Warmup,
)

LAYERWISE = ("matrix_orientation", "hidden_state_alignment")
"""Objectives in which each layer is a problem of its own."""

# Fields of a stage that have an effect only with some values of another field. With other values they are refused, and
# `as_mapping` leaves them out.
MEANINGFUL_UNDER: dict[str, tuple[str, tuple[str, ...]]] = {
    "matrix_norm": ("objective", ("matrix_orientation",)),
    "target": ("objective", ("hidden_state_alignment",)),
    "stream": ("objective", ("hidden_state_alignment",)),
    "refit": ("objective", LAYERWISE),
    "kl": ("objective", ("logit_distillation",)),
    "temperature": ("objective", ("logit_distillation",)),
    "ce_weight": ("objective", ("logit_distillation",)),
    "reverse_weight": ("kl", ("mixed",)),
    "jsd_beta": ("kl", ("jsd",)),
    "lora_rank": ("train", ("lora",)),
    "lora_alpha": ("train", ("lora",)),
    "other_learning_rate": ("train", ("all", "mixers+norms")),
    "norm_learning_rate": ("train", ("all", "mixers+norms")),
    "mlp_learning_rate": ("train", ("all",)),
    "embedding_learning_rate": ("train", ("all",)),
    "decay": ("schedule", ("wsd",)),
    "final_learning_rate_ratio": ("schedule", ("cosine", "wsd")),
}

GROUP_RATES = {
    "norms": "norm_learning_rate",
    "mlps": "mlp_learning_rate",
    "embeddings": "embedding_learning_rate",
}
"""Groups of weights outside of the mixers that may have their own learning rate, with the field that sets it."""
# Groups of weights outside of the mixers that a stage trains.
_GROUPS = {"all": set(GROUP_RATES), "mixers+norms": {"norms"}}
# Fields of a stage that earlier versions did not have.
LATER_FIELDS = (
    "layers",
    "lora_rank",
    "lora_alpha",
    "text",
    "matrix_norm",
    "stream",
    "reverse_weight",
    "jsd_beta",
    *GROUP_RATES.values(),
)


class StageSpec(SettingsBase):
    """One stage: its objective, the weights that it trains, its length and its optimiser (AdamW).

    Attributes:
        name: name of the stage in reports and checkpoints, unique in the recipe.
        objective: matrix orientation and hidden-state alignment are MOHAWK's stages 1 and 2 (arXiv 2408.10189),
            logit distillation is its stage 3. Last-state alignment compares the hidden states that the heads read.
        train: weights to train: the new mixers, the new mixers and the norms, all, only the learned feature maps of the
            new mixers, or "lora", adapters on their projections, which are merged after the stage.
        lora_rank: rank of the adapters.
        lora_alpha: their scale is this divided by the rank.
        layers: layers that are converted from this stage on, out of those of the student; None: all of them. Until its
            stage a layer computes the teacher's attention, frozen. Later stages keep what this one converts.
        tokens: number of tokens that the stage reads, rounded up to a whole step.
        sequence_length: L, tokens per sequence.
        batch_size: sequences per optimiser step, over all processes.
        text: text that the stage reads: the training text, or the one that the teacher writes (`data.pseudo_labels`).
        repeats: share of the sequences in which a passage is repeated, to train recall: between 1/32 and 1/8 of the
            sequence is overwritten by an earlier part of it.
        learning_rate: peak learning rate of the mixers.
        other_learning_rate: peak learning rate of the other weights; None: the same.
        norm_learning_rate: peak learning rate of the norms outside of the mixers; None: that of the other weights.
        mlp_learning_rate: peak learning rate of the MLPs; None: that of the other weights.
        embedding_learning_rate: peak learning rate of embeddings and head; None: that of the other weights.
        schedule: learning rate after the warm-up: "cosine", "wsd" (stable, then linear decay) or "constant".
        warmup: share of the steps in which the learning rate rises linearly from 0.
        decay: share of the steps in which the learning rate of "wsd" falls.
        final_learning_rate_ratio: final learning rate as a share of the peak.
        weight_decay: decoupled weight decay.
        betas: betas of AdamW.
        max_grad_norm: maximum norm of the gradient; with a layer-wise objective, of each layer's gradient.
        matrix_norm: norm of the matrix error: "frobenius"; "relative" to the attention matrix, with which all heads
            have the same weight; or "rows", relative for each row, with which all rows have the same weight.
        target: outputs that alignment compares, those of the mixer or of the whole block.
        stream: hidden states that the student's layers read in alignment: the teacher's, or the student's own. On its
            own stream the output of a block is the stream after it. Gradients end at a layer's input.
        refit: closed-form fit after the stage; values as for `student.calibration`.
        kl: "forward" is KL(teacher || student), "reverse" KL(student || teacher), "mixed" a weighted mean of both, and
            "jsd" the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649).
        reverse_weight: weight of the reverse KL in "mixed"; that of the forward KL is the rest.
        jsd_beta: weight of the teacher in the mixture of "jsd".
        temperature: divisor of both models' logits.
        ce_weight: weight of the next-token cross-entropy in the loss; that of the divergence is the rest.
    """

    name: Identifier
    objective: Literal["matrix_orientation", "hidden_state_alignment", "last_state_alignment", "logit_distillation"]
    train: Literal["mixers", "all", "mixers+norms", "feature_maps", "lora"] = "mixers"
    layers: Layers | None = None
    tokens: Count
    sequence_length: Length = 256
    batch_size: Count
    lora_rank: Count = 8
    lora_alpha: Positive = 16.0
    text: Literal["train", "teacher"] = "train"
    repeats: Share = 0.0
    learning_rate: Positive
    other_learning_rate: Positive | None = None
    norm_learning_rate: Positive | None = None
    mlp_learning_rate: Positive | None = None
    embedding_learning_rate: Positive | None = None
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Warmup = 0.05
    decay: Decay = 0.1
    final_learning_rate_ratio: Share = 0.1
    weight_decay: NonNegative = 0.0
    betas: Betas = (0.9, 0.95)
    max_grad_norm: Positive = 1.0
    matrix_norm: Literal["frobenius", "relative", "rows"] = "frobenius"
    target: Literal["mixer_output", "block_output"] = "mixer_output"
    stream: Literal["teacher", "student"] = "teacher"
    refit: Literal["none", "head_scale", "ridge", "sequential"] = "none"
    kl: Literal["forward", "reverse", "mixed", "jsd"] = "forward"
    reverse_weight: Part = 0.5
    jsd_beta: Part = 0.5
    temperature: Positive = 1.0
    ce_weight: Share = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps: the tokens in whole batches, rounded up."""
        return -(-self.tokens // (self.batch_size * self.sequence_length))

    @property
    def layerwise(self) -> bool:
        """Whether each layer is a problem of its own."""
        return self.objective in LAYERWISE

    @property
    def reads_predictions(self) -> bool:
        """Whether the teacher's predictions are part of the loss."""
        return self.objective == "logit_distillation" and self.ce_weight < 1

    @property
    def reached(self) -> set[str]:
        """Groups of weights outside of the mixers on which the loss depends."""
        if not self.layerwise:
            return set(GROUP_RATES)
        if self.objective == "hidden_state_alignment" and self.target == "block_output":
            return {"norms", "mlps"}
        return {"norms"} if self.stream == "student" else set()

    @property
    def _takes_the_other_rate(self) -> bool:
        """Whether weights are trained, and reached by the loss, that have no rate of their own."""
        groups = self.reached & _GROUPS.get(self.train, set())
        attention = self.train == "all" and not self.layerwise  # of layers that are not converted
        return attention or any(getattr(self, GROUP_RATES[group]) is None for group in groups)

    @property
    def meaningless(self) -> set[str]:
        """Fields that have no effect under this stage's objective, schedule and trained parameters."""
        return {field for field, (key, values) in MEANINGFUL_UNDER.items() if getattr(self, key) not in values}

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> StageSpec:
        for field in sorted(self.meaningless & self.model_fields_set):
            if getattr(self, field) is not None:
                key, values = MEANINGFUL_UNDER[field]
                raise misplaced(field, getattr(self, field), key, values, getattr(self, key))
        if self.objective == "logit_distillation" and not self.reads_predictions:
            for field in ("kl", "temperature"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise refused(
                        field,
                        f"has no effect with ce_weight {self.ce_weight:g}, with which the loss is the cross-entropy "
                        f"alone. Remove it (got {getattr(self, field)!r}).",
                    )
        for group, field in GROUP_RATES.items():
            if group not in self.reached and getattr(self, field) is not None:
                raise refused(
                    field,
                    f"has no effect with objective {self.objective!r}, target {self.target!r} and stream "
                    f"{self.stream!r}, whose loss does not depend on the {group}. Remove it.",
                )
        if self.train in ("all", "mixers+norms") and not self.reached & _GROUPS[self.train]:
            raise refused(
                "train",
                f"{self.train!r} has no effect with objective {self.objective!r}, target {self.target!r} and stream "
                f"{self.stream!r}, whose loss does not depend on weights outside of the new mixers. Choose 'mixers'.",
            )
        if self.other_learning_rate is not None and not self._takes_the_other_rate:
            raise refused(
                "other_learning_rate",
                f"has no effect with train {self.train!r} and objective {self.objective!r}, since all weights outside "
                "of the mixers that the loss depends on have rates of their own. Remove it "
                f"(got {self.other_learning_rate!r}).",
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise wrong("decay", self.decay, f"at most 1 - warmup = {1 - self.warmup:g}")
        return self


def misplaced(field: str, value: Any, key: str, values: Sequence[Any], actual: Any) -> PydanticCustomError:
    """Return the error of a field that has no effect with the value of `key`."""
    options = " or ".join(map(repr, values))
    return refused(field, f"has no effect with {key} {actual!r}, only with {key} {options}. Remove it (got {value!r}).")
