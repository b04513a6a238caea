"""Undoing the last tokens that a cache layer has read, for assisted decoding.

transformers verifies a draft by reading all of it, then calls `Cache.crop` with minus the number of rejected tokens.
Keys and values can be cut off, but a recurrent state, a window or a bounded memory has forgotten what was before. Such
a layer therefore records: before each call of its mixer it keeps what it holds, and the inputs of the mixer. To remove
some of the tokens, the layer goes back to what it held, and the mixer reads the others again. This is exact whatever
the mixer is, needs no second pass through MLPs and head, and costs nothing where a whole draft is accepted.

Symbols: B batch, L new tokens, D width.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from .token_layout import Sequence

RECORDED = 256
"""Columns that can be removed at least, if they were read since the last `crop`."""


class Step(NamedTuple):
    """One call of a mixer.

    Attributes:
        before: what the layer held before.
        columns: number of new columns.
        replay: reads that many of the new columns again, the first ones.
        grad: whether gradients were recorded.
    """

    before: dict[str, Any]
    columns: int
    replay: Callable[[int], Any]
    grad: bool


class Recording:
    """The calls of a layer's mixer since the last `crop`, oldest first."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __deepcopy__(self, memo: Any) -> "Recording":
        """Return an empty recording: the steps of this one belong to this cache."""
        return Recording()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty recording, for the same reason."""
        return Recording, ()

    def add(self, step: Step) -> None:
        """Append a step, and drop those that are older than needed."""
        self.steps.append(step)
        while sum(later.columns for later in self.steps[1:]) >= RECORDED:
            del self.steps[0]


class RecordsPast:
    """A cache layer that can remove the last columns, while it records the past.

    Attributes:
        columns: columns read so far.
        recording: what was read since the last `crop`; None if the layer does not record.
    """

    _replaced: tuple[str, ...] = ()
    """Tensors that are never written in place, so that keeping them needs no copy."""

    columns: int
    recording: Recording | None = None

    @property
    def record_past(self) -> bool:
        """Whether the layer records the past, under transformers' name."""
        return self.recording is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.recording = Recording() if value else None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can remove what is read from now on."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Record what is read from now on, so that :meth:`crop` can remove it. transformers calls this."""
        if self.recording is None:
            self.recording = Recording()

    def forget_past(self) -> None:
        """Drop what was recorded, e.g. where the rows of the batch change."""
        if self.recording is not None:
            self.recording = Recording()

    def remember(self, columns: int, replay: Callable[[int], Any]) -> None:
        """Keep what the layer holds, before its mixer reads `columns` more columns.

        Args:
            columns: their number.
            replay: calls the mixer with the first of them, as many as its argument says.
        """
        assert self.recording is not None
        before = {name: value for name, value in vars(self).items() if name != "recording"}
        if columns == 1:  # steps of one token write their states in place
            for name, value in before.items():
                if isinstance(value, Tensor) and name not in self._replaced:
                    before[name] = value.clone()
        self.recording.add(Step(before, columns, replay, torch.is_grad_enabled()))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns, and forget how to remove more.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            ValueError: if the number is positive, or more than was recorded.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        steps = [] if self.recording is None else self.recording.steps
        recorded = sum(step.columns for step in steps)
        if not -recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop takes minus the number of columns to remove, from {-recorded} to 0, got {tokens_to_remove}: "
                f"{type(self).__name__} keeps a state, not a history, and can remove what was read since "
                "`cache.activate_past_recording()` and the last `crop`. To go back further, take a snapshot and "
                "restore it"
            )
        if self.recording is None:
            return
        target = self.columns + tokens_to_remove
        self.recording = None  # what is read again is not recorded
        while self.columns > target:
            step = steps.pop()
            vars(self).update(step.before)
            if self.columns < target:
                with torch.set_grad_enabled(step.grad):
                    step.replay(target - self.columns)
        self.recording = Recording()


