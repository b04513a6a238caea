"""Train a reranker on groups, packed into rows without padding, on the training loop that all runs share.

A batch holds the pairs of all its groups. `slots` (G, M, K) says where in the model's scores the K passages of the M
documents of the G groups are, -1 where there is none; a document's score is that of its best passage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..evaluation.long_documents import TRUNCATION, LongDocuments
from ..modeling.backbone import ZooModel
from .checkpoints import last_checkpoint
from .packing import first_fit_decreasing, pad_rows
from .ranking_groups import Group
from .ranking_losses import LOSSES
from .reranker_settings import RerankerSettings
from .trainer import (
    CHECKPOINTS,
    AuxiliaryLoss,
    CurveCallback,
    ZooTrainer,
    curve_of,
    train_or_load,
    trainer_arguments,
)

Batch = dict[str, Tensor]


def pair_ids(tokenizer: Any, query: str, parts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of pairs of a query and parts of documents, as sentence-transformers computes them."""
    encoded = tokenizer([query] * len(parts), list(parts), truncation=TRUNCATION, max_length=tokenizer.model_max_length)
    return encoded["input_ids"]


@dataclass(frozen=True)
class GroupCollator:
    """Collator of groups, which tokenises and packs them.

    Attributes:
        tokenizer: tokenizer with the template of pairs.
        rule: rule for long documents.
        packing: pack pairs into rows, as long as the longest of them; False: give each a row and a mask.
    """

    tokenizer: Any
    rule: LongDocuments
    packing: bool

    def __call__(self, groups: Sequence[Group]) -> Batch:
        """Return the batch of G groups with M documents of K passages at most, P in all.

        Returns:
            (B, L) `input_ids`, with `seq_idx` and `position_ids` if packed, otherwise `attention_mask`; (G, M, K)
            `slots`; (G, M) `grades`, 0 where there is no document; (G, M) `teacher`, if all groups have scores.
        """
        pairs: list[list[int]] = []
        places: list[list[list[int]]] = []
        for group in groups:
            of_group = []
            for document in group.documents:
                ids = pair_ids(self.tokenizer, group.query, self.rule.parts(self.tokenizer, document))
                of_group.append(list(range(len(pairs), len(pairs) + len(ids))))
                pairs += ids
            places.append(of_group)
        batch, order = self._packed(pairs) if self.packing else self._padded(pairs)
        most = max(map(len, places))
        deepest = max(len(parts) for of_group in places for parts in of_group)
        slots = torch.full((len(groups), most, deepest), -1)
        for row, of_group in enumerate(places):
            for column, parts in enumerate(of_group):
                slots[row, column, : len(parts)] = order[parts]
        batch |= {"slots": slots, "grades": _matrix([group.labels for group in groups], most)}
        teachers = [group.teacher for group in groups if group.teacher is not None]
        if len(teachers) == len(groups):
            batch["teacher"] = _matrix(teachers, most)
        return batch

    def _packed(self, pairs: list[list[int]]) -> tuple[Batch, Tensor]:
        """Return rows of whole pairs, and the (P) place of each pair among the documents of all rows."""
        lengths = [len(ids) for ids in pairs]
        bins = first_fit_decreasing(lengths, max(lengths))
        rows, flat = [], [index for items in bins for index in items]
        for items in bins:
            ids = torch.tensor([token for index in items for token in pairs[index]])
            counts = torch.tensor([lengths[index] for index in items])
            rows.append(
                {
                    "input_ids": ids,
                    "labels": ids,
                    "seq_idx": torch.arange(len(items), dtype=torch.int32).repeat_interleave(counts),
                    "position_ids": torch.cat([torch.arange(int(count)) for count in counts]),
                }
            )
        batch = pad_rows(rows, None, self.tokenizer.pad_token_id)
        del batch["labels"]
        return batch, torch.tensor(flat).argsort()

    def _padded(self, pairs: list[list[int]]) -> tuple[Batch, Tensor]:
        """Return a row for each pair, padded on the tokenizer's side."""
        batch = self.tokenizer.pad({"input_ids": pairs}, return_tensors="pt")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}, torch.arange(len(pairs))


