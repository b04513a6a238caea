"""The report of `ssm-zoo show`: statistics of every layer, the distance to a teacher, and the rollout, as plain values.

Symbols: H heads, L queries, M keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_matrices import AttentionStack, LayerAttention
from .attention_rollout import attention_rollout
from .attention_statistics import head_distances, row_shares

__all__ = ["check_same_layers", "describe_stack", "rollouts", "token_texts"]


def check_same_layers(stacks: Sequence[AttentionStack], teacher: Sequence[AttentionStack]) -> None:
    """Raise a ValueError if a teacher's layers do not correspond to those of the model, one to one."""
    ours = {stack.name: stack.num_layers for stack in stacks}
    theirs = {stack.name: stack.num_layers for stack in teacher}
    if ours != theirs:
        shapes = (", ".join(f"{name}: {number}" for name, number in each.items()) for each in (ours, theirs))
        raise ValueError("`teacher` must have as many layers as MODEL ({}), got {}.".format(*shapes))


def describe_stack(stack: AttentionStack, teacher: AttentionStack | None = None) -> dict[str, Any]:
    """Return the statistics of a stack, with the teacher's and the distance to it in every layer that both have.

    Returns:
        "name", "num_layers" and "layers", a list of dictionaries with "layer", "mixer", "num_heads", "heads" (those
        that are shown; None: their mean), "signed", and a spread for each of the statistics of `head_statistics`. With
        a teacher, "teacher" is the same of its layer, and "to_teacher" has a spread for each value of `head_distances`
        and "of": "heads" or, if the numbers of heads differ or are too large, "mean" (of the heads' shares). A spread
        has the "mean" over the heads and "heads", their values, or the "min", "median" and "max" of many heads.
    """
    theirs = {} if teacher is None else {each.layer: each for each in teacher.layers}
    rows = []
    for each in stack.layers:
        row = _describe(each)
        if each.layer in theirs:
            row["teacher"] = _describe(theirs[each.layer])
            row["to_teacher"] = _compare(each, theirs[each.layer])
        rows.append(row)
    return {"name": stack.name, "num_layers": stack.num_layers, "layers": rows}


def rollouts(stacks: Sequence[AttentionStack], field: str) -> Tensor:
    """Return the (L, L) rollout through the layers of a model, or through those of its encoder.

    Args:
        stacks: what `read_attention` returned.
        field: what errors call the model.

    Raises:
        ValueError: if the matrices of some layers are unknown.
    """
    stack = next(each for each in stacks if each.name in ("layers", "encoder"))
    if stack.shares is None:
        raise ValueError(f"`rollout` must be False for {field}, as some of its layers return no matrix, got True.")
    return attention_rollout(stack.shares)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the "id" and the "text" of each token, decoded for itself."""
    return [{"id": token, "text": tokenizer.decode([token], clean_up_tokenization_spaces=False)} for token in ids]


def _describe(layer: LayerAttention) -> dict[str, Any]:
    many = layer.heads is None
    return {
        "layer": layer.layer,
        "mixer": layer.mixer,
        "num_heads": layer.num_heads,
        "heads": None if layer.heads is None else list(layer.heads),
        "signed": layer.signed,
        **{key: _spread(values, many) for key, values in layer.statistics.items()},
    }


def _compare(student: LayerAttention, teacher: LayerAttention) -> dict[str, Any]:
    by_head = student.heads is not None and (student.num_heads, student.heads) == (teacher.num_heads, teacher.heads)
    pair = [row_shares(each.matrices) if by_head else each.shares[None] for each in (student, teacher)]
    found = head_distances(*pair, start=max(student.start, teacher.start))
    return {"of": "heads" if by_head else "mean", **{key: _spread(values, False) for key, values in found.items()}}


def _spread(values: Tensor, many: bool) -> dict[str, Any]:
    """Return the mean of (H) values and the values, or a summary of many; None stands for what is not finite."""
    known = values[~values.isnan()]
    spread: dict[str, Any] = {"mean": _number(known.mean()) if len(known) else None}
    if not many:
        return {**spread, "heads": [_number(value) for value in values]}
    if not len(known):
        return {**spread, "min": None, "median": None, "max": None}
    return {**spread, "min": _number(known.min()), "median": _number(known.median()), "max": _number(known.max())}


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
