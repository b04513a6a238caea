"""Numbers that describe mixing matrices, and the distance of two models' matrices.

Weights of a row are compared as shares: absolute values over their sum. For softmax attention this changes nothing. The
matrices of state-space mixers are signed; the authors of "The Hidden Attention of Mamba Models" (Ali et al., arXiv
2403.01590) show absolute values, too (figure 4 of version 2, explained in issue 6 of AmeenAli/HiddenMambaAttn).

Symbols: H heads, L queries, M keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["first_row", "head_distances", "head_statistics", "row_shares"]


def row_shares(matrix: Tensor) -> Tensor:
    """Return the absolute weights of each row over their sum.

    Args:
        matrix: (..., L, M) weights, which may be signed.

    Returns:
        (..., L, M) float64, non-negative. Rows sum to 1; a row of zeros stays zero.
    """
    weights = matrix.double().abs()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def first_row(matrix: Tensor) -> int:
    """Return the first row that counts: 1 for causal matrices (H, L, L), whose first query sees itself alone, or 0."""
    square = matrix.shape[-1] == matrix.shape[-2]
    return int(square and not bool(matrix.triu(1).any()))


def head_statistics(shares: Tensor, start: int = 0) -> dict[str, Tensor]:
    """Compute where the heads look, as means over the queries from `start` on that have any weight.

    Args:
        shares: (H, L, M) output of :func:`row_shares`.
        start: index of the first query that counts; see :func:`first_row`.

    Returns:
        (H) float64 each, NaN for a head without weights: "entropy" (nats, at most ln M), "first" (share of the first
        key) and, if L = M, "distance" (tokens between query and key, each key weighted by its share).
    """
    present = shares.sum(-1) > 0
    present[:, :start] = False
    found = {"entropy": _mean(_entropy(shares), present), "first": _mean(shares[..., 0], present)}
    if shares.shape[-1] == shares.shape[-2]:
        place = torch.arange(shares.shape[-1], dtype=shares.dtype, device=shares.device)
        found["distance"] = _mean((shares * (place[:, None] - place).abs()).sum(-1), present)
    return found


def head_distances(shares: Tensor, teacher: Tensor, start: int = 0) -> dict[str, Tensor]:
    """Compare the heads of two models, as means over the queries from `start` on for which both have weights.

    Args:
        shares: (H, L, M) output of :func:`row_shares`, of the student.
        teacher: (H, L, M) the same of the teacher.
        start: index of the first query that counts; see :func:`first_row`.

    Returns:
        (H) float64 each, NaN if there is no such query: "js" (Jensen-Shannon divergence in bits, from 0 for equal rows
        to 1 for rows without a common key), "kl" (KL(teacher || student) in nats, infinite if the student gives no
        weight to a key to which the teacher gives some), "same_top" (share of the queries whose largest weight is on
        the same key) and "top_mass" (the student's share of the teacher's top key).
    """
    present = (shares.sum(-1) > 0) & (teacher.sum(-1) > 0)
    present[:, :start] = False
    mixture = (shares + teacher) / 2
    divergence = (_entropy(mixture) - (_entropy(shares) + _entropy(teacher)) / 2).clamp(min=0) / math.log(2)
    ratio = torch.where(teacher > 0, teacher.log() - shares.log(), 0.0)
    top = teacher.argmax(-1, keepdim=True)
    return {
        "js": _mean(divergence, present),
        "kl": _mean((teacher * ratio).sum(-1), present),
        "same_top": _mean((shares.argmax(-1, keepdim=True) == top)[..., 0].double(), present),
        "top_mass": _mean(shares.gather(-1, top)[..., 0], present),
    }


def _entropy(shares: Tensor) -> Tensor:
    """Return the (..., L) entropy in nats of (..., L, M) shares."""
    return -torch.xlogy(shares, shares).sum(-1)


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """Return the (H) means of the (H, L) values that are present; NaN where none is."""
    return torch.where(present, values, 0.0).sum(-1) / present.sum(-1)
