"""Multi-query associative recall: the sequences, the loss at the queries, and what a model answers and selects there.

The task of Zoology (arXiv 2312.04927) with the random fillers of Mamba-2 (arXiv 2405.21060, appendix D.1): a context of
key-value pairs, then each key once more as a query, an even number of tokens behind the context; the model is to say
the key's value there. What stands between the queries is filler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_zoo.modeling.outputs import add_aux_loss

# Label of a position that is no query.
UNASKED = -100
# The i-th place behind the context is drawn with a weight of i^(POWER - 1): most queries come early.
POWER = 0.01
# Sequences that are assessed at a time.
PART = 256


@dataclass(frozen=True)
class Task:
    """Sizes of the task.

    Args:
        length: T, tokens of a sequence; even, at least 4 `pairs`.
        pairs: n, key-value pairs of a sequence, and its queries.
        vocabulary: V tokens. Those that are no fillers are keys from 1 to their middle, and values from there on.
        fillers: the last so many tokens are fillers and nothing else. 0: fillers are keys and values, but no keys of
            their own sequence, so every query has one answer.
    """

    length: int
    pairs: int
    vocabulary: int
    fillers: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(
                f"length must be even and at least 4 * pairs, with pairs at least 1, got {self.length} and {self.pairs}"
            )
        if self.fillers < 0 or self.first_value <= self.pairs:
            raise ValueError(
                f"vocabulary must hold {2 * self.pairs + 2} tokens or more beside its fillers, at least 0, "
                f"got {self.vocabulary} and fillers {self.fillers}"
            )

    @property
    def first_filler(self) -> int:
        """Return the end of keys and values."""
        return self.vocabulary - self.fillers

    @property
    def first_value(self) -> int:
        """Return the end of the keys, where values begin."""
        return self.first_filler // 2


def draw(task: Task, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences on the device of `generator`. All keys of a sequence differ, and so do all values.

    Returns:
        (B, T) ids; (B, T) labels, the value at each query and `UNASKED` elsewhere.
    """
    n, device = task.pairs, generator.device
    random: dict[str, Any] = {"generator": generator, "device": device}
    keys = 1 + torch.rand(batch, task.first_value - 1, **random).argsort(-1)
    all_values = torch.arange(task.first_value, task.first_filler, device=device)
    values = all_values[torch.rand(batch, len(all_values), **random).argsort(-1)[:, :n]]
    keys, others = keys[:, :n], keys[:, n:]
    if task.fillers:
        fillers = torch.arange(task.first_filler, task.vocabulary, device=device).expand(batch, -1)
    else:
        fillers = torch.cat([others, all_values.expand(batch, -1)], dim=1)
    ids = fillers.gather(1, torch.randint(fillers.shape[1], (batch, task.length), **random))
    ids[:, 0 : 2 * n : 2], ids[:, 1 : 2 * n : 2] = keys, values
    # Draws without replacement by the Gumbel trick: the n largest log-weights with noise, in their order.
    place = torch.arange(1, (task.length - 2 * n) // 2 + 1, device=device)
    noise = torch.empty(batch, len(place), device=device).exponential_(generator=generator)
    asked = 2 * n + 2 * ((POWER - 1) * place.log() - noise.log()).topk(n).indices
    labels = torch.full_like(ids, UNASKED).scatter_(1, asked, values)
    return ids.scatter_(1, asked, keys), labels


def recall_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of sequences of `draw`, in nats per query, plus the capacity loss of Taipan."""
    ids, labels = batch
    asked = labels != UNASKED
    outputs = model.backbone(ids, use_cache=False)
    logits = model.lm_head(outputs.last_hidden_state[asked])
    return add_aux_loss(F.cross_entropy(logits.float(), labels[asked]), outputs, model.config, labels)


@torch.no_grad()
def assess(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Assess a model on sequences of `draw`.

    Returns:
        `accuracy`, the share of the queries whose most likely token is the value. Of a model that selects tokens, for
        `queries`, for the `rest` and for `all` tokens the share that its layers select: as it decodes, `selected ...`,
        and as it trains, `drawn ...`, the expected share over the gate's noise. The latter are exact where one layer
        selects; with more, a layer would in training see what the noise made of the one before.
    """
    model.eval()
    found: list[dict[str, Tensor]] = []
    for ids, labels in zip(batch[0].split(PART), batch[1].split(PART), strict=True):
        asked = labels != UNASKED
        outputs = model.backbone(ids, use_cache=False)
        answers = model.lm_head(outputs.last_hidden_state[asked]).argmax(-1)
        part = {"accuracy": (answers == labels[asked]).float().mean()}
        if outputs.router_logits is not None:
            margin = torch.stack([scores[..., 1] - scores[..., 0] for scores in outputs.router_logits])
            for name, tokens in (("queries", asked), ("rest", ~asked), ("all", torch.ones_like(asked))):
                part[f"selected {name}"] = (margin[:, tokens] > 0).float().mean()
                part[f"drawn {name}"] = margin[:, tokens].sigmoid().mean()  # the noise is logistic
        found.append({key: value * len(ids) for key, value in part.items()})
    model.train()
    return {key: float(sum(part[key] for part in found)) / len(batch[0]) for key in found[0]}