def recorded(
    call: Callable[..., Any],
    layer_idx: int,
    hidden_states: Tensor,
    sequence: Sequence,
    past_key_values: Cache | None,
    output_attentions: bool,
    **streams: Tensor | None,
) -> Any:
    """Call a mixer; if its cache layer records the past, keep how to read the first of the tokens again.

    Args:
        call: `call(hidden_states, sequence, past_key_values, output_attentions, **streams)`.
        layer_idx: number of the block.
        hidden_states: (B, L, D) inputs.
        sequence: their layout.
        past_key_values: cache to continue.
        output_attentions: return the matrix.
        **streams: further (B, L, D) inputs, or None.

    Returns:
        What `call` returns.
    """
    layer: Any = None if past_key_values is None else past_key_values.layers[layer_idx]
    # By name: transformers' own layers record in another way, and exported code has its own classes.
    if getattr(layer, "recording", None) is not None:

        def replay(length: int) -> None:
            prefix = sequence.prefix
            if prefix is not None and bool(prefix[:, length:].any()):
                raise ValueError(
                    "crop cannot remove tokens of a prefix that was read in both directions, since the others have "
                    "seen them. Take a snapshot before the prefix, and restore it"
                )
            rest = {name: None if stream is None else stream[:, :length] for name, stream in streams.items()}
            call(hidden_states[:, :length], sequence.first(length), past_key_values, output_attentions, **rest)

        layer.remember(hidden_states.shape[1], replay)
    return call(hidden_states, sequence, past_key_values, output_attentions, **streams)


def recording_layers(cache: Cache | None) -> list[Any]:
    """Return the layers of a cache that record the past in the way of this file."""
    return [] if cache is None else [layer for layer in cache.layers if getattr(layer, "recording", None) is not None]


def stop_recording(cache: Cache | None) -> None:
    """Let all layers stop recording: what was recorded would take memory as long as the cache is used."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers: list[Any] = [] if cache is None else cache.layers
    for layer in layers:
        if getattr(layer, "record_past", False):
            layer.record_past = False


def snapshot(cache: Cache) -> list[dict[str, Any]]:
    """Copy the contents of `cache` for :func:`restore`, to reuse a prefix or undo a rejected draft."""
    if isinstance(cache, EncoderDecoderCache):
        cross = {"layers": snapshot(cache.cross_attention_cache), "is_updated": dict(cache.is_updated)}
        return [*snapshot(cache.self_attention_cache), cross]
    return [_copied(vars(layer)) for layer in cache.layers]


def restore(cache: Cache, saved: list[dict[str, Any]]) -> None:
    """Put a :func:`snapshot` back into a cache with the same layers. The snapshot can be restored again later.

    Raises:
        ValueError: if the number of layers differs.
    """
    if isinstance(cache, EncoderDecoderCache):
        *own, cross = saved
        layers = cache.cross_attention_cache.layers
        if set(cross) != {"layers", "is_updated"} or len(own) != len(cache.self_attention_cache.layers):
            count = len(cache.self_attention_cache.layers)
            raise ValueError(
                f"snapshot must be that of an EncoderDecoderCache of {count} layers, got {len(own)} layers"
            )
        # The first forward makes the layers of cross-attention.
        del layers[len(cross["layers"]) :]
        layers.extend(DynamicLayer() for _ in range(len(cross["layers"]) - len(layers)))
        restore(cache.self_attention_cache, own)
        restore(cache.cross_attention_cache, cross["layers"])
        cache.is_updated = dict(cross["is_updated"])
        return
    if len(saved) != len(cache.layers):
        raise ValueError(f"snapshot must have the {len(cache.layers)} layers of the cache, got {len(saved)}")
    held: list[Any] = cache.layers
    for layer, state in zip(held, saved, strict=True):
        recording = getattr(layer, "recording", None)
        vars(layer).clear()
        vars(layer).update(_copied(state))
        if hasattr(layer, "recording"):  # a layer goes on recording, or not, but what it recorded is not of this state
            layer.recording = None if recording is None else copy.deepcopy(recording)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in state.items()}


def _copy(value: Any) -> Any:
    """Copy a value; tensors by `clone`, which keeps the autograd graph and drops the rest of a view's storage."""
    if isinstance(value, tuple):
        return tuple(_copy(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
