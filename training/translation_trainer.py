"""Train a model to translate on transformers' Trainer: label smoothing, batches of similar lengths, the curve.

A resumed run continues from the last complete checkpoint and gives the same weights, bit for bit.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, TrainingArguments

from ..modeling.outputs import add_aux_loss
from .checkpoints import last_checkpoint
from .packing import IGNORED, Row
from .trainer import (
    CHECKPOINTS,
    CurveCallback,
    LanguageModelTrainer,
    curve_of,
    train_or_load,
    trainer_arguments,
)
from .translation_data import EpochOfRows, LengthBuckets, TranslationRows
from .translation_settings import TranslationSettings


def smoothed_loss(
    outputs: Any, labels: Tensor, *, epsilon: float, config: PreTrainedConfig, num_items_in_batch: Any = None
) -> Tensor:
    """Return the loss against (1 - epsilon) of a label and epsilon / V of every token (arXiv 1512.00567, section 7).

    Args:
        outputs: outputs of the model; `logits` are (B, L, V).
        labels: (B, L) ids, -100 where there is no loss. Those of a decoder-only model are shifted here.
        epsilon: share that is spread over the vocabulary.
        config: the model's configuration.
        num_items_in_batch: number by which the sum over the predictions is divided; None: that of these labels.

    Returns:
        The () loss, with the weighted auxiliary loss of a model that selects tokens.
    """
    logits = outputs.logits
    if not config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    predicted = labels != IGNORED
    total = F.cross_entropy(logits[predicted].float(), labels[predicted], reduction="sum", label_smoothing=epsilon)
    count: Any = predicted.sum() if num_items_in_batch is None else num_items_in_batch
    return add_aux_loss(total / count, outputs, config, labels, num_items_in_batch)


class TranslationTrainer(LanguageModelTrainer):
    """Trainer of a translating model, which can put rows of similar length into a batch."""

    _order: LengthBuckets | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.compute_loss_func is not None:
            # The model computes no loss then. It would warn that the loss lacks the auxiliary one, which is added.
            self.model_accepts_loss_kwargs = False

    def sort_rows(self, lengths: list[int]) -> None:
        """Put rows of similar length, given the length of each, into a batch."""
        batch = self.args.train_batch_size * self.args.world_size
        self._order = LengthBuckets(lengths, batch, int(self.args.data_seed or 0))
        self.add_callback(EpochOfRows(self._order))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order


def train_translation(
    model: Any,
    rows: TranslationRows,
    settings: TranslationSettings,
    collator: Callable[..., Row],
    steps: int,
    output: Path,
    device: torch.device,
    *,
    main: bool,
    evaluate: Callable[[str], dict[str, Any]],
) -> tuple[nn.Module, list[dict[str, Any]], list[dict[str, Any]]]:
    """Train a model to translate, from the last complete checkpoint if there is one.

    Args:
        model: a causal language model or an encoder-decoder, or one with adapters, on its device.
        rows: rows to train on.
        settings: settings of the run.
        collator: collator of the rows.
        steps: optimiser steps of the whole training.
        output: folder of the run.
        device: device of the training.
        main: whether this is the main process.
        evaluate: measures the held-out loss, given its name.

    Returns:
        The trained model, the points of the curve, and the held-out losses during training, each with its "step".

    Raises:
        ValueError: if the loss, the gradient or a weight is not finite.
    """
    config, smoothing = model.config, settings.label_smoothing
    trainer = TranslationTrainer(
        model=model,
        args=TrainingArguments(
            gradient_accumulation_steps=settings.gradient_accumulation,
            **trainer_arguments(settings, steps, output, device),
        ),
        train_dataset=rows.rows,
        data_collator=collator,
        compute_loss_func=partial(smoothed_loss, epsilon=smoothing, config=config) if smoothing else None,
        callbacks=[CurveCallback(evaluate, settings.evaluate_every)],
    )
    if not settings.packing:
        trainer.sort_rows([len(rows.rows[index]["input_ids"]) for index in range(len(rows))])
    found = last_checkpoint(output / CHECKPOINTS, main=main)
    trained, points = train_or_load(trainer, found, steps)
    measured = [{"step": point["step"], **point["evaluation"]} for point in points if "evaluation" in point]
    return trained, curve_of(points), measured
