"""Gates of a mixer's heads in closed form: how much of each head's output a token takes.

Softmax attention can turn a head off: its weight then rests on the first token, whose value is almost zero. Rows of
positive weights over all tokens cannot. A gate that reads the token can, and the best one is a weighted regression: for
a head's output y and the teacher's a, the factor g(x) = b + w x with the least `sum || g(x) y - a ||^2`.

Symbols: B batch, L length, D width, H heads, P head width.
"""

from typing import Any

import torch
from torch import Tensor

from .least_squares import Moments, add_moments, cross_validated_ridge

# Least square of a gate's mean, relative to the mean of its square. A gate can open and close a head, but not turn its
# sign round, as it would for a head that has nothing in common with the teacher's.
_LEAST_MEAN = 0.25
# Smallest squared norm of a head's output by which is divided.
_SMALLEST = 1e-12


def fit_gates(mixer: Any, normed: list[Tensor], outputs: list[Tensor], targets: list[Tensor], fitted: int) -> None:
    """Set the gates of a mixer, in place. A head stays open where no gate helps on held-out windows.

    Args:
        mixer: has `num_heads` heads, `set_gates`, and gates that are open.
        normed: (B, L, D) inputs of the mixer.
        outputs: (B, L, H P) outputs of its heads.
        targets: (B, L, H P) outputs of the teacher's heads.
        fitted: number of batches that are fitted; the others are held out.
    """
    heads = int(mixer.num_heads)
    pairs = [
        (mine.float().unflatten(-1, (heads, -1)), theirs.float().unflatten(-1, (heads, -1)))
        for mine, theirs in zip(outputs, targets, strict=True)
    ]
    squares = [mine.square().sum(-1).clamp(min=_SMALLEST) for mine, _ in pairs]  # (B, L, H)
    products = [(mine * theirs).sum(-1) for mine, theirs in pairs]
    rows = torch.eye(1, 1 + normed[0].shape[-1], dtype=torch.float64, device=normed[0].device).repeat(heads, 1)
    for head in range(heads):
        sums: dict[bool, Moments] = {}
        for index, hidden in enumerate(normed):
            add_moments(sums, index < fitted, _moments(hidden, squares[index][..., head], products[index][..., head]))
        fit, held_out = sums[True], sums[False]
        constant = torch.zeros_like(rows[:1])
        constant[0, 0] = fit.cross[0, 0] / fit.inputs[0, 0]
        row = cross_validated_ridge(constant, fit, held_out)[0]
        mean, square = (row * fit.inputs[0]).sum() / fit.inputs[0, 0], row @ fit.inputs @ row / fit.inputs[0, 0]
        if mean > 0 and mean**2 > _LEAST_MEAN * square:
            rows[head] = row / mean
    mixer.set_gates(rows[:, 1:], rows[:, 0] - 1)


def _moments(hidden: Tensor, square: Tensor, product: Tensor) -> Moments:
    """Moments of the regression of `product / square` on (B, L, D) inputs and a 1, weighted with `square`, (B, L)."""
    root = square.sqrt()[..., None]
    ones = torch.ones_like(root)
    inputs = torch.cat([ones, hidden.float()], dim=-1) * root
    return Moments.of(inputs.flatten(0, 1), (product[..., None] / root).flatten(0, 1))
