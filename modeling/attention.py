"""Softmax attention with rotary positions and grouped key-value heads, full or over a sliding window.

Symbols: B batch, L new tokens, D width, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.tracing import tracing
from .cache import layer_of
from .layers import GroupedAttention, ShortConvolution, init_short_convolution
from .mixer import FromAttention, MixerSettings, TokenMixer, check_sizes, is_single_step
from .softmax_attention import softmax_attention
from .token_layout import Sequence


class Attention(GroupedAttention):
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
        self.add_projections(config, config.attention_bias, layer_idx)
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
        q, k = self.to_heads(q, self.q_norm, sequence), self.to_heads(k, self.k_norm, sequence)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v.unflatten(-1, (-1, self.head_dim))))
        query_positions = key_positions = None
        cache = layer_of(past_key_values, self.layer_idx)
        if cache is not None and self.window is not None:
            k, v, key_positions, query_positions = cache.update(k, v, window=self.window, real=sequence.real)
        elif cache is not None and self.stays:
            k, v = cache.update(k, v)
        elif past_key_values is not None:
            if past_key_values.offloading:  # transformers may have fetched a recurrent layer, taking it for this
                past_key_values.layers[self.layer_idx].prefetch()
            k, v = past_key_values.update(k, v, self.layer_idx)
            if not tracing():  # the columns of a static cache that are still empty
                columns = sequence.past + q.shape[2]
                if k.shape[2] > columns:
                    k, v = k[:, :, :columns], v[:, :, :columns]
        y, attention = softmax_attention(
            self,
            q,
            k,
            v,
            sequence,
            window=self.window,
            query_positions=query_positions,
            key_positions=key_positions,
            output_attentions=output_attentions,
        )
        if attention is not None and cache is not None:
            attention = sequence.over_columns(attention, key_positions)
        return self.o_proj(y.flatten(2)), attention

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

    def check(self, config: Any) -> None:
        if self.conv_kernel and getattr(config, "bidirectional", False):
            raise ValueError(
                f"conv_kernel must be 0 with bidirectional=True, as the convolution is causal, got {self.conv_kernel}"
            )


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
    bidirectional=True,
    cache_layer=lambda settings: "zoo_convolved_attention" if settings.get("conv_kernel") else "full_attention",
    prefix=True,
    flat={"attention_conv_kernel": "conv_kernel"},
)
SLIDING_ATTENTION = TokenMixer(
    label="softmax attention over a sliding window",
    make=lambda config, settings, layer_idx: Attention(config, layer_idx, settings.sliding_window),
    settings=SlidingAttentionSettings,
    cache_layer="zoo_window",
    prefix=True,
    student=FromAttention(
        lambda teacher, spec: {"sliding_attention": {"sliding_window": spec.sliding_window}},
        ("sliding_window", "calibration"),
        is_attention=True,
    ),
    flat={"sliding_window": "sliding_window"},
)
