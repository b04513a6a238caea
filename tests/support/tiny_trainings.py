"""Every training at a tiny size, how to stop one in the middle, and how to damage what it left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssm_zoo.training.checkpoints import CheckedTrainer
from ssm_zoo.training.embedder import finetune_embedder
from ssm_zoo.training.embedder_settings import parse_embedder_settings
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.language_model import finetune_language_model
from ssm_zoo.training.settings import parse_settings
from ssm_zoo.training.translation import finetune_translation
from ssm_zoo.training.translation_settings import parse_translation_settings

HOW = {"steps": 6, "checkpoint_every": 2, "batch_size": 2}
TEXTS = {"train": ["text.txt"], "heldout": ["text.txt"], "row_tokens": 32}
PAIRS = {"train": ["pairs.jsonl"], "heldout": ["pairs.jsonl"]}
# All that draws random numbers, and batches of similar lengths.
TRANSLATION = {
    "source_field": "anchor",
    "target_field": "positive",
    "method": "full",
    "packing": False,
    "concatenate": 2,
    "residual_dropout": 0.2,
}


@dataclass(frozen=True)
class Training:
    """A way to train.

    Attributes:
        start: trains in the working folder and writes into "run".
        saved: a checkpoint's weights.
        result: the folder that a run leaves.
        tokenizer: what a message calls the source whose tokenizer is used.
    """

    start: Callable[[], Any]
    saved: str
    result: str
    tokenizer: str


TRAININGS = {
    "train": Training(
        lambda: train_from_scratch(parse_from_scratch({**HOW, **TEXTS, "config": "zoo", "tokenizer": "zoo"}), "run"),
        "model.safetensors",
        "model",
        "tokenizer",
    ),
    "lm": Training(
        lambda: finetune_language_model(parse_settings({**HOW, **TEXTS, "model": "zoo", "rank": 2}), "run"),
        "adapter_model.safetensors",
        "adapter",
        "model",
    ),
    "embed": Training(
        lambda: finetune_embedder(parse_embedder_settings({**HOW, **PAIRS, "model": "zoo", "rank": 2}), "run"),
        "trained.safetensors",
        "model",
        "model",
    ),
    "translate": Training(
        lambda: finetune_translation(
            parse_translation_settings({**HOW, **PAIRS, **TRANSLATION, "model": "zoo"}), "run"
        ),
        "model.safetensors",
        "model",
        "model",
    ),
}


def stop_in(step: int, patch: pytest.MonkeyPatch, spoil: Callable[[Any], object] | None = None) -> None:
    """Interrupt every training in a step, or spoil what its backward has computed."""
    inner = CheckedTrainer.training_step

    def stopping(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step and spoil is None:
            raise KeyboardInterrupt
        loss = inner(self, model, *arguments, **options)
        if self.state.global_step + 1 == step:
            assert spoil is not None
            spoil(model)
        return loss

    patch.setattr(CheckedTrainer, "training_step", stopping)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def weights(run: str, training: Training) -> dict[str, torch.Tensor]:
    return {
        f"{path.name} {key}": tensor
        for path in sorted(Path(run, training.result).glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
