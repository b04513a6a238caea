"""Checks of what a model is called with: names that it does not read, and values that it would read wrongly.

Values are looked at where that costs nothing: on the CPU, and not while a graph is traced. On a GPU the host would have
to wait for the device, so that there shapes and dtypes alone are checked; a floating-point mask, whose meaning depends
on its values, is checked by the device itself.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.tracing import host_reads, tracing

ACCEPTED_KEYWORDS = frozenset(
    {
        "cache_params",  # transformers' name of the cache in its Mamba classes
        "cu_seq_lens_q",  # of padding-free collators, like the next three, which say the same
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",  # the loss's, like the next two
        "ignore_index",
        "shift_labels",
        "cache_position",  # of `generate` in earlier versions: the cache knows it
        "token_type_ids",  # of tokenizers by default: the models have no segments
        "output_router_logits",  # models that have some always return them
    }
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK = (
    "attention_mask must be non-zero at real tokens and 0 at padding; in a floating-point dtype 1 and 0, got other "
    "numbers, as of an additive mask: pass `mask == 0` of that instead"
)


def check_integer(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless an argument, if given, is of an integer dtype."""
    if tensor is not None and tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name} must have an integer dtype, got {tensor.dtype}")


def read_mask(attention_mask: Tensor) -> Tensor | None:
    """(B, past + L) True at real tokens; None of a mask without padding, but while tracing.

    Raises:
        ValueError: if it is not a mask of real tokens: an additive one says the opposite.
    """
    if tracing():
        return attention_mask != 0
    if attention_mask.numel() == 0:
        return None
    if attention_mask.dtype in _INTEGERS:
        # Check and shortcut from one number: in a step of decoding, three more operations are to be felt.
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
    """Raise ValueError where documents go back, or their starts do not rise from 0 to the (1, L) row's length."""
    if seq_idx is not None and host_reads(seq_idx):
        back = (seq_idx >= 0) & (seq_idx < seq_idx.cummax(dim=1).values)
        if bool(back.any()):
            raise ValueError("seq_idx must be non-decreasing along each row (negative values mark padding)")
    if cu_seqlens is not None and host_reads(cu_seqlens):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != length or sorted(starts) != starts:
            raise ValueError(f"cu_seqlens must rise from 0 to L = {length} over a single row, got {starts} for 1 row")


def check_keywords(model: str, given: dict[str, Any], forward: Callable[..., Any]) -> None:
    """Raise TypeError for a keyword that a forward does not read, other than None: it would be lost without a word.

    Args:
        model: name of the class, for the message.
        given: what is not in the signature.
        forward: what has the signature.
    """
    if not given:
        return
    unknown = [name for name, value in given.items() if value is not None and name not in ACCEPTED_KEYWORDS]
    if not unknown:
        return
    known = list(inspect.signature(forward).parameters)[1:-1]  # between `self` and `**kwargs`
    close = difflib.get_close_matches(unknown[0], [*known, *sorted(ACCEPTED_KEYWORDS)], n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"accepted: {', '.join(known)}"
    raise TypeError(f"{model}.forward has no argument `{unknown[0]}`; {hint}")


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless there is a label for each of the (B, L, ...) logits: a loss would take any shape of as
    many numbers."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must be (B, L) = {tuple(logits.shape[:2])}, one for each of the logits, got {tuple(labels.shape)}"
        )
