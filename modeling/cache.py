"""Cache layers of recurrent and windowed token mixers, for transformers' own cache classes.

`DynamicCache(config=...)` and `StaticCache(config=...)` build these layers from `config.layer_types`:
"zoo_recurrent" gives a :class:`RecurrentLayer`, "zoo_window" a :class:`WindowLayer` and
"zoo_convolved_attention" a :class:`ConvolvedAttentionLayer`. transformers' own layers
for the same purposes do not fit: its linear-attention layer does not know how many tokens it has seen (`generate`
asks), and neither that one nor its sliding layer leaves out the padding of a right-padded batch.

Mixers whose weights depend on the position of a token keep their inputs ("zoo_history") or a state ("zoo_state"), and
count tokens: a position is a token's rank among the real tokens of its row, which only the layer knows, since padding
may be anywhere. "zoo_attention_history" and "zoo_attention_state" also hold the keys and values of a block's attention.

Symbols: B batch, H heads, P head width, N state size, D convolution channels, K convolution width or places of a
history, L length.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.tracing import tracing
from .rollback import RecordsPast

CACHE_FIELD = next(
    field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)
"""Field of transformers' outputs that holds the cache: "cache" since 5.24, "past_key_values" before."""


class ZooLayer(RecordsPast, CacheLayerMixin):
    """A cache layer that holds a fixed set of (B, ...) tensors and the number of columns seen."""

    is_compileable = False
    supports_early_init = False
    is_sliding = False
    _layer_type: str | None = None
    _tensors: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the layer with transformers under its `_layer_type`, for dynamic and static caches."""
        super().__init_subclass__(**kwargs)
        for mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
            if cls._layer_type is not None:
                mapping[cls._layer_type] = cls

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.columns = 0  # tokens seen, padding included, as `generate` counts them
        for name in self._tensors:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def _map(self, function: Any) -> None:
        self.forget_past()
        for name in self._tensors:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        for name in self._tensors:
            setattr(self, name, None)
        self.columns = 0
        self.is_initialized = False
        self.forget_past()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Do nothing: the layer is small and remains on its device."""

    def prefetch(self) -> None:
        """Do nothing, as nothing was offloaded."""


class RecurrentLayer(ZooLayer):
    """State of one state-space layer: `conv_state` (B, D, K-1), the last real inputs of the convolution, and
    `recurrent_state` in float32, (B, H, P, N) or, of Mamba-1, (B, D, N). Both are None before the first token."""

    _layer_type = "zoo_recurrent"
    _tensors = ("conv_state", "recurrent_state")

    conv_state: Tensor | None
    recurrent_state: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factors: tuple[Tensor, ...] | None = None
        """Factors of the mixing matrix, (B, columns, ...) each; kept only while matrices are asked for."""
        self._counts: Tensor | None = None

    def _map(self, function: Any) -> None:
        super()._map(function)
        if self.factors is not None:
            self.factors = tuple(function(factor) for factor in self.factors)

    def reset(self) -> None:
        super().reset()
        self.factors = None

    def keep_factors(self, new: tuple[Tensor, ...], past: int) -> tuple[Tensor, ...] | None:
        """Append the (B, L, ...) factors of the new tokens' mixing matrix to those of the `past` columns.

        Returns:
            All factors, (B, past + L, ...); None if those of past columns were not kept.
        """
        if past != (0 if self.factors is None else self.factors[0].shape[1]):
            self.factors = None
            return None
        if self.factors is not None:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.factors, new, strict=True))
        self.factors = new
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("RecurrentLayer holds states, not keys and values: call `set_states`")

    def step_counts(self, groups: int) -> Tensor:
        """Return (B, G) int32 zeros that :func:`~ssm_zoo.kernels.mamba2_step.mamba2_step` counts in, and leaves zero.

        Every step gets the same tensor, which a CUDA graph requires.
        """
        assert self.recurrent_state is not None
        shape, device = (len(self.recurrent_state), groups), self.recurrent_state.device
        if self._counts is None or self._counts.shape != shape or self._counts.device != device:
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._counts

    def set_states(self, conv_state: Tensor, recurrent_state: Tensor, tokens: int) -> None:
        """Store the states after a forward over `tokens` more columns."""
        self.conv_state, self.recurrent_state = conv_state, recurrent_state
        self.skip(tokens)

    def skip(self, tokens: int) -> None:
        """Count `tokens` more columns; a block without a token mixer does nothing else."""
        self.columns += tokens
        self.is_initialized = True


