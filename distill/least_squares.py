"""Least squares from second moments: the sums are collected batch by batch, and a projection is solved from them.

Symbols: N rows, E inputs, D outputs, H heads, P head width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Candidates for the strength of a ridge regression, relative to the mean square of an input.
STRENGTHS = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass
class Moments:
    """Sums over rows of inputs y (E) and targets t (D), in float64.

    Attributes:
        inputs: (E, E) sum of `y y^T`.
        cross: (E, D) sum of `y t^T`.
        square: () sum of `t^T t`.
    """

    inputs: Tensor
    cross: Tensor
    square: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "Moments":
        """Return the moments of (N, E) inputs and (N, D) targets: products in float32, sums over batches in float64."""
        inputs, targets = inputs.float(), targets.float()
        with torch.autocast(inputs.device.type, enabled=False):
            return cls((inputs.T @ inputs).double(), (inputs.T @ targets).double(), targets.double().square().sum())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.inputs + other.inputs, self.cross + other.cross, self.square + other.square)

    def error(self, weight: Tensor) -> float:
        """Return the sum of `|| W y - t ||^2` over the rows, for a (D, E) float64 projection W."""
        return float(((weight @ self.inputs) * weight).sum() - 2 * (weight * self.cross.T).sum() + self.square)


def add_moments(sums: dict[Any, Moments], key: Any, moments: Moments) -> None:
    """Add moments to the sum under a key."""
    sums[key] = sums[key] + moments if key in sums else moments


def scale_heads(weight: Tensor, inputs: Tensor, cross: Tensor, heads: int) -> Tensor:
    """Return the output projection with each head's columns scaled by the best factor.

    The factors s minimise `|| sum_h s_h W_h y_h - t ||^2`; the normal equations have one row and column per head.
    A head that adds nothing keeps its columns.

    Args:
        weight: (D, E) output projection W.
        inputs: (E, E) sum of `y y^T`.
        cross: (E, D) sum of `y t^T`.
        heads: number of heads, H, which divides E.

    Returns:
        (D, E) scaled projection.
    """
    columns = weight.unflatten(1, (heads, -1))  # (D, H, P)
    blocks = inputs.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # (H, P, H, P)
    normal = torch.einsum("dhp,hpgq,dgq->hg", columns, blocks, columns)
    right = torch.einsum("dhp,hpd->h", columns, cross.unflatten(0, (heads, -1)))
    silent = normal.diagonal() == 0
    regular = normal.diagonal().mean() * 1e-6 + silent.to(normal.dtype)
    factors = torch.linalg.solve(normal + torch.diag(regular), right)
    return (columns * torch.where(silent, 1, factors)[None, :, None]).flatten(1)


def ridge(weight: Tensor, inputs: Tensor, cross: Tensor, strength: float) -> Tensor:
    """Return the least-squares output projection, shrunk towards `weight`.

    Args:
        weight: (D, E) projection towards which the solution is shrunk.
        inputs: (E, E) sum of `y y^T`.
        cross: (E, D) sum of `y t^T`.
        strength: penalty on the squared distance, relative to the mean of the diagonal of `inputs`.

    Returns:
        (D, E) projection; `weight` if all inputs are zero.
    """
    penalty = strength * inputs.diagonal().mean()
    if penalty == 0:
        return weight
    regular = inputs + penalty * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    return torch.linalg.solve(regular, cross + penalty * weight.T).T


def cross_validated_ridge(weight: Tensor, fit: Moments, held_out: Moments, heads: int | None = None) -> Tensor:
    """Return the ridge solution with the strength that has the least error on held-out rows, or `weight` itself.

    Every candidate is fitted to the moments of `fit` alone, and compared on those of `held_out`. The best strength is
    then used on both together. Where no solution is better on the held-out rows than `weight`, that is returned.

    Args:
        weight: (D, E) projection.
        fit: moments of the rows that are fitted.
        held_out: moments of other rows.
        heads: number of heads whose scales are fitted first (see :func:`scale_heads`), so that the solution is shrunk
            towards the scaled projection; None: it is shrunk towards `weight`.

    Returns:
        (D, E) float64 projection.

    Raises:
        ValueError: if the moments are not finite.
    """

    def solve(moments: Moments, strength: float) -> Tensor:
        start = weight if heads is None else scale_heads(weight, moments.inputs, moments.cross, heads)
        return ridge(start, moments.inputs, moments.cross, strength)

    weight = weight.double()
    before = held_out.error(weight)
    if not math.isfinite(before + fit.error(weight)):
        raise ValueError(
            "the activations of a closed-form fit are not finite. Choose dtype float32, or another teacher."
        )
    error, strength = min((held_out.error(solve(fit, strength)), strength) for strength in STRENGTHS)
    return solve(fit + held_out, strength) if error < before else weight
