"""Paired tests of two systems on the same queries: bootstrap interval, and the randomisation test.

The randomisation test (Fisher's, with the mean difference as statistic) is the one that Smucker, Allan and Carterette
(CIKM 2007) recommend for retrieval, with the bootstrap as its usual companion. P-values are two-sided and are not
corrected for the number of comparisons; :func:`holm` corrects them.

Symbols: Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Random numbers in memory at one time.
_BLOCK = 2_000_000


def compare(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare two systems by a measure's values for the same queries.

    Args:
        first: query to value of the first system.
        second: the same for the second.
        resamples: of the queries, and of the signs of their differences. If there are at most as many ways to choose
            the signs, 2^Q, the randomisation test counts all of them.
        seed: seed of both.

    Returns:
        "difference": mean of the first minus mean of the second; "low" and "high": its 95 % bootstrap interval (of
        percentiles); "p_bootstrap": share of bootstrap means, shifted to 0, at least as far from 0 as the difference;
        "p_randomisation": the same for random signs; "wins", "ties" and "losses": queries by the sign.

    Raises:
        ValueError: if the queries differ or there are none, a value is not finite, or `resamples` is not positive.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("`first` and `second` must have values for the same queries, one or more.")
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}.")
    for name, values in (("first", first), ("second", second)):
        lost = next((query for query, value in values.items() if not math.isfinite(value)), None)
        if lost is not None:
            # No comparison with NaN is true, so the p-values would be as small as they can be.
            raise ValueError(f"`{name}` must have finite values, got {values[lost]} for the query {lost!r}.")
    differences = np.array([first[query] - second[query] for query in first])
    mean, generator = differences.mean(), np.random.default_rng(seed)
    number = len(differences)
    # Sums in another order differ in the last bits; they count as equal.
    far = abs(mean) - 1e-12
    boot = np.concatenate(
        [differences[generator.integers(number, size=(rows, number))].mean(1) for rows in _blocks(resamples, number)]
    )
    low, high = np.quantile(boot, [0.025, 0.975])
    if number < 63 and 2**number <= resamples:
        choices = np.arange(2**number)[:, None] >> np.arange(number) & 1
        signed = (1 - 2 * choices) @ differences / number
        p_randomisation = float((np.abs(signed) >= far).mean())
    else:
        beyond = 0
        for rows in _blocks(resamples, number):
            signs = 1.0 - 2.0 * generator.integers(2, size=(rows, number))
            beyond += int((np.abs(signs @ differences / number) >= far).sum())
        # With the arrangement that was observed, so that it is never 0 (Phipson and Smyth 2010).
        p_randomisation = (1 + beyond) / (1 + resamples)
    return {
        "difference": float(mean),
        "low": float(low),
        "high": float(high),
        "p_bootstrap": float((1 + (np.abs(boot - mean) >= far).sum()) / (1 + resamples)),
        "p_randomisation": p_randomisation,
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
    }


def interval(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over queries."""
    array, generator = np.asarray(values, dtype=float), np.random.default_rng(seed)
    number = len(array)
    boot = np.concatenate(
        [array[generator.integers(number, size=(rows, number))].mean(1) for rows in _blocks(resamples, number)]
    )
    low, high = np.quantile(boot, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _blocks(resamples: int, number: int) -> list[int]:
    """Return numbers of resamples, whose sum is `resamples`, that fit into memory one after another."""
    most = max(1, _BLOCK // number)
    return [most] * (resamples // most) + ([resamples % most] if resamples % most else [])