class WindowLayer(ZooLayer):
    """Keys and values of the last `window - 1` real tokens of each row, right-aligned, with their positions.

    Positions count the real tokens of a row from 0, so that padding takes no room in the window; -1 marks an empty
    column.
    """

    _layer_type = "zoo_window"
    _tensors = _replaced = ("keys", "values", "positions", "counts")
    is_sliding = True

    keys: Tensor | None
    values: Tensor | None
    positions: Tensor | None
    counts: Tensor | None

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        key_states: Tensor,
        value_states: Tensor,
        *,
        window: int,
        real: Tensor | None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Append L columns and drop what no later query can see.

        Args:
            key_states: (B, H, L, P) keys.
            value_states: (B, H, L, P) values.
            window: tokens that a query sees, itself included.
            real: (B, L) False at padding; None if there is none.
            kept: (B, L) False at tokens that count but whose key is hidden; None if there are none.

        Returns:
            (B, H, M, P) keys and values of the cached and the new columns, their (B, M) positions, -1 at hidden and
            empty columns, and the (B, L) positions of the queries.
        """
        batch, _, length, _ = key_states.shape
        if self.counts is None:
            self.counts = key_states.new_zeros(batch, dtype=torch.long)
        present = key_states.new_ones(batch, length, dtype=torch.bool) if real is None else real
        new = (self.counts[:, None] + present.cumsum(-1) - 1).masked_fill(~present, -1)
        visible = new if kept is None else new.masked_fill(~kept, -1)
        keys, values, positions = key_states, value_states, visible
        if self.keys is not None and self.values is not None and self.positions is not None:
            keys = torch.cat([self.keys, key_states], dim=2)
            values = torch.cat([self.values, value_states], dim=2)
            positions = torch.cat([self.positions, visible], dim=1)
        stored = keys, values, positions
        if real is not None or kept is not None:  # empty columns to the left: the last ones are the last visible keys
            order = (positions >= 0).to(torch.int8).argsort(dim=1, stable=True)
            column = order[:, None, :, None].expand_as(keys)
            stored = keys.gather(2, column), values.gather(2, column), positions.gather(1, order)
        first = max(keys.shape[2] - (window - 1), 0)
        kept_columns = stored[0][:, :, first:], stored[1][:, :, first:], stored[2][:, first:]
        if first >= window:  # a view would keep the whole prompt in memory until the next token
            kept_columns = kept_columns[0].clone(), kept_columns[1].clone(), kept_columns[2].clone()
        self.keys, self.values, self.positions = kept_columns
        self.counts = self.counts + present.sum(-1)
        self.columns += length
        self.is_initialized = True
        return keys, values, positions, new


class _KeysAndValues(ZooLayer):
    """Keys and values (B, H, M, P) of all columns."""

    _replaced = ("keys", "values")

    keys: Tensor | None
    values: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, L, P) keys and values; return those of all columns."""
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ConvolvedAttentionLayer(_KeysAndValues):
    """Keys and values of an attention layer, and `conv_state` (B, D, K-1), the last real inputs of its convolution."""

    _layer_type = "zoo_convolved_attention"
    _tensors = ("conv_state", "keys", "values")

    conv_state: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.columns += key_states.shape[2]
        self.is_initialized = True
        return super().update(key_states, value_states)


