"""Attention over a bounded memory, a drop-in for softmax attention whose cache does not grow with the context.

The projections, rotary positions and grouped key-value heads are those of attention. A query sees a window, the first
tokens of its document and slots for earlier tokens that received much attention; `kernels/bounded_attention.py` defines
which. An attention layer that is replaced by this one computes the same as long as its memory holds the whole text.

Symbols: B batch, L new tokens, D width, H query heads, KV key-value heads, P head width, N rows of the memory.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.bounded_attention import (
    BoundedMemory,
    bounded_attention,
    bounded_attention_matrix,
    bounded_attention_step,
)
from ..kernels.tracing import tracing
from .cache import ZooLayer, layer_of
from .layers import GroupedAttention, rotate
from .mixer import FromAttention, MixerSettings, TokenMixer, check_sizes, distillation, is_single_step
from .token_layout import Sequence


class BoundedAttention(GroupedAttention):
    """Softmax attention over a window, sinks and slots.

    Args:
        config: the model's.
        settings: a :class:`BoundedAttentionSettings`.
        layer_idx: number of the block.
    """

    def __init__(self, config: Any, settings: "BoundedAttentionSettings", layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.settings = settings
        self.add_projections(config, config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) attention matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        q, k, v = self._projections(hidden_states, sequence)
        options = self._options()
        started = cache.memory() if cache is not None else None
        memory = None if started is None else BoundedMemory(*started)
        step = is_single_step(hidden_states, sequence, cache) and not (output_attentions or tracing())
        if cache is not None and memory is not None and step:
            y = bounded_attention_step(q[:, 0], k[:, 0], v[:, 0], memory, **options)[:, None]
            cache.columns += 1
            return self.o_proj(y.flatten(2)), None
        options |= {"seq_idx": sequence.seq_idx, "initial_state": memory}
        y, memory = bounded_attention(q, k, v, **options)
        attention = None
        if output_attentions:
            attention = _over_columns(bounded_attention_matrix(q, k, v, **options), sequence)
        if cache is not None:
            cache.set_memory(memory, q.shape[1])
        return self.o_proj(y.flatten(2)), attention

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) attention matrix of normed (B, L, D) hidden states, without the outputs."""
        q, k, v = self._projections(hidden_states, sequence)
        matrix = bounded_attention_matrix(q, k, v, **self._options(), seq_idx=sequence.seq_idx)
        return _over_columns(matrix, sequence)

    def _projections(self, hidden_states: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, H, P) queries, and (B, L, KV, P) keys and values."""
        hidden_states = sequence.blank(hidden_states)
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        assert sequence.rotary is not None
        cos, sin = (table[:, :, None] for table in sequence.rotary)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "window": settings.window,
            "sinks": settings.sinks,
            "slots": settings.slots_of(self.layer_idx, self.num_kv_heads),
            "chunk_size": settings.chunk_size,
            "decay": settings.decays_of(self.layer_idx),
        }


class BoundedLayer(ZooLayer):
    """The memory of attention over a window and slots: keys and values (B, N, P) of the rows of all key-value heads,
    their scores and positions (B, N)."""

    _layer_type = "zoo_bounded"
    _tensors = ("keys", "values", "scores", "positions")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("BoundedLayer holds chosen keys and values, not all of them: use memory and set_memory")

    def memory(self) -> tuple[Tensor, ...] | None:
        """Return what :meth:`set_memory` has stored, None before the first token."""
        tensors = [getattr(self, name) for name in self._tensors]
        return None if tensors[0] is None else tuple(tensors)

    def set_memory(self, memory: tuple[Tensor, ...], tokens: int) -> None:
        """Store keys, values, scores and positions after a forward over `tokens` more columns."""
        for name, tensor in zip(self._tensors, memory, strict=True):
            setattr(self, name, tensor)
        self.columns += tokens
        self.is_initialized = True


def _over_columns(matrix: Tensor, sequence: Sequence) -> Tensor:
    """(B, H, L, M) weights of the real tokens of each row to (B, H, L, past + L) weights of its columns."""
    length = sequence.position_ids.shape[1]
    real = sequence.attention_mask
    if real is None and sequence.seq_idx is not None and not sequence.past:
        real = sequence.seq_idx >= 0
    if real is None:
        return matrix
    assert real.shape[1] == sequence.past + length
    place = (real.cumsum(-1) - 1).clamp(0, matrix.shape[-1] - 1)
    columns = matrix.gather(-1, place[:, None, None].expand(-1, *matrix.shape[1:3], -1))
    return columns * real[:, None, None]


@strict
@dataclass
class BoundedAttentionSettings(MixerSettings):
    """Attention over a bounded memory in `zoo_hybrid`.

    Args:
        window: w, length of the window; a query sees between `window - chunk_size + 1` and `window` tokens of it.
        sinks: first tokens of a document that are never evicted.
        slots: further tokens that each key-value head keeps; or for each block a list with a number for each of its
            key-value heads (empty for a block with another mixer).
        chunk_size: tokens after which the slots are chosen again; at most `window`.
        score_decay: factor per token on the attention that a token has received, by which slots are chosen; 1 keeps
            it all. Or for each block a list with a number for each of its key-value heads, as for `slots`.
    """

    window: int = 32
    sinks: int = 4
    slots: int | list[list[int]] = 60
    chunk_size: int = 16
    score_decay: float | list[list[float]] = 1.0

    def slots_of(self, layer_idx: int, heads: int) -> list[int]:
        """The number of slots of each key-value head of a block."""
        return [self.slots] * heads if isinstance(self.slots, int) else self.slots[layer_idx]

    def decays_of(self, layer_idx: int) -> float | list[float]:
        """The decay of each key-value head of a block, or of all."""
        return self.score_decay[layer_idx] if isinstance(self.score_decay, list) else self.score_decay

    def validate_memory(self) -> None:
        check_sizes(self, "chunk_size")
        check_sizes(self, "sinks", least=0)
        if self.window < self.chunk_size:
            raise ValueError(f"window must be at least chunk_size ({self.chunk_size}), got {self.window}")
        given = self.score_decay if isinstance(self.score_decay, list) else [[self.score_decay]]
        for number in (number for numbers in given for number in numbers):
            if not 0 < number <= 1:
                raise ValueError(f"score_decay must be above 0 and at most 1, got {number}")

    def check(self, config: Any) -> None:
        if isinstance(self.slots, int):
            check_sizes(self, "slots", least=0)
        for name in ("slots", "score_decay"):
            given = getattr(self, name)
            if not isinstance(given, list):
                continue
            if len(given) != config.num_hidden_layers:
                raise ValueError(
                    f"{name} must have a list for each of {config.num_hidden_layers} blocks, got {len(given)}"
                )
            for block, (kind, numbers) in enumerate(zip(config.mixer_types, given, strict=True)):
                heads = config.num_key_value_heads if kind == "bounded_attention" else 0
                if len(numbers) != heads or any(number < 0 for number in numbers):
                    raise ValueError(f"{name}[{block}] must be {heads} numbers of at least 0, got {numbers}")


def _bounded_attention_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    slots = spec.rows - spec.window - spec.sinks
    if slots < 0:
        raise ValueError(
            f"student.rows must be at least window + sinks ({spec.window} + {spec.sinks}), got {spec.rows}"
        )
    names = ("window", "sinks", "chunk_size")
    return {"bounded_attention": {"slots": slots} | {name: getattr(spec, name) for name in names}}


BOUNDED_ATTENTION = TokenMixer(
    label="softmax attention over a bounded memory: a window, the first tokens and slots",
    make=BoundedAttention,
    settings=BoundedAttentionSettings,
    cache_layer="zoo_bounded",
    student=FromAttention(
        _bounded_attention_keys,
        ("window", "sinks", "rows", "slots", "chunk_size", "calibration"),
        is_attention=True,
    ),
)
