"""Softmax attention with rotary positions and grouped key-value heads, full or over a sliding window.

Symbols: B batch, L new tokens, M key columns, D width, H heads.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import layer_of
from .layers import ShortConvolution, init_short_convolution, rotate
from .mixer import FromAttention, MixerSettings, TokenMixer, check_sizes, is_single_step
from .token_layout import Sequence


class Attention(nn.Module):
    """Softmax attention with rotary positions and grouped key-value heads.

    Args:
        config: the model's.
        layer_idx: number of the block.
        window: tokens that a query sees, itself included; None: all.
        conv_kernel: K, width of a causal depthwise convolution, with a bias and without an activation, of queries, keys
            and values before their positions, as in state-spaces' `modules/mha.py` (mamba_ssm 2.2.4, `d_conv`); 0:
            none. Only without a window.
    """

    def __init__(self, config: Any, layer_idx: int, window: int | None, conv_kernel: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.window = window
        # Where the block has another mixer too, one layer of the cache serves both, and never leaves the device.
        self.stays = window is None and config.layer_types[layer_idx] != "full_attention"
        self.num_heads, self.num_kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.head_dim = int(config.head_dim or 0)
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)
        self.conv1d = None
        if conv_kernel:
            assert window is None
            channels = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            self.conv1d = ShortConvolution(channels, conv_kernel, bias=True)

    def initialise(self) -> None:
        if self.conv1d is not None:
            init_short_convolution(self.conv1d)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) attention matrix if asked for."""
        hidden_states = sequence.blank(hidden_states)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.conv1d is not None:
            q, k, v = self._convolved(self.conv1d, (q, k, v), sequence, layer_of(past_key_values, self.layer_idx))
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        assert sequence.rotary is not None
        cos, sin = (table[:, None] for table in sequence.rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        key_positions = None
        if self.window is None:
            if past_key_values is not None and self.stays:
                k, v = layer_of(past_key_values, self.layer_idx).update(k, v)
            elif past_key_values is not None:
                if past_key_values.offloading:  # transformers may have fetched a recurrent layer, taking it for this
                    past_key_values.layers[self.layer_idx].prefetch()
                k, v = past_key_values.update(k, v, self.layer_idx)
            mask = sequence.full_mask(k.shape[2])
        else:
            query_positions = None
            cache = layer_of(past_key_values, self.layer_idx)
            if cache is not None:
                k, v, key_positions, query_positions = cache.update(k, v, window=self.window, real=sequence.real)
            mask = sequence.window_mask(self.window, query_positions, key_positions)
        repeats = self.num_heads // self.num_kv_heads
        if repeats > 1:  # by 1 it would copy them all the same
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scale = self.head_dim**-0.5
        attention = None
        if output_attentions or self.config._attn_implementation == "eager":
            attention = _attention_matrix(q, k, mask, scale)
            y = attention.to(v.dtype) @ v
        else:
            causal = mask is None
            if q.shape[2] == 1:  # not as one expression: in a traced graph that is no bool, but a symbol
                causal = False
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        if output_attentions and attention is not None and past_key_values is not None:
            attention = sequence.over_columns(attention, key_positions)
        return self.o_proj(y.transpose(1, 2).flatten(2)), attention if output_attentions else None

    @staticmethod
    def _convolved(
        convolution: ShortConvolution, parts: tuple[Tensor, ...], sequence: Sequence, cache: Any
    ) -> tuple[Tensor, ...]:
        """Convolve the (B, L, ...) projections along L, going on from the cached inputs."""
        x = torch.cat(parts, dim=-1)
        single = is_single_step(x, sequence, cache)
        state = None if cache is None else cache.conv_state
        x, state = convolution(x, state, sequence.seq_idx, in_place=single)
        if cache is not None:
            cache.conv_state = state
        return x.split([part.shape[-1] for part in parts], dim=-1)


def _attention_matrix(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, L, M) softmax in float32; causal where `mask` is None."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if mask is None:
        length, keys = scores.shape[-2:]
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


@strict
@dataclass
class FullAttentionSettings(MixerSettings):
    """Attention over the whole context in `zoo_hybrid`.

    Args:
        conv_kernel: K, width of a causal convolution of the queries, keys and values, at least 2; 0: none.
    """

    conv_kernel: int = 0

    def validate_kernel(self) -> None:
        if self.conv_kernel < 0 or self.conv_kernel == 1:
            raise ValueError(f"conv_kernel must be 0 or at least 2, got {self.conv_kernel}")


@strict
@dataclass
class SlidingAttentionSettings(MixerSettings):
    """Attention over a sliding window in `zoo_hybrid`.

    Args:
        sliding_window: tokens that a query sees, itself included.
    """

    sliding_window: int = 256

    def validate_window(self) -> None:
        check_sizes(self, "sliding_window")


FULL_ATTENTION = TokenMixer(
    label="softmax attention over the whole context",
    make=lambda config, settings, layer_idx: Attention(config, layer_idx, None, settings.conv_kernel),
    settings=FullAttentionSettings,
    cache_layer=lambda settings: "zoo_convolved_attention" if settings.get("conv_kernel") else "full_attention",
    flat={"attention_conv_kernel": "conv_kernel"},
)
SLIDING_ATTENTION = TokenMixer(
    label="softmax attention over a sliding window",
    make=lambda config, settings, layer_idx: Attention(config, layer_idx, settings.sliding_window),
    settings=SlidingAttentionSettings,
    cache_layer="zoo_window",
    student=FromAttention(
        lambda teacher, spec: {"sliding_attention": {"sliding_window": spec.sliding_window}},
        ("sliding_window",),
        is_attention=True,
    ),
    flat={"sliding_window": "sliding_window"},
)
