"""Documents of packed rows in transformers' own models: found once per call, and brought to every Mamba layer.

transformers describes a packed row by `seq_idx` (the document of each token), by `cu_seq_lens_q` (bounds of the
documents) or by `position_ids` that start again (`DataCollatorWithFlattening`). Its models do not all pass these on.
Mamba, Mamba-2 and FalconMamba drop them before their backbone and Jamba before its mixer; their Mamba layers then read
across documents without a word. Attention is separated by `position_ids` alone, and only without an attention mask and
without a cache. Flash attention takes no mask: it reads `position_ids` of a single row, which Zamba and
GraniteMoeHybrid do not hand on to it, and otherwise bounds. Here all three forms become one `seq_idx`:

* Mamba, Mamba-2 and FalconMamba pass on nothing but the attention mask, so the mask carries the documents: int16, zero
  for padding and otherwise the document's number plus one. An ordinary mask reads the same way, as one document.
* The hybrids pass `seq_idx` on; Jamba's layer, which does not, puts it into the mask of its mixer. Their attention
  layers get positions that start again with each document; those of Zamba and GraniteMoeHybrid get a mask of them,
  and flash attention gets the bounds of the documents of all rows.

The documents are arguments of the layers, never state beside them, so that gradient checkpointing, which runs a layer
again during the backward, finds them again.

Symbols: B batch, L length, S documents.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, flash_attention_mask

from ..kernels.checks import check_cu_seqlens, check_seq_idx
from ..kernels.recurrence import documents
from ..kernels.tracing import host_reads, tracing

_CARRIER = torch.int16
_BOUNDS = ("cu_seq_lens_q", "cu_seqlens")
# Arguments by which flash attention separates documents; it ignores them unless all are given.
_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_CACHES = ("cache", "cache_params", "past_key_values")


def to_mask(seq_idx: Tensor) -> Tensor:
    """Return documents as a (B, L) attention mask: 0 for padding, otherwise the place of the document from 1 on.

    Documents are counted in each row, so that their numbers may be of any size.

    Raises:
        ValueError: if a row has more documents than the dtype can count; on the CPU only.
    """
    real, first = documents(seq_idx)
    places, most = first.cumsum(1) + 1, torch.iinfo(_CARRIER).max
    if host_reads(seq_idx) and seq_idx.numel() and int(places.max()) > most:
        raise ValueError(f"seq_idx must hold at most {most} documents in a row, got {int(places.max())}")
    return places.masked_fill(~real, 0).to(_CARRIER)


def from_mask(attention_mask: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (documents, padding mask) of a layer from the mask and `seq_idx` that reached it."""
    if attention_mask is not None and attention_mask.dtype == _CARRIER:
        return attention_mask.to(torch.int32) - 1, None
    return seq_idx, attention_mask


def separating(forward: Callable[..., Any], hybrid: bool, needs_mask: bool = False) -> Callable[..., Any]:
    """Wrap the forward of a whole model so that it finds the documents of its rows.

    Args:
        forward: unbound `forward` of a class of transformers.
        hybrid: whether the model has attention layers and passes `seq_idx` on; otherwise the mask carries it.
        needs_mask: whether a hybrid does not hand positions on to its attention, which needs a mask of four axes then.

    Returns:
        Function with the same signature.
    """
    names = [name for name, each in inspect.signature(forward).parameters.items() if each.kind != each.VAR_KEYWORD][1:]

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            return forward(self, *args, **kwargs)  # which says that there are too many
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if _separate(arguments, hybrid) and hybrid:
            if ALL_MASK_ATTENTION_FUNCTIONS.get(self.config._attn_implementation) is flash_attention_mask:
                _bound_attention(arguments, needs_mask)
            elif needs_mask:
                _mask_attention(self, arguments)
        return forward(self, **arguments)

    return wrapped


def passing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a layer that drops `seq_idx`: its mixer gets the documents in the mask."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (seq_idx := kwargs.get("seq_idx")) is not None:
            kwargs["attention_mask"] = to_mask(seq_idx)
        return forward(self, *args, **kwargs)

    return wrapped


