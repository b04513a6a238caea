"""Checks of what callers pass to a forward: keywords, masks, document indices and labels."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.tracing import host_reads, tracing

# Arguments of a forward are checked where that is cheap: values only on the CPU and not while a graph is traced. On a
# GPU, reading values would make the host wait, so only shapes and dtypes are checked; a floating-point mask, whose
# meaning depends on its values, is checked by the device itself.

ACCEPTED_KEYWORDS = frozenset(
    {
        "cache_params",  # transformers' name of the cache in its Mamba classes
        "cu_seq_lens_q",  # of padding-free collators, like the next three, which are redundant
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",  # for the loss, like the next two
        "ignore_index",
        "shift_labels",
        "cache_position",  # of `generate` in earlier versions; the cache counts itself
        "token_type_ids",  # made by tokenizers; the models have no segments
        "output_router_logits",  # models that have router logits always return them
    }
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK = (
    "attention_mask must be non-zero at real tokens and 0 at padding (1 and 0 in a floating-point dtype), got other "
    "numbers, as in an additive mask. Pass `mask == 0` for an additive mask"
)


def check_integer(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless an argument, if given, is of an integer dtype."""
    if tensor is not None and tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name} must have an integer dtype, got {tensor.dtype}")


def read_mask(attention_mask: Tensor) -> Tensor | None:
    """Return the (B, past + L) mask, True at real tokens; None if there is no padding, except while tracing.

    Raises:
        ValueError: if it is not a mask of real tokens, e.g. an additive mask.
    """
    if tracing():
        return attention_mask != 0
    if attention_mask.numel() == 0:
        return None
    if attention_mask.dtype in _INTEGERS:
        # One reduction serves the check and the shortcut, as more operations are noticeable in a decoding step.
        lowest = int(attention_mask.min())
        if lowest < 0:
            raise ValueError(_MASK)
        return None if lowest > 0 else attention_mask != 0
    if attention_mask.is_floating_point():
        fits = ((attention_mask == 0) | (attention_mask == 1)).all()
        if attention_mask.is_cuda:
            torch._assert_async(fits, _MASK)  # pyright: ignore[reportPrivateImportUsage]
        elif host_reads(attention_mask) and not bool(fits):
            raise ValueError(_MASK)
    real = attention_mask != 0
    return None if bool(real.all()) else real


def check_documents(seq_idx: Tensor | None, cu_seqlens: Tensor | None, length: int) -> None:
    """Raise ValueError unless document indices do not decrease and document starts rise from 0 to L."""
    if seq_idx is not None and host_reads(seq_idx):
        back = (seq_idx >= 0) & (seq_idx < seq_idx.cummax(dim=1).values)
        if bool(back.any()):
            raise ValueError("seq_idx must be non-decreasing along each row (negative values mark padding)")
    if cu_seqlens is not None and host_reads(cu_seqlens):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != length or sorted(starts) != starts:
            raise ValueError(f"cu_seqlens must rise from 0 to L = {length} over a single row, got {starts} for 1 row")


def check_keywords(model: str, given: dict[str, Any], forward: Callable[..., Any]) -> None:
    """Raise TypeError for a keyword with a value that a forward does not read and would silently ignore.

    Args:
        model: name of the class, for the message.
        given: arguments that are not in the signature.
        forward: method with the signature.
    """
    if not given:
        return
    unknown = [name for name, value in given.items() if value is not None and name not in ACCEPTED_KEYWORDS]
    if not unknown:
        return
    known = list(inspect.signature(forward).parameters)[1:-1]  # between `self` and `**kwargs`
    close = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f"Did you mean `{close[0]}`?" if close else f"It takes {', '.join(known)}"
    raise TypeError(f"{model}.forward has no argument `{unknown[0]}`. {hint}")


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless labels are (B, L) for (B, L, ...) logits; a loss accepts other shapes of equal size."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must be (B, L) = {tuple(logits.shape[:2])}, one for each token, got {tuple(labels.shape)}"
        )
