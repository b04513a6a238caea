"""Prefixes that are read in both directions: the mask that marks them, and their tokens alone.

A model with `prefix_bidirectional` reads the first tokens of a document, its prefix, in both directions and the rest,
its suffix, causally. The mask says which tokens are prefix, so it works for packed rows and for padding on any side.

Definition, in every mixer, for a document whose prefix has p tokens: token t < p sees the whole prefix, token t >= p
the tokens 0 to t. A recurrent mixer scans the document forwards as a causal one does, and adds to the outputs of the
prefix those of a scan that begins at token p - 1 and ends at token 0. So the forward state that the suffix starts from
has read the whole prefix, whose inputs have seen each other in every block but the first, and the cache and the
decoding step are those of the causal model. Without a mask, or with an empty prefix, the model is causal.

Source: Birdie (Blouir et al., arXiv 2411.01030), prefix language modelling with a bidirectional state-space layer.
Deviation: in Birdie half of the channels of the state run backwards in the prefix and forwards in the suffix. These
channels then carry the prefix's first tokens best into the suffix, but a causal checkpoint would lose half of its
forward state. Here all channels run forwards, and the backward scan is one of an encoder (`bidirectional`): a causal
checkpoint is unchanged until a mask is given, and decoding costs the same.

A prefix must be read in one forward: its first tokens depend on its last. In a later chunk the mask is refused.

Symbols: B batch, L new tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from ..kernels.tracing import host_reads, tracing
from .call_arguments import check_integer
from .token_layout import Sequence

_PREFIX_ORDER = (
    "prefix_mask must mark the first tokens of each document, got a marked token behind one that is not marked"
)
_PREFIX_LABELS = (
    "labels must be -100 at the tokens that prefix_mask marks, got others: the tokens of a prefix see each other, so "
    "they would see what they predict"
)


def has_prefix(config: PreTrainedConfig) -> bool:
    """Return whether a model reads marked prefixes in both directions."""
    return getattr(config, "prefix_bidirectional", False)


def check_prefix_option(config: Any) -> None:
    """Raise ValueError if a configuration asks for both directions in the prefix and everywhere."""
    if config.prefix_bidirectional and config.bidirectional:
        raise ValueError(
            "bidirectional must be False with prefix_bidirectional=True, got True: an encoder sees everything in both "
            "directions and has no suffix"
        )


def read_prefix(prefix_mask: Tensor | None, sequence: Sequence, config: PreTrainedConfig) -> Tensor | None:
    """Return the (B, L) prefix, True at its real tokens, for the argument of a forward.

    Args:
        prefix_mask: (B, L), non-zero at the tokens of a prefix; None: there is none.
        sequence: where the new tokens stand.
        config: the model's configuration.

    Raises:
        ValueError: if the model has no such mode, the shape or dtype is wrong, the cache already holds tokens, or a
            document has a marked token behind one that is not marked. On a GPU the last one is an error of the device.
    """
    if prefix_mask is None:
        return None
    if not has_prefix(config):
        raise ValueError(
            f"prefix_mask must be None for this {config.model_type}, which is made with prefix_bidirectional=False and "
            "reads no prefix in both directions"
        )
    if prefix_mask.shape != sequence.position_ids.shape:
        raise ValueError(
            f"prefix_mask must be (B, L) = {tuple(sequence.position_ids.shape)}, got {tuple(prefix_mask.shape)}"
        )
    if prefix_mask.dtype != torch.bool:
        check_integer("prefix_mask", prefix_mask)
    if sequence.past:
        raise ValueError(
            f"prefix_mask must be None where the cache already holds tokens, got one with {sequence.past} of them: the "
            "tokens of a prefix see each other, so pass the whole prefix in the first forward"
        )
    prefix = (prefix_mask != 0).to(sequence.position_ids.device)
    if sequence.seq_idx is not None:
        prefix = prefix & (sequence.seq_idx >= 0)
    if not tracing():
        _check_mask(_marks_beginnings(prefix, sequence), _PREFIX_ORDER)
    return prefix


def _marks_beginnings(prefix: Tensor, sequence: Sequence) -> Tensor:
    """Return whether no token of a (B, L) prefix stands behind a token of its document that is not one."""
    suffix = ~prefix if sequence.seq_idx is None else ~prefix & (sequence.seq_idx >= 0)
    behind = suffix.cumsum(-1)
    if sequence.seq_idx is not None:  # count from the start of each document
        first = (sequence.places() == 0) & (sequence.seq_idx >= 0)
        behind = behind - (behind - suffix.long()).where(first, torch.zeros_like(behind)).cummax(-1).values
    return ~(prefix & (behind > 0)).any()


def check_prefix_labels(labels: Tensor, prefix_mask: Tensor, ignored: int) -> None:
    """Raise ValueError if tokens of a prefix have labels, which the tokens before them see.

    Args:
        labels: (B, L) token ids.
        prefix_mask: (B, L), non-zero at the tokens of a prefix.
        ignored: label without a loss.
    """
    if not tracing():
        _check_mask(~((prefix_mask != 0).to(labels.device) & (labels != ignored)).any(), _PREFIX_LABELS)


def _check_mask(fits: Tensor, message: str) -> None:
    """Raise ValueError, or on a GPU, whose values are not read, let the device stop, unless `fits` is True."""
    if fits.is_cuda:
        torch._assert_async(fits, message)  # pyright: ignore[reportPrivateImportUsage]
    elif host_reads(fits) and not bool(fits):
        raise ValueError(message)


def prefix_alone(sequence: Sequence) -> Sequence:
    """Return the :class:`Sequence` of the same columns in which only the tokens of prefixes are real."""
    assert sequence.prefix is not None
    if sequence.alone is None:
        documents = torch.zeros_like(sequence.prefix, dtype=torch.int32)
        documents = (documents if sequence.seq_idx is None else sequence.seq_idx).masked_fill(~sequence.prefix, -1)
        sequence.alone = Sequence(sequence.position_ids, documents, None, 0, sequence.packed)
    return sequence.alone


def generation_prefix(prefix_mask: Tensor, new: int, past: int) -> Tensor | None:
    """Return the mask of one forward of `generate`, which is given that of the prompt.

    Args:
        prefix_mask: (B, prompt) of the prompt.
        new: tokens of this forward.
        past: tokens in the cache before it.

    Returns:
        (B, new), or None where the cache already holds the prefix.

    Raises:
        ValueError: if this forward does not have the whole prefix.
    """
    if bool((prefix_mask[:, past or new :] != 0).any()):
        raise ValueError(
            "prefix_mask: the tokens of a prefix see each other and cannot be read in several chunks. Leave out "
            "prefill_chunk_size, begin with an empty cache, and give the mask the length of the prompt; got a mask of "
            f"{prefix_mask.shape[1]} columns, {past} tokens in the cache and {new} new ones"
        )
    if past:
        return None
    mask = prefix_mask[:, :new]
    return F.pad(mask, (0, new - mask.shape[1]))
