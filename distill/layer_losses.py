"""Losses that compare a layer of the student with the teacher's: norms of matrix errors, and errors of outputs.

Every loss is a mean over sequences, so the losses of the parts of a batch can be averaged.

Symbols: B batch, L length, D width, H heads.
"""

from torch import Tensor

from ..kernels.matrix_distance import RowDistances

_TINY = 1e-12


def matrix_norm(distances: RowDistances, norm: str) -> Tensor:
    """Return the mean over sequences and heads of a norm of the matrix error.

    Args:
        distances: squared norms of the rows of the errors and of the attention matrices.
        norm: "frobenius", the plain norm (MOHAWK, arXiv 2408.10189, eq. 2); "relative", as a share of the attention
            matrix's norm, so that all heads have the same weight; or "rows", the root mean square of the rows' relative
            errors, so that the early rows, whose attention is concentrated on few tokens, do not dominate.
    """
    errors, targets = distances
    if norm == "rows":
        squared = (errors / targets.clamp(min=_TINY)).mean(-1)
    elif norm == "relative":
        squared = errors.sum(-1) / targets.sum(-1).clamp(min=_TINY)
    else:
        squared = errors.sum(-1)
    # The root, with a gradient of 0 at 0. NaN remains NaN.
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0).mean()


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over sequences of the squared error relative to the squared target; 1 for an output of zero.

    MOHAWK's stage 2 uses the plain norm. With the relative error all layers have the same weight.

    Args:
        student: (B, L, D) outputs.
        teacher: (B, L, D) targets.
    """
    error = (student.float() - teacher.float()).square().sum((1, 2))
    return (error / teacher.float().square().sum((1, 2)).clamp(min=_TINY)).mean()
