"""Limits of a model that its training data may exceed, checked before a run writes anything."""

from transformers import PreTrainedConfig

from ..modeling.prefix import has_prefix


def check_positions(config: PreTrainedConfig, longest: int, remedy: str) -> None:
    """Check that a model has weights for every position of the longest text.

    Args:
        config: configuration of the model, or of one of its two stacks.
        longest: number of tokens of the longest text.
        remedy: last sentence of the error.

    Raises:
        ValueError: if it has weights for fewer positions.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(config, "is_bounded", False) and isinstance(limit, int) and longest > limit:
        raise ValueError(
            f"model: a text must have at most {limit:,} tokens, since the model has weights for as many positions "
            f"(max_position_embeddings), got {longest:,}. {remedy}"
        )


def check_rows(config: PreTrainedConfig, longest: int, remedy: str) -> None:
    """Check that a model can read the rows of a collator of `packing.py`.

    Args:
        config: configuration of the model.
        longest: number of tokens of the longest document in a row.
        remedy: last sentence of the error about the length.

    Raises:
        ValueError: if the model has weights for fewer positions, or reads only rows that are padded on the left.
    """
    if getattr(config, "pad_mode", None) == "as_trained":
        raise ValueError(
            "model: `pad_mode` must be 'shift' for this training, got 'as_trained': such a model reads one document a "
            "row, with padding on the left, and the rows of the training are packed or padded on the right."
        )
    check_positions(config, longest, remedy)


def check_prefixes(config: PreTrainedConfig, there: bool) -> None:
    """Check that a new model is trained in every mode that its configuration asks for.

    Args:
        config: configuration of the new model.
        there: whether the training has inputs that are read in both directions.

    Raises:
        ValueError: if the model is to read prefixes in both directions, and the training has none.
    """
    if has_prefix(config) and not there:
        raise ValueError(
            "config: `prefix_bidirectional` must be False, got True: this training has no input that is read in both "
            "directions, so the model would not learn to read one. `ssm-zoo train --objectives` has such inputs."
        )
