"""A leaky sum of the values, head by head: `S_t = l S_{t-1} + v_t`, `y_t = S_t`, with a decay l that is learned.

Symbols: B batch, L length, D width, H heads.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.ssd import ssd_log_decay, ssd_matrix
from .cache import layer_of
from .layers import inverse_softplus
from .mixer import (
    FromAttention,
    MixerSettings,
    TokenMixer,
    check_sizes,
    copy_output,
    float32_parameter,
    initialise_alone,
    matrix_rows,
)
from .token_layout import Sequence


class LeakySum(nn.Module):
    """The mixer."""

    float32_parameters = ("leak",)

    def __init__(self, width: int, heads: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, heads
        self.in_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.leak = float32_parameter(heads)
        initialise_alone(self.initialise)

    def initialise(self) -> None:
        init.constant_(self.leak, -2.0)

    @torch.no_grad()
    def set_half_lives(self, half_lives: Tensor) -> None:
        self.leak.copy_(inverse_softplus(math.log(2.0) / half_lives))

    @torch.no_grad()
    def start_from(self, view: Any) -> None:
        self.in_proj.weight.copy_(view.expand_heads(view.v))
        self.in_proj.bias.zero_()
        copy_output(self.out_proj, view)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        started = bool(getattr(cache, "is_initialized", False))
        x = self.in_proj(sequence.blank(hidden_states)).unflatten(-1, (self.num_heads, -1))
        log_decay, ones = self.factors(x)
        y, state = ssd_log_decay(
            x,
            log_decay,
            ones,
            ones,
            initial_state=cache.recurrent_state if started else None,
            seq_idx=sequence.seq_idx,
            return_final_state=True,
        )
        if cache is not None:
            cache.set_states(None, state, x.shape[1])
        factors = (log_decay, ones, ones)
        attention = matrix_rows(self.mixing_matrix, factors, sequence, cache) if output_attentions else None
        return self.out_proj(y.flatten(2)), attention

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:2], self.num_heads)
        return -F.softplus(self.leak.float()).expand(shape), x.new_ones(*shape, 1)

    def mixing_matrix(self, log_decay: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        return ssd_matrix(log_decay, B, C, seq_idx=sequence.seq_idx)

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) mixing matrix for normed (B, L, D) hidden states, without the outputs."""
        log_decay, ones = self.factors(hidden_states)
        return self.mixing_matrix(log_decay, ones, ones, sequence)


@strict
@dataclass
class LeakySettings(MixerSettings):
    heads: int = 4

    def validate_heads(self) -> None:
        check_sizes(self, "heads")

    def check(self, config: Any) -> None:
        if config.hidden_size % self.heads:
            raise ValueError(f"heads must divide hidden_size ({config.hidden_size}), got {self.heads}")


LEAKY = TokenMixer(
    label="leaky sum: a decay for each head",
    make=lambda config, settings, layer_idx: LeakySum(config.hidden_size, settings.heads, layer_idx),
    settings=LeakySettings,
    student=FromAttention(
        lambda teacher, spec: {"leaky": {"heads": teacher.num_attention_heads}},
        ("half_life", "calibration", "copy_projections"),
    ),
)
