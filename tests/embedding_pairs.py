"""Tiny pairs of texts for the tests of embedders, and the models that learn them."""

import json
import random
from pathlib import Path
from typing import Any

from families import ENCODERS, make_head, make_model
from tiny_checkpoints import save_tokenizer
from transformers import AutoModel


def write_pairs(path: Path, number: int, seed: int = 0) -> None:
    """Words and what begins as they do, with a word that does not as a hard negative; all texts differ."""
    generator = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < number:
        words["".join(generator.choices("abcdefghij", k=4))] = None
    with path.open("w") as file:
        for word in words:
            row = {"anchor": word, "positive": f"{word[:2]} {word[::-1]}", "negative": f"z{word[1:]}"}
            file.write(f"{json.dumps(row)}\n")


def save_model(folder: Path, name: str) -> None:
    """A causal language model of a registered family, or an encoder, with a tokenizer of characters."""
    model = make_head(AutoModel, name) if name in ENCODERS else make_model(name)
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
        "learning_rate": 5e-3,
        "temperature": 0.1,
        "checkpoint_every": 4,
        "pool_size": 8,
        **changes,
    }
