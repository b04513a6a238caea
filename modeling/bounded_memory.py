"""Attention over a bounded memory, a drop-in for softmax attention whose cache does not grow with the context.

The projections, rotary positions and grouped key-value heads are those of attention. A query sees a window, the first
tokens of its document and slots for earlier tokens that received much attention; `kernels/bounded_attention.py` defines
which. An attention layer that is replaced by this one computes the same as long as its memory holds the whole text.

Chosen key-value heads may be exact: their queries see all tokens, and the cache of these heads grows by a key and a
value per token.

Keys and values may be held as 8-bit integers, so that the same bytes hold almost four times as many rows of float32.

Symbols: B batch, L new tokens, D width, H query heads, KV key-value heads, P head width, N rows of the memory, E exact
key-value heads, M columns of a row.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.bounded_attention import (
    BoundedMemory,
    bounded_attention,
    bounded_attention_matrix,
    bounded_attention_step,
)
from ..kernels.int8_rows import dequantise_rows, quantise_rows, round_rows
from ..kernels.tracing import tracing
from .cache import ZooLayer, layer_of
from .layers import GroupedAttention
from .mixer import FromAttention, MixerSettings, TokenMixer, check_sizes, distillation, is_single_step
from .softmax_attention import softmax_attention
from .token_layout import Sequence


class BoundedAttention(GroupedAttention):
    """Softmax attention over a window, sinks and slots; over all tokens in exact heads.

    Args:
        config: the model's.
        settings: a :class:`BoundedAttentionSettings`.
        layer_idx: number of the block.
    """

    def __init__(self, config: Any, settings: "BoundedAttentionSettings", layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.settings = settings
        self.add_projections(config, config.attention_bias, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) attention matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        exact, bounded = self._heads()
        qkv = self._projections(hidden_states, sequence)
        outputs: list[tuple[list[int], Tensor]] = []
        matrices: list[tuple[list[int], Tensor]] = []
        for heads, attend in ((exact, self._attend_to_all), (bounded, self._attend_to_memory)):
            if heads:
                y, matrix = attend(heads, self._of(heads, qkv), sequence, cache, output_attentions)
                outputs.append((heads, y))
                if matrix is not None:
                    matrices.append((heads, matrix))
        if cache is not None:
            cache.count(hidden_states.shape[1])
        y = _in_order(outputs, dim=2)
        return self.o_proj(y.flatten(2)), _in_order(matrices, dim=1) if output_attentions else None

    def _attend_to_memory(
        self, heads: list[int], qkv: tuple[Tensor, ...], sequence: Sequence, cache: Any, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, L, H', P) of the query heads of bounded heads, and their matrix if asked for."""
        q, k, v = qkv
        options = self._options(heads)
        memory = cache.memory() if cache is not None else None
        step = is_single_step(q, sequence, cache) and not (output_attentions or tracing())
        if memory is not None and step:
            if memory.keys_scales is None:
                k, v = self._rounded(k, v)
            return bounded_attention_step(q[:, 0], k[:, 0], v[:, 0], memory, **options)[:, None], None
        k, v = self._rounded(k, v)
        options |= {"seq_idx": sequence.seq_idx, "initial_state": memory}
        y, memory = bounded_attention(q, k, v, **options)
        matrix = None
        if output_attentions:
            matrix = _over_columns(bounded_attention_matrix(q, k, v, **options), sequence)
        if cache is not None:
            recorded = memory.keys.requires_grad or memory.values.requires_grad
            cache.set_memory(memory if self.settings.kv_dtype == "auto" or recorded else memory.quantised())
        return y, matrix

    def _attend_to_all(
        self, heads: list[int], qkv: tuple[Tensor, ...], sequence: Sequence, cache: Any, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, L, H', P) of the query heads of exact heads, and their matrix if asked for."""
        q, k, v = qkv
        q, k, v = (x.transpose(1, 2) for x in (q, *self._rounded(k, v)))
        if cache is not None:
            k, v = cache.append(k, v, quantised=self.settings.kv_dtype == "int8")
        k, v = k.to(q.dtype), v.to(q.dtype)  # rounded ones are float32
        return softmax_attention(self, q, k, v, sequence, output_attentions=output_attentions)

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) attention matrix of normed (B, L, D) hidden states, without the outputs."""
        exact, bounded = self._heads()
        qkv = self._projections(hidden_states, sequence)
        matrices: list[tuple[list[int], Tensor]] = []
        if exact:
            matrix = self._attend_to_all(exact, self._of(exact, qkv), sequence, None, True)[1]
            assert matrix is not None  # it was asked for
            matrices.append((exact, matrix))
        if bounded:
            q, k, v = self._of(bounded, qkv)
            k, v = self._rounded(k, v)
            matrix = bounded_attention_matrix(q, k, v, **self._options(bounded), seq_idx=sequence.seq_idx)
            matrices.append((bounded, _over_columns(matrix, sequence)))
        return _in_order(matrices, dim=1)

    def _projections(self, hidden_states: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, H, P) queries, and (B, L, KV, P) keys and values."""
        hidden_states = sequence.blank(hidden_states)
        q = self.to_heads(self.q_proj(hidden_states), self.q_norm, sequence)
        k = self.to_heads(self.k_proj(hidden_states), self.k_norm, sequence)
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return q, k, v

    def _rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as queries see them, also those that no cache holds yet."""
        return (round_rows(k), round_rows(v)) if self.settings.kv_dtype == "int8" else (k, v)

    def _heads(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the exact and of the other key-value heads."""
        exact = self.settings.exact_of(self.layer_idx)
        return exact, [head for head in range(self.num_kv_heads) if head not in exact]

    def _of(self, heads: list[int], qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the queries, keys and values that belong to some key-value heads, in ascending order."""
        if len(heads) == self.num_kv_heads:
            return qkv
        groups = [x.unflatten(2, (self.num_kv_heads, -1)).unbind(2) for x in qkv]
        return tuple(torch.cat([group[head] for head in heads], dim=2) for group in groups)

    def _options(self, heads: list[int]) -> dict[str, Any]:
        settings = self.settings
        slots = settings.slots_of(self.layer_idx, self.num_kv_heads)
        decays = settings.decays_of(self.layer_idx, self.num_kv_heads)
        return {
            "window": settings.window,
            "sinks": settings.sinks,
            "slots": [slots[head] for head in heads],
            "chunk_size": settings.chunk_size,
            "decay": [decays[head] for head in heads],
            "scale": self.scaling,
            "softcap": self.softcap,
        }


class BoundedLayer(ZooLayer):
    """The memory of attention over a window and slots: keys and values (B, N, P) of the rows of all bounded heads,
    their scores and positions (B, N). With exact heads also the keys and values (B, E, M, P) of all columns. Keys and
    values of 8 bits have scales, (B, N) and (B, E, M); those that gradients reach are not quantised."""

    _layer_type = "zoo_bounded"
    _memory = BoundedMemory._fields
    _exact = ("exact_keys", "exact_values", "exact_keys_scales", "exact_values_scales")
    _tensors = (*_memory, *_exact)
    _replaced = _exact

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("BoundedLayer holds chosen keys and values, not all of them: use memory and set_memory")

    def memory(self) -> BoundedMemory | None:
        """Return what :meth:`set_memory` has stored, None before the first token."""
        memory = BoundedMemory(*(getattr(self, name) for name in self._memory))
        return None if memory.keys is None else memory

    def set_memory(self, memory: BoundedMemory) -> None:
        """Store a memory."""
        for name, tensor in memory._asdict().items():
            setattr(self, name, tensor)

    def append(self, keys: Tensor, values: Tensor, *, quantised: bool) -> tuple[Tensor, Tensor]:
        """Append the (B, E, L, P) keys and values of exact heads; return those of all columns.

        Quantised ones, given as `round_rows` returns them, are stored in 8 bits unless gradients reach them.
        """
        names = self._exact[:2]
        held = [_dequantised(getattr(self, name), getattr(self, f"{name}_scales"), keys.dtype) for name in names]
        every = [
            new if old is None else torch.cat([old, new], dim=2) for old, new in zip(held, (keys, values), strict=True)
        ]
        as_integers = quantised and not any(x.requires_grad for x in every)
        for name, new, whole in zip(names, (keys, values), every, strict=True):
            stored, scales = whole, None
            if as_integers:
                stored, scales = getattr(self, name), getattr(self, f"{name}_scales")
                if scales is None:
                    stored, scales = quantise_rows(whole)
                else:
                    pairs = zip((stored, scales), quantise_rows(new), strict=True)
                    stored, scales = (torch.cat(pair, dim=2) for pair in pairs)
            setattr(self, name, stored)
            setattr(self, f"{name}_scales", scales)
        return every[0], every[1]

    def count(self, tokens: int) -> None:
        """Count `tokens` more columns, once all heads have read them."""
        self.columns += tokens
        self.is_initialized = True


def _dequantised(held: Tensor | None, scales: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return held if held is None or scales is None else dequantise_rows(held, scales, dtype)


def _in_order(parts: list[tuple[list[int], Tensor]], dim: int) -> Tensor:
    """Put the query heads of all groups, which are axis `dim` of the parts, into the order of their key-value heads."""
    if len(parts) == 1:
        return parts[0][1]
    groups: dict[int, Tensor] = {}
    for heads, tensor in parts:
        groups.update(zip(heads, tensor.unflatten(dim, (len(heads), -1)).unbind(dim), strict=True))
    return torch.cat([groups[head] for head in sorted(groups)], dim=dim)


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
            key-value heads (empty for a block with another mixer; 0 for an exact head).
        chunk_size: tokens after which the slots are chosen again; at most `window`.
        score_decay: factor per token on the attention that a token has received, by which slots are chosen; 1 keeps
            it all. Or for each block a list with a number for each of its key-value heads, as for `slots`.
        exact: for each block a list of the key-value heads that see and keep all tokens, in ascending order; or an
            empty list: none. Window, sinks, slots and decay have no effect on them.
        kv_dtype: how the cache holds keys and values, and how precisely all queries see them: "auto" in the model's
            dtype; "int8" as 8-bit integers with a scale for each key and value of a head (`kernels/int8_rows.py`).
    """

    window: int = 32
    sinks: int = 4
    slots: int | list[list[int]] = 60
    chunk_size: int = 16
    score_decay: float | list[list[float]] = 1.0
    exact: list[list[int]] = field(default_factory=list)
    kv_dtype: Literal["auto", "int8"] = "auto"

    def slots_of(self, layer_idx: int, heads: int) -> list[int]:
        """Return the number of slots of each key-value head of a block."""
        return [self.slots] * heads if isinstance(self.slots, int) else self.slots[layer_idx]

    def decays_of(self, layer_idx: int, heads: int) -> list[float]:
        """Return the decay of each key-value head of a block."""
        return self.score_decay[layer_idx] if isinstance(self.score_decay, list) else [self.score_decay] * heads

    def exact_of(self, layer_idx: int) -> list[int]:
        """Return the exact key-value heads of a block."""
        return self.exact[layer_idx] if self.exact else []

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
        blocks = [config.num_key_value_heads if kind == "bounded_attention" else 0 for kind in config.mixer_types]
        lists = {name: getattr(self, name) for name in ("slots", "score_decay", "exact")}
        lists = {name: given for name, given in lists.items() if isinstance(given, list)}
        if not self.exact:
            del lists["exact"]
        for name, given in lists.items():
            if len(given) != len(blocks):
                raise ValueError(f"{name} must have a list for each of {len(blocks)} blocks, got {len(given)}")
            for block, (heads, numbers) in enumerate(zip(blocks, given, strict=True)):
                if name != "exact" and (len(numbers) != heads or any(number < 0 for number in numbers)):
                    raise ValueError(f"{name}[{block}] must be {heads} numbers of at least 0, got {numbers}")
        for block, exact in enumerate(self.exact):
            if exact != [head for head in range(blocks[block]) if head in exact]:
                accepted = f"different numbers from 0 to {blocks[block] - 1}, ascending" if blocks[block] else "empty"
                raise ValueError(f"exact[{block}] must be {accepted}, got {exact}")
            slots = self.slots[block] if isinstance(self.slots, list) else []
            if slots and any(slots[head] for head in exact):
                raise ValueError(
                    f"slots[{block}] must be 0 for the exact heads {exact}, which keep all tokens, got {slots}"
                )


def _bounded_attention_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    slots = spec.rows - spec.window - spec.sinks
    if slots < 0:
        raise ValueError(
            f"student.rows must be at least window + sinks ({spec.window} + {spec.sinks}), got {spec.rows}"
        )
    settings = {name: getattr(spec, name) for name in ("window", "sinks", "chunk_size", "kv_dtype")} | {"slots": slots}
    if spec.exact_heads:
        blocks = range(teacher.num_hidden_layers)
        settings["exact"] = [sorted(head for layer, head in spec.exact_heads if layer == block) for block in blocks]
    return {"bounded_attention": settings}


BOUNDED_ATTENTION = TokenMixer(
    label="softmax attention over a bounded memory: a window, the first tokens and slots",
    make=BoundedAttention,
    settings=BoundedAttentionSettings,
    cache_layer="zoo_bounded",
    student=FromAttention(
        _bounded_attention_keys,
        ("window", "sinks", "rows", "slots", "chunk_size", "exact_heads", "kv_dtype", "calibration"),
        is_attention=True,
    ),
)
