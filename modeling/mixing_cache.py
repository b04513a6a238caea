"""Cache layers of mixers whose weights depend on the position of a token: what was mixed, or a state, and counts.

`DynamicCache(config=...)` and `StaticCache(config=...)` build them from `config.layer_types`: "zoo_history" and
"zoo_state"; "zoo_attention_history" and "zoo_attention_state" hold the keys and values of a block's attention too.
A token's position is its place among the real tokens of its row, which only the layer knows: padding may stand
anywhere.

Symbols: B batch, L new columns, K places, H heads, P head width, N state size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from ..kernels.tracing import tracing
from .cache import ZooLayer


class _CountingLayer(ZooLayer):
    """Counts the real tokens of each row.

    Attributes:
        counts: (B) real tokens so far, None before the first.
        padded: whether they may differ from row to row, or from the number of columns.
    """

    counts: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.padded = False

    def advance(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Count the (B, L, ...) new columns.

        Args:
            x: of that shape.
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
        raise ValueError(f"{type(self).__name__} holds what is mixed, not keys and values")

    def skip(self, columns: int) -> None:
        """Count columns that no row has a token in."""
        self.columns += columns
        self.padded = self.padded or columns > 0

    def reset(self) -> None:
        super().reset()
        self.padded = False


class HistoryLayer(_CountingLayer):
    """All that was mixed: `history` (B, K, H, P), in which a token stands at its position, and of an expanded mixer
    `inner_history` (B, K, H, P), what its first mixing read.

    Attributes:
        certain: how many of the last columns are known to be tokens in every row: that many can be taken back.
    """

    _layer_type = "zoo_history"
    _tensors = ("history", "inner_history", "counts")
    is_croppable = True

    history: Tensor | None
    inner_history: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.certain = 0

    def advance(self, x: Tensor, real: Tensor | None) -> Tensor:
        self.certain = self.certain + x.shape[1] if real is None else 0
        return super().advance(x, real)

    def append(self, name: str, x: Tensor, positions: Tensor, real: Tensor | None, limit: int) -> Tensor:
        """Put the columns that :meth:`advance` has counted where they belong: in place, unless gradients are recorded.

        Args:
            name: of a history.
            x: (B, L, H, P) what is mixed.
            positions: (B, L) of the new tokens, -1 at padding.
            real: (B, L) False at padding; None if there is none.
            limit: positions that there are, which no row exceeds.

        Returns:
            (B, K, H, P) the history, zeros where a row has no token yet, with K at least the tokens of the longest row
            and at most `limit`.
        """
        history: Tensor | None = getattr(self, name)
        held = 0 if history is None else history.shape[1]
        places = min(self.columns, limit)
        if held < places:
            room = x.new_zeros(x.shape[0], min(max(places, 2 * held), limit) - held, *x.shape[2:])
            history = room if history is None else torch.cat([history, room], dim=1)
        assert history is not None  # it has at least the new columns
        x = x.to(history.dtype)
        if tracing() and real is not None:
            # Padding goes to a place behind all others, which is cut off: how many tokens there are is not known.
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
        """Take the last columns back.

        Raises:
            ValueError: if the number is positive, or some of them may be padding: where a row's tokens end is not
                known then.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.certain:
            raise ValueError(
                f"crop takes minus the number of columns to remove, at most {self.certain} here, which follow the last "
                f"padding; got {tokens_to_remove}"
            )
        if tokens_to_remove and self.counts is not None:
            self.counts = self.counts + tokens_to_remove
            self.columns += tokens_to_remove
            self.certain += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.certain = 0


class StateLayer(_CountingLayer):
    """`recurrent_state` (B, H, P, N) in float32."""

    _layer_type = "zoo_state"
    _tensors = ("recurrent_state", "counts")

    recurrent_state: Tensor | None


class _WithAttention(_CountingLayer):
    """Keys and values (B, H, K, P) of a block's attention beside what its mixer keeps; the mixer counts."""

    keys: Tensor | None
    values: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class AttentionHistoryLayer(_WithAttention, HistoryLayer):
    """:class:`HistoryLayer` with attention."""

    _layer_type = "zoo_attention_history"
    _tensors = (*HistoryLayer._tensors, "keys", "values")

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]


class AttentionStateLayer(_WithAttention, StateLayer):
    """:class:`StateLayer` with attention."""

    _layer_type = "zoo_attention_state"
    _tensors = (*StateLayer._tensors, "keys", "values")


for _class in (HistoryLayer, StateLayer, AttentionHistoryLayer, AttentionStateLayer):
    for _mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        _mapping[str(_class._layer_type)] = _class