class _CountingLayer(ZooLayer):
    """A layer that counts the real tokens of each row.

    Attributes:
        counts: (B) real tokens so far, None before the first.
        padded: whether the counts may differ between rows, or from the number of columns.
    """

    counts: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.padded = False

    def advance(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Count the (B, L, ...) new columns.

        Args:
            x: (B, L, ...) inputs of the mixer.
            real: (B, L) False at padding; None if there is none.

        Returns:
            (B, L) positions of the new tokens, -1 at padding.
        """
        batch, length = x.shape[:2]
        if self.counts is None:
            self.counts = torch.zeros(batch, dtype=torch.long, device=x.device)
        if real is None:
            positions = self.counts[:, None] + torch.arange(length, device=x.device)
            self.counts = self.counts + length
        else:
            positions = (self.counts[:, None] + real.cumsum(-1) - 1).masked_fill(~real, -1)
            self.counts = self.counts + real.sum(-1)
            self.padded = True
        self.columns += length
        self.is_initialized = True
        return positions

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(f"{type(self).__name__} holds the inputs of a mixer, not keys and values: call `advance`")

    def skip(self, columns: int) -> None:
        """Count columns in which no row has a token."""
        self.columns += columns
        self.padded = self.padded or columns > 0

    def reset(self) -> None:
        super().reset()
        self.padded = False


class HistoryLayer(_CountingLayer):
    """All inputs of a mixer: `history` (B, K, H, P), indexed by position, and `inner_history` (B, K, H, P), the inputs
    of an expanded mixer's first mixing.

    Attributes:
        certain: number of last columns known to be tokens in every row; as many can be removed.
    """

    _layer_type = "zoo_history"
    _tensors = ("history", "inner_history", "counts")

    history: Tensor | None
    inner_history: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.certain: int | Tensor = 0

    @property
    def is_croppable(self) -> bool:
        return True

    def activate_past_recording(self) -> None:
        """Do nothing: a history can be cut."""

    def advance(self, x: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            self.certain = self.certain + x.shape[1]
        else:  # columns with padding, and those before them, cannot be removed
            self.certain = 0 if tracing() else real.all(0).flip(0).cumprod(0).sum()
        return super().advance(x, real)

    def append(self, name: str, x: Tensor, positions: Tensor, real: Tensor | None, limit: int) -> Tensor:
        """Write the columns counted by :meth:`advance` at their positions, in place unless gradients are recorded.

        Args:
            name: "history" or "inner_history".
            x: (B, L, H, P) inputs of the mixing.
            positions: (B, L) of the new tokens, -1 at padding.
            real: (B, L) False at padding; None if there is none.
            limit: number of positions, which no row exceeds.

        Returns:
            (B, K, H, P) the history, zeros where a row has no token yet, with K at least the tokens of the longest row
            and at most `limit`.
        """
        history: Tensor | None = getattr(self, name)
        allocated = 0 if history is None else history.shape[1]
        places = min(self.columns, limit)
        if allocated < places:
            room = x.new_zeros(x.shape[0], min(max(places, 2 * allocated), limit) - allocated, *x.shape[2:])
            history = room if history is None else torch.cat([history, room], dim=1)
        assert history is not None  # it has at least the new columns
        x = x.to(history.dtype)
        if tracing() and real is not None:
            # In a graph the number of tokens is unknown: padding is written to an extra last place, which is cut off.
            row = torch.arange(x.shape[0], device=x.device)[:, None]
            wide = torch.cat([history, history.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
            history = wide.index_put((row, positions.where(real, history.shape[1])), x)[:, :-1]
            setattr(self, name, history)
            return history[:, :places]
        if real is None:
            index = (torch.arange(x.shape[0], device=x.device)[:, None], positions)
        else:
            row, column = real.nonzero(as_tuple=True)
            index, x = (row, positions[row, column]), x[row, column]
        if torch.is_grad_enabled():
            history = history.index_put(index, x)
        elif self.padded or real is not None:
            history.index_put_(index, x)
        else:
            history[:, places - x.shape[1] : places] = x
        setattr(self, name, history)
        return history[:, :places]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns.

        Raises:
            ValueError: if the number is positive, or some of the columns may be padding, as it is not known then where
                the tokens of a row end.
        """
        certain, tokens_to_remove = int(self.certain), int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0 or -tokens_to_remove > certain:
            raise ValueError(
                f"crop takes minus the number of columns to remove, from {-certain} to 0 (columns after the "
                f"last padding), got {tokens_to_remove}"
            )
        if tokens_to_remove and self.counts is not None:
            self.counts = self.counts + tokens_to_remove
            self.columns += tokens_to_remove
            self.certain = certain + tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.certain = 0


class StateLayer(_CountingLayer):
    """`recurrent_state` (B, H, P, N) in float32."""

    _layer_type = "zoo_state"
    _tensors = ("recurrent_state", "counts")

    recurrent_state: Tensor | None


class AttentionHistoryLayer(_KeysAndValues, HistoryLayer):
    """:class:`HistoryLayer` with the keys and values of the block's attention; the mixer counts the columns."""

    _layer_type = "zoo_attention_history"
    _tensors = (*HistoryLayer._tensors, "keys", "values")

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]