def _separate(arguments: dict[str, Any], hybrid: bool) -> bool:
    """Replace what describes the documents in a model's arguments by what reaches its layers.

    Returns:
        Whether the arguments describe several documents.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    mask = arguments.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None  # hybrids also take a dict of masks
    if tokens is None or (mask is not None and mask.dtype == _CARRIER):
        return False  # the model complains, or the class around it has done this
    cache = next((name for name in _CACHES if arguments.get(name) is not None), None)
    seq_idx = _documents(arguments, tokens, mask, cache is not None)
    if seq_idx is None:
        return False
    told = any(arguments.get(name) is not None for name in ("seq_idx", *_BOUNDS))
    if arguments.get("use_cache") and cache is None and not told and tracing():
        # A graph of positions has to serve rows of one document too. It stops at rows of several.
        message = "use_cache must not be set with several documents in a row"
        torch._assert_async((seq_idx <= 0).all(), message)  # pyright: ignore[reportPrivateImportUsage]
        return False
    if cache is not None or arguments.get("use_cache"):
        name, value = ("use_cache", True) if cache is None else (cache, "a cache")
        raise ValueError(f"{name} must not be set with several documents in a row, got {value}. Run them one by one.")
    arguments["use_cache"] = False
    if hybrid:
        _separate_attention(arguments, seq_idx, mask)
        return True
    if mask is not None:
        seq_idx = seq_idx.masked_fill(mask == 0, -1)
    for name in ("seq_idx", *_BOUNDS, "cu_seq_lens_k", "max_length_q", "max_length_k"):
        arguments.pop(name, None)
    arguments["attention_mask"] = to_mask(seq_idx)
    return True


def _separate_attention(arguments: dict[str, Any], seq_idx: Tensor, mask: Tensor | None) -> None:
    """Give a hybrid's attention layers positions that start again with each document, without a mask."""
    positions = arguments.get("position_ids")
    if mask is not None:
        if tracing():  # whether there is padding is not known: positions that start again at it take the mask's place
            seq_idx, positions = seq_idx.masked_fill(mask == 0, -1), None
        elif not bool((mask == 1).all()):
            raise ValueError(
                "attention_mask must be None with several documents in a row, because transformers' attention then "
                "separates only by the mask, got one with padding. Give padding a negative seq_idx instead."
            )
        arguments["attention_mask"] = None
    real, first = documents(seq_idx)
    # Padding lies before these tokens, and no document starts with them.
    resumed = (real & ~first & (seq_idx.roll(1, 1) < 0) & (real.cumsum(1) > 1)).any()
    message = (
        "seq_idx and attention_mask must not have padding inside a document of a model with attention, which would "
        "take the parts for two documents"
    )
    if tracing():
        torch._assert_async(~resumed, message)  # pyright: ignore[reportPrivateImportUsage]
    elif bool(resumed):
        raise ValueError(f"{message}, got {seq_idx.tolist()}")
    arguments["seq_idx"] = seq_idx.to(torch.int32)
    if positions is None:
        arguments["position_ids"] = _positions(seq_idx)
    elif not tracing() and positions.dim() == 2:
        starts, expected = _restarts(positions.expand_as(seq_idx)), _restarts(_positions(seq_idx))
        if not torch.equal(starts, expected):
            raise ValueError(
                "position_ids must start again exactly where seq_idx or cu_seq_lens_q begins a document, because "
                f"attention is separated by them, got {positions.tolist()} for the documents {seq_idx.tolist()}"
            )


def _mask_attention(model: Any, arguments: dict[str, Any]) -> None:
    """Give the attention layers the mask that transformers makes of positions, unless the caller gave one."""
    if arguments.get("attention_mask") is not None:
        return
    positions = arguments["position_ids"]
    like = torch.empty(*arguments["seq_idx"].shape, 1, dtype=model.dtype, device=positions.device)
    arguments["attention_mask"] = create_causal_mask(model.config, like, None, None, positions)
    # For rows of one document it is None too.
    if arguments["attention_mask"] is None and (tracing() or bool(_restarts(positions).any())):
        _check_flash(arguments, f"the attention implementation {model.config._attn_implementation!r}")