def _matrix(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    return torch.stack([F.pad(torch.tensor(row, dtype=torch.float32), (0, width - len(row))) for row in rows])


class Groups(Dataset):
    """Groups as the Trainer reads them."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Group:
        return self._groups[index]


def number_of_terms(batch: Batch, loss: str) -> Tensor:
    """Return the () number of terms of a batch of :class:`GroupCollator`, over which a loss in `LOSSES` is the mean."""
    return LOSSES[loss].terms(batch["grades"], (batch["slots"] >= 0).any(-1))


def group_loss(model: nn.Module, batch: Batch, loss: str, terms: Tensor | None = None) -> Tensor:
    """Return the () loss of a batch of :class:`GroupCollator` by a name in `LOSSES`.

    Args:
        model: the model.
        batch: the batch.
        loss: name of the loss.
        terms: () number of terms of the whole step, if the batch is a part of it; None: that of the batch.
    """
    inputs = {key: tensor for key, tensor in batch.items() if key not in ("slots", "grades", "teacher")}
    logits: Tensor = model(**inputs).logits[:, 0].float()
    slots = batch["slots"]
    passages = logits[slots.clamp(min=0)].masked_fill(slots < 0, -math.inf)
    present = (slots >= 0).any(-1)
    scores = passages.amax(-1).masked_fill(~present, 0)
    total = LOSSES[loss].total(scores, batch["grades"], present, batch.get("teacher"))
    return total / (number_of_terms(batch, loss) if terms is None else terms).clamp(min=1)


class RerankerTrainer(AuxiliaryLoss, ZooTrainer):
    """Trainer of a reranker.

    The loss of a step is the mean over the terms of all its batches in all processes, however they are split. The
    auxiliary loss of a model that selects tokens is added, and the curve's loss is the ranking loss alone.
    """

    def __init__(self, *arguments: Any, loss: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._loss = loss
        # The loss is divided by the terms of the whole step: the Trainer does not divide it by the number of batches.
        self.model_accepts_loss_kwargs = True

    def train(self, *arguments: Any, **options: Any) -> Any:
        model: Any = self.model
        zoo = [one for one in model.modules() if isinstance(one, ZooModel)]
        hooks = [one.register_forward_hook(lambda model, _, outputs: self.note(model, outputs)) for one in zoo]
        try:
            return super().train(*arguments, **options)
        finally:
            for hook in hooks:
                hook.remove()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the part of the step's loss that these groups have, times the processes: gradients are averaged."""
        processes = self.accelerator.num_processes
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = processes * number_of_terms(inputs, self._loss) / num_items_in_batch.clamp(min=1)
        loss = self.with_auxiliary(lambda: group_loss(model, inputs, self._loss, num_items_in_batch) * processes, share)
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Return the batches of a step in this process, and the number of terms of the step in all processes."""
        batches, _ = super().get_batch_samples(*arguments, **options)
        terms = sum((number_of_terms(batch, self._loss) for batch in batches), torch.zeros((), dtype=torch.int64))
        return batches, self.accelerator.reduce(terms.to(self.args.device), reduction="sum")


def train_reranker(
    model: nn.Module,
    collator: GroupCollator,
    groups: Sequence[Group],
    settings: RerankerSettings,
    steps: int,
    output: Path,
    device: torch.device,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train a reranker's model in place, from the last complete checkpoint if there is one.

    Args:
        model: the model, on the device, perhaps with adapters.
        collator: collator of the groups.
        groups: groups to train on.
        settings: settings of the run.
        steps: optimiser steps of the whole training.
        output: folder of the run.
        device: where the model is.

    Returns:
        The trained model, and the points of the curve.

    Raises:
        ValueError: if the loss, the gradient or a weight is not finite.
    """
    trainer = RerankerTrainer(
        model=model,
        args=TrainingArguments(
            gradient_accumulation_steps=settings.gradient_accumulation,
            remove_unused_columns=False,
            **trainer_arguments(settings, steps, output, device),
        ),
        train_dataset=Groups(groups),
        data_collator=collator,  # pyright: ignore[reportArgumentType]
        callbacks=[CurveCallback()],
        loss=settings.loss,
    )
    found = last_checkpoint(output / CHECKPOINTS, main=trainer.is_world_process_zero())
    trained, history = train_or_load(trainer, found, steps)
    return trained, curve_of(history)
