"""The check that a tokenizer belongs to a model: the model has an embedding for each of its ids."""

from collections.abc import Iterable
from typing import Any

__all__ = ["check_token_ids"]


def check_token_ids(model: Any, ids: Iterable[int], field: str) -> None:
    """Raise a ValueError if a model has no embedding for a token id; on a GPU, looking it up would end the process.

    Args:
        model: the model.
        ids: the ids.
        field: what errors call the model.
    """
    rows, largest = model.get_input_embeddings().weight.shape[0], max(ids, default=0)
    if largest >= rows:
        raise ValueError(
            f"{field}: the tokenizer's ids must be below {rows:,}, the number of the model's embeddings, got "
            f"{largest:,}. Use the tokenizer that belongs to the model."
        )
