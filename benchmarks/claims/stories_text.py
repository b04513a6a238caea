"""TinyStories as text and as tokens: stories between `<|endoftext|>`, the last tenth of them held out.

The data (Eldan & Li 2023, `roneneldan/TinyStories`, CDLA-Sharing-1.0) are no part of this repository; any slice of them
will do, and any other text with this mark between its documents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from from_scratch_training import VOCABULARY
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

END = "<|endoftext|>"


@dataclass(frozen=True)
class Stories:
    """The stories that are trained on, and those held out."""

    train: list[str]
    held_out: list[str]


def read_stories(path: Path) -> Stories:
    """Return the stories of a UTF-8 text.

    Raises:
        ValueError: if it has fewer than ten.
    """
    parts = path.read_text(encoding="utf-8").replace("\r", "").split(END)
    stories = [story for part in parts if (story := part.strip())]
    if len(stories) < 10:
        raise ValueError(
            f"text must hold at least 10 stories with {END} between them, got {len(stories)} in {path.name}"
        )
    held_out = len(stories) // 10
    return Stories(stories[:-held_out], stories[-held_out:])


def learn_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> ByteLevelBPETokenizer:
    """Return a byte-level BPE of `vocabulary` tokens, the first of them `END`, learnt from texts."""
    tokenizer = ByteLevelBPETokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_text("\n".join(texts), encoding="utf-8")
        tokenizer.train([str(path)], vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return tokenizer


def ids_of(tokenizer: ByteLevelBPETokenizer, texts: Iterable[str]) -> Tensor:
    """Return the ids of texts as one stream, `END` after each."""
    return torch.tensor([token for text in texts for token in [*tokenizer.encode(text).ids, 0]])
