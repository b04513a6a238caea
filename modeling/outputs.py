"""What a model that chooses tokens says of its choice, and the loss that keeps the choice within its capacity.

Symbols: B batch, L new tokens, N layers that choose, C capacity.
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
    """transformers' output, and of models that choose tokens what they chose.

    Attributes:
        aux_loss: () the capacity loss of all layers that choose, not yet multiplied by its coefficient.
        router_logits: of each such layer the (B, L, 2) scores of passing by and of attending.
        selection_rate: (N) share of the real tokens that each such layer chose.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selection_rate: Tensor | None = None


@dataclass
class ZooCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, and the fields of :class:`ZooModelOutput`; `loss` holds the weighted `aux_loss` already
    while training."""

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    selection_rate: Tensor | None = None


def routing_outputs(choices: list[tuple[Tensor, Tensor]], real: Tensor | None, capacity: float) -> dict[str, Any]:
    """The fields that a model with layers that choose adds to its output.

    Args:
        choices: of each such layer the (B, L, 2) scores and the (B, L) decisions, 1 or 0 and 0 at padding, through
            which gradients reach the scores.
        real: (B, L) False at padding, None if there is none.
        capacity: C, the share of the tokens that a layer may choose.
    """
    decisions = torch.stack([decision for _, decision in choices])  # (N, B, L)
    count = decisions.new_full(decisions.shape[1:2], decisions.shape[2]) if real is None else real.sum(-1).float()
    rates = decisions.sum(-1) / count.clamp(min=1)  # (N, B)
    # Taipan, eq. 7: of every row by itself, since what a row decodes costs what that row chooses. A row of padding
    # chooses nothing and counts nothing.
    rows = (count > 0).float()
    penalty = ((capacity - rates).square() * rows).sum() / rows.sum().clamp(min=1)
    with torch.no_grad():
        selection_rate = decisions.sum((1, 2)) / count.sum().clamp(min=1)
    logits = tuple(scores for scores, _ in choices)
    return {"aux_loss": penalty, "router_logits": logits, "selection_rate": selection_rate}


def tell_of_lost_aux_loss(outputs: Any, config: PreTrainedConfig) -> None:
    """Warn once that a loss worked out from the logits, as the Trainer's smoothed one is, lacks the `aux_loss`."""
    if getattr(outputs, "aux_loss", None) is not None and config.router_aux_loss_coef > 0:
        logger.warning_once(
            f"router_aux_loss_coef is {config.router_aux_loss_coef}, but the loss is worked out without the model "
            "(label smoothing does that), and so without its capacity loss: add outputs.aux_loss in compute_loss_func, "
            "or set the coefficient to 0"
        )


def add_aux_loss(
    loss: Tensor, outputs: Any, config: PreTrainedConfig, labels: Tensor, num_items_in_batch: Any = None
) -> Tensor:
    """The loss of a head with the weighted `aux_loss` of the model added, where there is one.

    Args:
        loss: () of the head.
        outputs: the model's.
        config: its `router_aux_loss_coef` is the weight.
        labels: of this call, -100 where there is no loss.
        num_items_in_batch: labels of the whole step, where `loss` is a sum over this call divided by it: then this
            call adds its share of the auxiliary loss, so that a step of several calls adds it once.
    """
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        return loss
    weight = config.router_aux_loss_coef
    if num_items_in_batch is not None:
        weight = weight * (labels != -100).sum() / num_items_in_batch
    return loss + (weight * aux_loss).to(loss.device, loss.dtype)