def _bound_attention(arguments: dict[str, Any], needs_bounds: bool) -> None:
    """Give flash attention the bounds of the documents of all rows, one row after the other, unless the caller did."""
    if all(arguments.get(name) is not None for name in _FLASH):
        return
    seq_idx = arguments["seq_idx"]
    if tracing():  # the number of documents is not known; flash attention itself finds those of a single row
        if needs_bounds or seq_idx.shape[0] > 1:
            _check_flash(arguments, "flash attention in a compiled graph")
        return
    first = _starts(seq_idx)
    first[:, 0] = True
    ends = torch.tensor([seq_idx.numel()], device=seq_idx.device)
    bounds = torch.cat([first.flatten().nonzero()[:, 0], ends]).to(torch.int32)
    longest = int(bounds.diff().max())
    arguments |= dict(zip(_FLASH, (bounds, bounds, longest, longest), strict=True))


def _check_flash(arguments: dict[str, Any], attention: str) -> None:
    missing = [name for name in _FLASH if arguments.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given with several documents in a row and {attention}, got None"
        )


def _documents(arguments: dict[str, Any], tokens: Tensor, mask: Tensor | None, cached: bool) -> Tensor | None:
    """Return the (B, L) document of each token, or None if nothing says that a row holds several."""
    batch, length = tokens.shape[:2]
    seq_idx = arguments.get("seq_idx")
    check_seq_idx(seq_idx, batch, length)
    name = next((name for name in _BOUNDS if arguments.get(name) is not None), None)
    if name is not None:
        found = _by_bounds(name, arguments[name].to(tokens.device), batch, length)
        if seq_idx is None:
            seq_idx = found
        elif not tracing() and not torch.equal(_starts(seq_idx), _starts(found)):
            raise ValueError(
                f"{name} must bound the documents of seq_idx, got {arguments[name].tolist()} for {seq_idx.tolist()}"
            )
    positions = arguments.get("position_ids")
    if seq_idx is None and positions is not None and positions.dim() == 2 and length > 1 and not cached:
        seq_idx = _by_positions(positions.expand(batch, length), mask)
    return seq_idx


def _by_bounds(name: str, bounds: Tensor, batch: int, length: int) -> Tensor:
    """Return the (1, L) documents of the (S + 1) bounds of a single row."""
    if batch != 1:
        raise ValueError(f"input_ids must be a single row with {name}, got {batch} rows. Pass seq_idx instead.")
    if not tracing():
        found = check_cu_seqlens(bounds, length)
        if found[-1] != length:
            raise ValueError(f"{name} must end at the number of tokens, {length}, got {found}")
    return torch.searchsorted(bounds[1:].contiguous(), torch.arange(length, device=bounds.device), right=True)[None]


def _by_positions(positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the documents of (B, L) positions: a new one wherever they do not go on from the last real token.

    Positions may count padding between two real tokens, or not.
    """
    if mask is None:
        starts, real = _restarts(positions), None
    else:
        real = mask[:, -positions.shape[1] :] != 0
        index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        before = index.where(real, -1).cummax(1).values.roll(1, 1)
        before[:, 0] = -1
        advance = positions - positions.gather(1, before.clamp(min=0))
        starts = real & (before >= 0) & (advance != 1) & (advance != index - before)
    if not tracing() and not bool(starts.any()):
        return None
    seq_idx = starts.cumsum(1)
    return seq_idx if real is None else seq_idx.masked_fill(~real, -1)


def _restarts(positions: Tensor) -> Tensor:
    """Return the (B, L) mask of the tokens, but the first, whose position does not go on from the one before."""
    return torch.diff(positions, prepend=positions[:, :1] - 1, dim=1) != 1


def _starts(seq_idx: Tensor) -> Tensor:
    """Return the (B, L) mask of the tokens, but the first, whose document is another than that before."""
    return torch.diff(seq_idx, prepend=seq_idx[:, :1], dim=1) != 0


def _positions(seq_idx: Tensor) -> Tensor:
    """Return (B, L) positions that start at 0 with each document, and are 0 for each token of padding."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    first = _starts(seq_idx) | (seq_idx < 0)
    return index - index.where(first, 0).cummax(1).values
