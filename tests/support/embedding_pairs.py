"""Tiny pairs of texts for the tests of embedders, and the models that learn them."""

import json
from pathlib import Path
from typing import Any

from families import ENCODERS, make_head, make_model
from tiny_checkpoints import save_tokenizer
from transformers import AutoModel


def write_pairs(path: Path, number: int, first: int = 0) -> None:
    """A letter of the first half of the alphabet and its partner in the second half, among digits; all texts differ.

    The hard negative has the partner of the next letter.
    """
    with path.open("w") as file:
        for index in range(number):
            letter, digit = index % 13, first + index // 13
            a, b, c = chr(97 + letter), chr(110 + letter), chr(110 + (letter + 1) % 13)
            row = {"anchor": f"{a}{a}{digit}{a}", "positive": f"{b} {b}{b} {digit}{b}", "negative": f"{c}{c}{digit}{c}"}
            file.write(f"{json.dumps(row)}\n")


def save_model(folder: Path, name: str, **changes: Any) -> None:
    """A causal language model of a registered family, or an encoder, with a tokenizer of characters."""
    model = make_head(AutoModel, name, **changes) if name in ENCODERS else make_model(name, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def embedder_values(folder: Path, model: str = "all-four", **changes: Any) -> dict[str, Any]:
    """Settings of a short run on `folder`'s model, `train.jsonl` and `heldout.jsonl`."""
    return {
        "model": str(folder / model),
        "train": [str(folder / "train.jsonl")],
        "heldout": [str(folder / "heldout.jsonl")],
        "batch_size": 5,
        "steps": 10,
        "learning_rate": 2e-2,
        "temperature": 0.1,
        "checkpoint_every": 4,
        "pool_size": 8,
        **changes,
    }
