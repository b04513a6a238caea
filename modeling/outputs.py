"""Outputs of models that select tokens, and the loss that keeps the selection within its capacity.

Symbols: B batch, L new tokens, N layers that select tokens, C capacity.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

ROUTING_FIELDS = ("aux_loss", "router_logits", "selection_rate")


@dataclass
class ZooModelOutput(BaseModelOutputWithPast):
    """transformers' output, with further fields of models that select tokens.

    Attributes:
        aux_loss: () capacity loss of the selecting layers that have one, not yet multiplied by its coefficient.
        router_logits: (B, L, 2) scores of not attending and of attending, for each such layer.
        selection_rate: (N) share of the real tokens that each such layer selected.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selection_rate: Tensor | None = None


@dataclass
class ZooCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, with the fields of :class:`ZooModelOutput`; in training `loss` includes the `aux_loss`."""

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selection_rate: Tensor | None = None


def routing_outputs(
    choices: list[tuple[Tensor, Tensor]], real: Tensor | None, capacities: list[float | None]
) -> dict[str, Any]:
    """Return the output fields of a model with layers that select tokens.

    Args:
        choices: for each such layer the (B, L, 2) scores and the (B, L) decisions, 1 or 0 and 0 at padding, through
            which gradients reach the scores.
        real: (B, L) False at padding, None if there is none.
        capacities: for each of them C, the share of the tokens that it should select; None: another means holds it.
    """
    # Layers may be on different devices.
    decisions = torch.stack([decision.to(choices[-1][1].device) for _, decision in choices])  # (N, B, L)
    count = decisions.new_full(decisions.shape[1:2], decisions.shape[2])
    if real is not None:
        count = real.sum(-1).to(count)
    rates = decisions.sum(-1) / count.clamp(min=1)  # (N, B)
    # Taipan, eq. 7, for every row separately, since the cost of decoding a row depends on that row's selection. A row
    # of padding does not count.
    rows = (count > 0).float()
    penalties = [
        ((capacity - rate).square() * rows).sum() / rows.sum().clamp(min=1)
        for capacity, rate in zip(capacities, rates, strict=True)
        if capacity is not None
    ]
    penalty = torch.stack(penalties).sum() if penalties else None
    with torch.no_grad():
        selection_rate = decisions.sum((1, 2)) / count.sum().clamp(min=1)
    logits = tuple(scores for scores, _ in choices)
    return {"aux_loss": penalty, "router_logits": logits, "selection_rate": selection_rate}


def warn_of_missing_aux_loss(outputs: Any, config: PreTrainedConfig) -> None:
    """Warn once that a loss computed from the logits, e.g. the Trainer's smoothed loss, lacks the `aux_loss`."""
    if getattr(outputs, "aux_loss", None) is not None and config.router_aux_loss_coef > 0:
        logger.warning_once(
            f"router_aux_loss_coef is {config.router_aux_loss_coef}, but the loss is computed outside the model (e.g. "
            "with label smoothing) and so without the capacity loss: add outputs.aux_loss in compute_loss_func, or set "
            "the coefficient to 0"
        )


def add_aux_loss(
    loss: Tensor, outputs: Any, config: PreTrainedConfig, labels: Tensor, num_items_in_batch: Any = None
) -> Tensor:
    """Add the weighted `aux_loss` of the model, if there is one, to the loss of a head.

    Args:
        loss: () loss of the head.
        outputs: outputs of the model.
        config: its `router_aux_loss_coef` is the weight.
        labels: labels of this call, -100 where there is no loss.
        num_items_in_batch: number of labels of the whole step, if `loss` is a sum over this call divided by that
            number. The call then adds its share of the auxiliary loss, so that a step of several calls adds it once.
    """
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        return loss
    weight = config.router_aux_loss_coef
    if num_items_in_batch is not None:
        weight = weight * (labels != -100).sum() / num_items_in_batch
    return loss + (weight * aux_loss).to(loss.device, loss.dtype)
