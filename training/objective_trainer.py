"""Trainer of a language model on several objectives: their losses, their rates, and the state of the bandit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..harness.json_files import read_json_object
from ..harness.run_folder import write_json
from .objective_rates import Rates
from .objective_rows import ObjectiveStream
from .objective_settings import ObjectiveMix
from .packing import IGNORED
from .trainer import LanguageModelTrainer

RATES = "objectives.json"
"""Name of the file in a checkpoint with the rates' state and with the losses and samples since the last point."""


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_of_step(state.global_step)


class ObjectiveTrainer(LanguageModelTrainer):
    """Trainer on the rows of an `ObjectiveStream`.

    A point of the curve also has "loss/NAME", the mean loss per target of an objective since the last point, if it had
    a sample, "samples/NAME", its number of samples since then, and "rate/NAME", its rate in the next step's rows.

    Args:
        mix: the mixture of the stream.
        steps: optimiser steps of the whole training.
        arguments: as of `LanguageModelTrainer`.
        options: as of `LanguageModelTrainer`.
    """

    def __init__(self, *arguments: Any, mix: ObjectiveMix, steps: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mix, self._rates = mix, Rates(mix, steps)
        assert isinstance(self.train_dataset, ObjectiveStream)
        self.train_dataset.rates = self._rates.at
        self._step = torch.zeros(3, len(mix.objectives), dtype=torch.float64, device=self.args.device)
        self._point = [[0.0] * len(mix.objectives) for _ in range(3)]
        self.add_callback(_EndOfStep(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss and record the part and the samples of each objective."""
        inputs, count = dict(inputs), len(self._mix.objectives)
        objective = inputs.pop("objective")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._step[:2] += losses_by(objective, outputs.logits.detach(), inputs["labels"], count)
        first = (inputs["position_ids"] == 0) & (inputs["seq_idx"] >= 0)
        self._step[2] += torch.bincount(objective[first], minlength=count)
        return (loss, outputs) if return_outputs else loss

    def end_of_step(self, done: int) -> None:
        """Give the losses of a step to the rates and to the next point of the curve, which also gets the samples."""
        reduced: Any = self.accelerator.reduce(self._step, reduction="sum")
        sums, counts, samples = reduced.tolist()
        self._step = torch.zeros_like(self._step)
        self._rates.add(sums, counts)
        self._rates.end_of_step(done)
        self._point = [
            [total + part for total, part in zip(totals, parts, strict=True)]
            for totals, parts in zip(self._point, (sums, counts, samples), strict=True)
        ]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the losses, samples and rates of the objectives to a point of the curve."""
        if "loss" in logs:
            rates = self._rates.at(self.state.global_step)
            for name, total, count, samples, rate in zip(self._mix.names, *self._point, rates, strict=True):
                if count:
                    logs[f"loss/{name}"] = total / count
                logs[f"samples/{name}"] = int(samples)
                logs[f"rate/{name}"] = rate
            self._point = [[0.0] * len(rates) for _ in range(3)]
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir) / RATES, {"rates": self._rates.state(), "point": self._point})

    def restore_stream(self, checkpoint: Path) -> None:
        """Set the stream, the rates and what was recorded since the last point to what a checkpoint has."""
        super().restore_stream(checkpoint)
        state = read_json_object(checkpoint / RATES)
        self._rates.restore(state["rates"])
        self._point = state["point"]


def losses_by(objective: Tensor, logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the sums of the losses and the numbers of targets of each objective.

    Args:
        objective: (B, L) number of the objective of each token.
        logits: (B, L, V) logits of the next tokens.
        labels: (B, L) token ids, -100 where there is no loss.
        count: number of objectives.

    Returns:
        (2, count) in float64, with the loss in nats.
    """
    labels, owner = labels[:, 1:], objective[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    members = [(owner == index) & (labels != IGNORED) for index in range(count)]
    sums = torch.stack([losses.double().where(member, 0.0).sum() for member in members])
    return torch.stack([sums, torch.stack([member.sum().double() for member in members])])
