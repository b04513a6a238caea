"""Checks of what a forward is called with: keyword arguments beside those in its signature, and labels."""

import difflib
from typing import Any

from torch import Tensor

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


def check_keywords(model: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise TypeError for a keyword that a forward does not read, other than None: it would be lost without a word.

    Args:
        model: name of the class, for the message.
        given: what is not in the signature.
        known: the parameters in the signature.
    """
    unknown = [name for name, value in given.items() if value is not None and name not in ACCEPTED_KEYWORDS]
    if not unknown:
        return
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
