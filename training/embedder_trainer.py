"""Train an embedder with InfoNCE on sentence-transformers' Trainer: curve and checkpoints.

A resumed run continues from the last complete checkpoint and gives the same weights, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import nn

from ..modeling.backbone import ZooModel
from .checkpoints import last_checkpoint
from .embedder_settings import EmbedderSettings
from .pairs import Pairs
from .trainer import (
    CHECKPOINTS,
    AuxiliaryLoss,
    CurveCallback,
    curve_of,
    decayed_parameters,
    train_or_load,
    trainer_arguments,
)

_TRAINED = "trained.safetensors"


class EmbedderTrainer(AuxiliaryLoss, SentenceTransformerTrainer):
    """sentence-transformers' Trainer, with the zoo's rule of weight decay and its auxiliary loss.

    A checkpoint contains only the trained weights, since the base model is unchanged. The curve's loss is InfoNCE
    alone.
    """

    def train(self, *arguments: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, ZooModel):
                    stack.enter_context(_noting(module, self.note))
            return super().train(*arguments, **options)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add no callback: it would look for models and data sets on the Hub."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameters(model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        compute: Any = super().compute_loss
        # The columns are embedded one by one, each with its own auxiliary loss.
        loss = self.with_auxiliary(lambda: compute(model, inputs, False, num_items_in_batch))
        return (loss, {}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        changing = self._changing()
        state = self.model.state_dict() if state_dict is None else state_dict
        kept = {name: tensor.contiguous() for name, tensor in state.items() if name in changing}
        save_file(kept, Path(output_dir) / _TRAINED)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        state = load_file(Path(checkpoint_path) / _TRAINED)
        changing = self._changing()
        if state.keys() != changing:
            keys = ", ".join(sorted(state.keys() ^ changing)[:3])
            raise ValueError(f"{checkpoint_path} is of another model or other adapters: {keys}")
        self.model.load_state_dict(state, strict=False)

    def _changing(self) -> set[str]:
        """Return the names of what training changes: parameters, and buffers beside them, as of Taipan's threshold."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        layers = {name.rpartition(".")[0].rpartition(".")[0] for name in trained}
        buffers = self.model.state_dict().keys() - parameters.keys()
        return trained | {name for name in buffers if name.rpartition(".")[0] in layers}


@contextmanager
def _noting(model: ZooModel, note: Callable[[ZooModel, Any], None]) -> Iterator[None]:
    """Call `note` after every forward pass. A hook does not work: sentence-transformers calls `forward` directly."""
    forward: Any = model.forward

    @wraps(forward)
    def noted(*arguments: Any, **options: Any) -> Any:
        outputs = forward(*arguments, **options)
        note(model, outputs)
        return outputs

    model.forward = noted
    try:
        yield
    finally:
        del model.forward


def infonce(embedder: SentenceTransformer, settings: EmbedderSettings, processes: int) -> nn.Module:
    """Return the loss, the mean of -log(exp(s+ / t) / sum of exp(s / t) over the documents of a batch).

    s is the cosine of an anchor and a document, s+ that of its positive, t the temperature (arXiv 1807.03748, eq. 4,
    with cosines). The documents are the positives and hard negatives of all pairs, in all processes. With `symmetric`
    it is the mean of this loss and the one in which each positive searches for its anchor.
    """
    options: dict[str, Any] = {"scale": 1 / settings.temperature, "gather_across_devices": processes > 1}
    if settings.symmetric:
        options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if settings.mini_batch_size is None:
        return MultipleNegativesRankingLoss(embedder, **options)
    return CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=settings.mini_batch_size, **options)


def training_rows(pairs: Pairs) -> Dataset:
    """The pairs as the Trainer reads them."""
    return Dataset.from_dict(dict(pairs.columns))


def check_batches(rows: Dataset, settings: EmbedderSettings, processes: int) -> None:
    """Raise a ValueError if there is no batch in which all texts differ."""
    in_a_step = settings.batch_size * processes
    if len(rows) < in_a_step:
        raise ValueError(
            f"`batch_size` must be at most {len(rows) // processes} for {len(rows)} pairs in {processes} processes, "
            f"got {settings.batch_size}."
        )
    sampler = NoDuplicatesBatchSampler(rows, settings.batch_size, drop_last=True, generator=torch.Generator())
    if next(iter(sampler), None) is None:
        raise ValueError(
            f"`batch_size` must be smaller, got {settings.batch_size}: the texts of `train` repeat so often that no "
            "batch of this size has only different texts."
        )


def train_embedder(
    embedder: SentenceTransformer,
    rows: Dataset,
    settings: EmbedderSettings,
    steps: int,
    output: Path,
    device: torch.device,
    processes: int,
) -> list[dict[str, Any]]:
    """Train an embedder in place, from the last whole checkpoint if there is one.

    Args:
        embedder: on the device.
        rows: see :func:`training_rows`.
        settings: how.
        steps: optimiser steps of the whole training.
        output: folder of the run.
        device: where.
        processes: how many there are.

    Returns:
        The points of the curve.

    Raises:
        ValueError: if the loss is not finite.
    """
    prompts = {"anchor": settings.query_prompt}
    prompts |= {name: settings.document_prompt for name in rows.column_names if name != "anchor"}
    trainer = EmbedderTrainer(
        model=embedder,
        args=SentenceTransformerTrainingArguments(
            **trainer_arguments(settings, steps, output, device),
            prompts={name: prompt for name, prompt in prompts.items() if prompt},
            # A repeated text would be its own negative, and a smaller last batch would have fewer negatives.
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            dataloader_drop_last=True,
        ),
        train_dataset=rows,
        loss=infonce(embedder, settings, processes),
        callbacks=[CurveCallback()],
    )
    found = last_checkpoint(output / CHECKPOINTS, main=trainer.is_world_process_zero())
    _, history = train_or_load(trainer, found, steps)
    return curve_of(history)
