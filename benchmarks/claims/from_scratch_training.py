"""Text and training loop of `from_scratch.py`.

Text: WikiText-2's validation part for training, a part of its test text held out (distill/data/wikitext2).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

TEXT = Path(__file__).resolve().parents[2] / "distill" / "data" / "wikitext2"
VOCABULARY = 2048
LENGTH = 128


def tokens() -> tuple[Tensor, Tensor]:
    """Return ids of the training and of the held-out text, by a byte-level BPE learnt from the training text."""
    train, held_out = (
        (TEXT / name).read_text(encoding="utf-8").replace("\r", "") for name in ("train.txt", "heldout.txt")
    )
    tokenizer = ByteLevelBPETokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_text(train, encoding="utf-8")
        tokenizer.train([str(path)], vocab_size=VOCABULARY, show_progress=False)
    return torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)


def windows_of(ids: Tensor, length: int = LENGTH) -> Tensor:
    """Return (n, length + 1) windows, each of which begins with the last token of the previous one."""
    return ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)


def batches(ids: Tensor, batch: int, steps: int, seed: int, length: int = LENGTH) -> Iterator[Tensor]:
    """Yield (batch, length + 1) windows in epochs of all windows, each in another order."""
    windows = windows_of(ids, length)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        yield windows[order[:batch]]
        order = order[batch:]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return mean cross-entropy, nats per token, of all but the first token of (B, length + 1) windows."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, batch: int, length: int = LENGTH) -> float:
    """Return mean of `loss_of` over the windows of `ids`, `batch` at a time."""
    model.eval()
    windows = windows_of(ids, length)
    total = sum(float(loss_of(model, part)) * len(part) for part in windows.split(batch))
    model.train()
    return total / len(windows)


class Trainer:
    """AdamW, decay of matrices, clip 1, warm-up, then a cosine. A_log counts as no matrix.

    Args:
        model: to train.
        rate: the largest learning rate.
        steps: length of the schedule.
        loss: takes the model and what `step` is given, and returns the mean loss.
        warmup: steps in which the rate rises; a tenth of `steps` if not given.
        floor: what the cosine falls to, in parts of the rate; 1 for a constant rate after the warm-up.
        decay: weight decay of matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        steps: int,
        loss: Callable[[nn.Module, Any], Tensor] = loss_of,
        warmup: int | None = None,
        floor: float = 0.1,
        decay: float = 0.1,
    ) -> None:
        self.model, self.loss = model, loss
        matrices = {key: p.dim() > 1 and not key.endswith("A_log") for key, p in model.named_parameters()}
        groups = [
            {"params": [p for key, p in model.named_parameters() if matrices[key] == decayed], "weight_decay": value}
            for decayed, value in ((True, decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
        rising = max(steps // 10, 1) if warmup is None else warmup
        middle, swing = (1 + floor) / 2, (1 - floor) / 2

        def schedule(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return middle + swing * math.cos(math.pi * (step - rising) / max(steps - rising, 1))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        model.train()

    def step(self, batch: Any) -> float:
        """Train on a batch, (B, length + 1) windows with the default loss, and return its loss before the step."""
        loss = self.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())