class AttentionStateLayer(_KeysAndValues, StateLayer):
    """:class:`StateLayer` with the keys and values of the block's attention; the mixer counts the columns."""

    _layer_type = "zoo_attention_state"
    _tensors = (*StateLayer._tensors, "keys", "values")


def layer_of(cache: Cache | None, layer_idx: int) -> Any:
    """Return the cache layer of a block; None without a cache."""
    return None if cache is None else cache.layers[layer_idx]


def check_layers(cache: Cache, layer_types: list[str]) -> None:
    """Raise ValueError if `cache` was not made for a model with these `layer_types`, or was cut in part by `crop`."""
    for index, layer_type in enumerate(layer_types):
        layer = cache.layers[index] if index < len(cache.layers) else None
        # Compared by name: a model loaded with its own code has its own classes.
        if layer_type.startswith("zoo_") and getattr(layer, "_layer_type", None) != layer_type:
            raise ValueError(
                f"past_key_values: layer {index} must be a {layer_type!r} layer, got {layer}. Make the cache with "
                f"{type(cache).__name__}(config=model.config); a prefix of keys and values, as in peft's prefix "
                "tuning, needs full attention in every layer"
            )
    if not tracing():
        layers: list[Any] = cache.layers
        # Layers without a length hold nothing that was read, as those of a mixer that keeps no state.
        lengths = {length for layer in layers if isinstance(length := layer.get_seq_length(), int) and length}
        if len(lengths) > 1:
            raise ValueError(
                f"past_key_values: all layers must have read equally many tokens, got {sorted(lengths)}, as after a "
                "`crop` that was refused. Restore a snapshot, or make the cache again"
            )


def one_cache(past_key_values: Cache | None, cache: Cache | None, cache_params: Cache | None = None) -> Cache | None:
    """Return the cache of a call, which may be passed under any of transformers' names for it.

    Warns about the old names where transformers' own models do: since 5.24 the name is `cache`.

    Raises:
        ValueError: if it is passed under two names.
    """
    if past_key_values is None and cache_params is None:
        return cache
    names = {"past_key_values": past_key_values, "cache": cache, "cache_params": cache_params}
    given = [name for name, value in names.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"pass the cache as either `{given[0]}` or `{given[1]}`, got both")
    if not given:
        return None
    if given[0] != CACHE_FIELD == "cache" and not torch.compiler.is_compiling():
        message = f"`{given[0]}` is deprecated and will be removed from transformers in version 5.40; pass `cache`."
        warnings.warn(message, FutureWarning, stacklevel=2)
    return names[given[0]]
