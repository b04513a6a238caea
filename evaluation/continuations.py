"""Agreement of greedy continuations with a teacher's: whether a student writes what its teacher writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["compare_continuations"]


def compare_continuations(
    samples: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Compare continuations of the same prompts, token by token.

    Continuations that part at one token usually differ from there on, so that the common beginning says more than the
    share of equal tokens.

    Args:
        samples: continuations by a model, from `generation_sample`.
        reference: those by its teacher, of the same prompts in the same order.

    Returns:
        "tokens" (number of tokens compared: those of the longer continuation of each prompt), "agreement" (share of
        them, in [0, 1], that are equal at their place; 1 if there are none), "common_prefix" (mean number of equal
        tokens at the beginning) and "repetition" (mean share of repeated 4-grams in the model's continuations).

    Raises:
        ValueError: if there is no prompt, or the prompts differ.
    """
    prompts, expected = ([sample["prompt"] for sample in each] for each in (samples, reference))
    if not prompts or prompts != expected:
        raise ValueError(f"`reference` must be continuations of the same prompts, {prompts}, got {expected}")
    pairs = [(ours["tokens"], theirs["tokens"]) for ours, theirs in zip(samples, reference, strict=True)]
    same = [[one == other for one, other in zip(*pair, strict=False)] for pair in pairs]
    tokens = sum(max(map(len, pair)) for pair in pairs)
    return {
        "tokens": tokens,
        "agreement": sum(map(sum, same)) / tokens if tokens else 1.0,
        "common_prefix": sum([*equal, False].index(False) for equal in same) / len(same),
        "repetition": sum(sample["repetition"] for sample in samples) / len(samples),
    }
