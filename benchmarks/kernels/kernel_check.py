"""Checks of results before and after they are timed."""

from __future__ import annotations

import torch
from kernel_cases import MIXERS, Case, Results

# Largest error of a result relative to the result's largest entry. Ours: a few roundings of that dtype.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Peers may multiply in TF32, and keep step sizes and states in half precision; a wrong one is off by tenths. A mixer
# rounds after each of its parts.
PEER_AGREEMENT = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
SAMPLED = 2**16


def allowed(case: Case, ours: bool) -> float:
    """Return the largest error that passes."""
    return (AGREEMENT if ours and case.op not in MIXERS else PEER_AGREEMENT)[case.dtype]


def error_of(actual: Results, expected: Results) -> tuple[float, str] | None:
    """Return the largest error over the results that both have, and the name of that result; None if there is none.

    An error is relative to the largest entry of what is expected; another shape and a NaN are infinitely wrong.
    """
    errors = {name: _error(actual[name], expected[name]) for name in expected if name in actual}
    if not errors:
        return None
    where = max(errors, key=errors.__getitem__)
    return errors[where], where


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return float("inf") if error != error else error


def sampled(results: Results) -> Results:
    """Return copies of some entries spread over each result, because whole results might not fit in memory twice."""
    entries = {}
    for name, tensor in results.items():
        # Odd: an even step would meet the same few columns again and again.
        step = max(tensor.numel() // SAMPLED, 1) | 1
        places = torch.unravel_index(torch.arange(0, tensor.numel(), step, device=tensor.device), tensor.shape)
        entries[name] = tensor[places].clone()
    return entries
