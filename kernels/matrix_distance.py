"""Distance of a state-space layer's mixing matrix from softmax attention, row by row, without either matrix in memory.

Symbols: B batch, L length, H heads, G groups, N state size, P head width; M mixing matrix, A attention matrix, S sums
of log-decays, R rows of a block.

For every batch row and head (head h reads B and C of group h // (H / G)),

    U_ij = (C_i . B_j) exp(S_i - S_j) scale_j  for j <= i, otherwise 0,
    M = U, or U_ij / sum_k U_ik, with the skip added to the diagonal,
    A_i = softmax_j<=i(scaling q_i . k_j),

and :func:`row_distances` returns `|M_i - A_i|^2` and `|A_i|^2` for every row i. The attention may have a window, with
j > i - window, and a soft cap c, with scores c tanh(s / c). Norms of `M - A` and their gradients
follow from these.

In the torch path a block has R rows of all heads of one sequence, and the columns up to its last row. R is chosen so
that an array of a block has a fixed number of bytes. The forward keeps the distances and the log-sum-exp of the
attention scores, all (B, H, L); the backward computes each block again. Memory is therefore linear in L, and time
quadratic.

The teacher's side has no gradient. Computation is in float32 (float64 for float64 inputs) also under autocast; the sums
of log-decays are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_optional,
    check_tensor,
    choose_implementation,
    without_autocast,
)
from .matrix_distance_triton import WIDEST, row_distances_triton
from .recurrence import blank_padding
from .ssd import ssd_matrix
from .tracing import opaque, tracing

# Bytes of one (H, R, columns) array of a block; about eight of them are in memory at a time.
_BLOCK_BYTES = 16 * 2**20


class SSDFactors(NamedTuple):
    """Factors of the (B, H, L, L) mixing matrices of a state-space layer.

    Attributes:
        log_decay: (B, L, H) logarithm of the decay.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        scale: (B, L, H) factors of the columns, the step sizes of Mamba-2; None: 1.
        skip: (H) what is added to the diagonal, after the normalisation; None: 0.
        least_sum: divide each row by its sum, which counts as at least this number; None: no normalisation.
    """

    log_decay: Tensor
    B: Tensor
    C: Tensor
    scale: Tensor | None = None
    skip: Tensor | None = None
    least_sum: float | None = None

    def matrix(self, seq_idx: Tensor | None = None) -> Tensor:
        """Return the whole matrices; `seq_idx` as in :func:`ssd_matrix`."""
        matrix = ssd_matrix(self.log_decay, self.B, self.C, seq_idx=seq_idx)
        (scale,) = blank_padding(seq_idx, self.scale)
        if scale is not None:
            matrix = matrix * scale.to(matrix.dtype).transpose(1, 2)[:, :, None, :]
        if self.least_sum is not None:
            matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=self.least_sum)
        if self.skip is not None:
            matrix = matrix + torch.diag_embed(self.skip.to(matrix.dtype)[:, None].expand(-1, matrix.shape[-1]))
        return matrix


class RowDistances(NamedTuple):
    """Squared norms of the rows of matrices.

    Attributes:
        errors: (B, H, L) of the difference of the student's and the teacher's matrix.
        targets: (B, H, L) of the teacher's matrix, without a gradient.
    """

    errors: Tensor
    targets: Tensor


def row_distances(
    factors: SSDFactors,
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    block_bytes: int | None = None,
    implementation: str = "auto",
) -> RowDistances:
    """Compute the squared distances between the rows of SSD and attention matrices, blockwise.

    Args:
        factors: the student's side, which receives gradients. Each sequence is one document, without padding.
        queries: (B, L, H, P) queries of the attention, with positions applied.
        keys: (B, L, H, P) keys.
        scaling: factor on the scores.
        window: tokens that a query of the attention sees, its own included, at least 1; None: all.
        softcap: c in c tanh(s / c) of the scaled scores s, positive; None: none.
        block_bytes: size of one array of a block of the torch path; 16 MiB if None. Triton has no such blocks.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support N or P > 256, a window
            or a soft cap.

    Raises:
        ValueError: if a shape, dtype, device, `window`, `softcap`, `block_bytes` or `implementation` is invalid.
    """
    log_decay, B, C, scale, skip, least_sum = factors
    _check(factors, queries, keys)
    if block_bytes is not None and block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1 or None, got {block_bytes}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    plain = window is None and softcap is None
    served = block_bytes is None and plain and max(B.shape[3], queries.shape[3]) <= WIDEST
    chosen = choose_implementation(implementation, "row_distances", log_decay, served, traceable=True)
    dtype = accumulator(log_decay)
    # As in `ssd_matrix`: a decay that sets the state to zero is a finite sum.
    sums = log_decay.transpose(1, 2).double().clamp_min(2 * _smallest(dtype)).cumsum(-1)
    columns = None if scale is None else scale.to(dtype).transpose(1, 2)
    diagonal = None if skip is None else skip.to(dtype)
    queries, keys = queries.detach(), keys.detach()
    if chosen == "triton" and sums.numel():
        arguments = (sums, B, C, columns, diagonal, least_sum, queries, keys, scaling, _smallest(dtype))
        return RowDistances(*row_distances_triton(*arguments))
    arguments = (
        *(sums, B.to(dtype).transpose(1, 2), C.to(dtype).transpose(1, 2), columns, diagonal, least_sum),
        *(queries.to(dtype).transpose(1, 2), keys.to(dtype).transpose(1, 2), scaling, window, softcap),
        block_bytes or _BLOCK_BYTES,
    )
    if tracing():
        errors, targets = _traced(*arguments)
        return RowDistances(errors, targets.detach())
    errors, targets = _RowDistances.apply(*arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return RowDistances(errors, targets)


def row_distances_reference(student: Tensor, teacher: Tensor) -> RowDistances:
    """Compute :func:`row_distances` by its definition, from (B, H, L, L) matrices."""
    return RowDistances((student - teacher).square().sum(-1), teacher.detach().square().sum(-1))


def _check(factors: SSDFactors, queries: Tensor, keys: Tensor) -> None:
    log_decay, B, C, scale, skip, _ = factors
    check_tensor("log_decay", log_decay, (None, None, None), "(B, L, H)")
    batch, length, heads = log_decay.shape
    check_tensor("B", B, (batch, length, None, None), "(B, L, G, N)")
    check_groups("B", B.shape[2], heads)
    check_tensor("C", C, tuple(B.shape), "(B, L, G, N)")
    check_optional("scale", scale, (batch, length, heads), "(B, L, H)")
    check_optional("skip", skip, (heads,), "(H)")
    check_tensor("queries", queries, (batch, length, heads, None), "(B, L, H, P)")
    check_tensor("keys", keys, tuple(queries.shape), "(B, L, H, P)")
    check_devices(log_decay=log_decay, B=B, C=C, scale=scale, skip=skip, queries=queries, keys=keys)


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest sum of log-decays whose exponential is not set to zero, as in `ssd_matrix`."""
    return -80.0 if dtype == torch.float32 else -700.0


class _Sides(NamedTuple):
    """Both sides of one sequence, heads first: the arguments of :class:`_RowDistances` without the batch."""

    sums: Tensor
    B: Tensor
    C: Tensor
    scale: Tensor | None
    skip: Tensor | None
    least_sum: float | None
    queries: Tensor
    keys: Tensor
    scaling: float
    window: int | None
    softcap: float | None


class _Block(NamedTuple):
    """The arrays of a block, (H, R, J) with J columns, and what they are made of."""

    decay: Tensor
    unscaled: Tensor  # before scale and normalisation
    matrix: Tensor  # before the skip
    row_sums: Tensor | None  # (H, R, 1), before the clamp
    attention: Tensor
    difference: Tensor


class _RowDistances(torch.autograd.Function):
    """Row distances of (B, heads, L, ...) arguments."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *given, block_bytes = arguments
        sums, dtype = given[0], given[1].dtype
        shape = sums.shape
        errors, targets, log_sums = (sums.new_empty(shape, dtype=dtype) for _ in range(3))
        with without_autocast(sums):
            for row, rows in _blocks(shape, dtype, block_bytes):
                sides = _of_sequence(given, row)
                block = _block(sides, rows, None, log_sums[row][:, rows])
                errors[row][:, rows] = block.difference.square_().sum(-1)
                targets[row][:, rows] = block.attention.square_().sum(-1)
        _RowDistances.save(ctx, log_sums, *arguments)
        ctx.mark_non_differentiable(targets)
        return errors, targets

    @staticmethod
    def save(ctx: Any, log_sums: Tensor, *arguments: Any) -> None:
        """Save what the backward needs."""
        *given, ctx.block_bytes = arguments
        ctx.save_for_backward(*(given[place] for place in _TENSORS), log_sums)
        ctx.others = given[5], given[8:]

    @staticmethod
    def restore(ctx: Any, *arguments: Any) -> None:
        """Save what the backward needs, without computing the distances."""
        *given, block_bytes = arguments
        sums, dtype = given[0], given[1].dtype
        log_sums = sums.new_empty(sums.shape, dtype=dtype)
        for row, rows in _blocks(sums.shape, dtype, block_bytes):
            scores, _ = _scores(_of_sequence(given, row), rows)
            log_sums[row][:, rows] = scores.logsumexp(-1)
        _RowDistances.save(ctx, log_sums, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        sums, B, C, scale, skip, queries, keys, log_sums = ctx.saved_tensors
        least_sum, numbers = ctx.others
        given = (sums, B, C, scale, skip, least_sum, queries, keys, *numbers)
        gradients = tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in given[:5])
        with without_autocast(sums):
            for row, rows in _blocks(sums.shape, B.dtype, ctx.block_bytes):
                sides = _of_sequence(given, row)
                block = _block(sides, rows, log_sums[row][:, rows], None)
                mine = (*(None if part is None else part[row] for part in gradients[:4]), gradients[4])
                _add_gradients(mine, sides, block, rows, outer[0][row][:, rows])
        return *gradients, *([None] * 7)


# Places of the tensors among the arguments of `_RowDistances`.
_TENSORS = (0, 1, 2, 3, 4, 6, 7)


_traced = opaque(
    _RowDistances,
    "row_distances",
    "Tensor sums, Tensor B, Tensor C, Tensor? scale, Tensor? skip, float? least_sum, Tensor queries, Tensor keys, "
    "float scaling, int? window, float? softcap, int block_bytes",
    lambda sums, B, *_: (sums.new_empty(sums.shape, dtype=B.dtype), sums.new_empty(sums.shape, dtype=B.dtype)),
    restore=_RowDistances.restore,
)


def _of_sequence(given: Any, row: int) -> _Sides:
    """Return the arguments of one sequence; the skip (the fifth) and numbers are the same for all."""
    parts: Any = (part[row] if isinstance(part, Tensor) and n != 4 else part for n, part in enumerate(given))
    return _Sides(*parts)


def _blocks(shape: torch.Size, dtype: torch.dtype, block_bytes: int) -> Iterator[tuple[int, slice]]:
    """Yield the number of a sequence and the rows of a block, for (B, H, L)."""
    batch, heads, length = shape
    step = max(block_bytes // (max(heads * length, 1) * dtype.itemsize), 1)
    for row in range(batch):
        for start in range(0, length, step):
            yield row, slice(start, min(start + step, length))


def _block(sides: _Sides, rows: slice, log_sums: Tensor | None, log_sums_out: Tensor | None) -> _Block:
    """Compute a block, with the log-sum-exp of the attention scores (H, R), or writing it to `log_sums_out`."""
    dtype, end = sides.B.dtype, rows.stop
    heads, groups = sides.sums.shape[0], sides.B.shape[0]
    scores, later = _scores(sides, rows)
    exponents = (sides.sums[:, rows, None] - sides.sums[:, None, :end]).to(dtype).masked_fill_(later, -math.inf)
    decay = F.threshold(exponents, _smallest(dtype), -math.inf, inplace=True).exp_()
    products = sides.C[:, rows] @ sides.B[:, :end].mT  # (G, R, J)
    unscaled = decay.unflatten(0, (groups, heads // groups)) * products[:, None]
    unscaled = unscaled.flatten(0, 1)
    matrix = unscaled if sides.scale is None else unscaled * sides.scale[:, None, :end]
    row_sums = None
    if sides.least_sum is not None:
        row_sums = matrix.sum(-1, keepdim=True)
        matrix = matrix / row_sums.clamp(min=sides.least_sum)
    if log_sums is None:
        log_sums = scores.logsumexp(-1)
        assert log_sums_out is not None
        log_sums_out.copy_(log_sums)
    attention = scores.sub_(log_sums[..., None]).exp_()
    difference = matrix - attention
    if sides.skip is not None:
        difference.diagonal(rows.start, -2, -1).add_(sides.skip[:, None])
    return _Block(decay, unscaled, matrix, row_sums, attention, difference)


def _scores(sides: _Sides, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the (H, R, J) scores of the attention, and the (R, J) mask of later columns.

    Scores of columns that a row does not see are minus infinity.
    """
    end = rows.stop
    later = torch.ones(end - rows.start, end, dtype=torch.bool, device=sides.sums.device).triu_(rows.start + 1)
    scores = (sides.queries[:, rows] @ sides.keys[:, :end].mT).mul_(sides.scaling)
    if sides.softcap is not None:
        scores = scores.div_(sides.softcap).tanh_().mul_(sides.softcap)
    hidden = later
    if sides.window is not None:
        hidden = later | torch.ones_like(later).tril_(rows.start - sides.window)
    return scores.masked_fill_(hidden, -math.inf), later


def _add_gradients(
    gradients: tuple[Tensor | None, ...], sides: _Sides, block: _Block, rows: slice, outer: Tensor
) -> None:
    """Add a block's part to the gradients of the first five arguments; `outer` (H, R) is that of the distances."""
    of_sums, of_B, of_C, of_scale, of_skip = gradients
    assert of_sums is not None and of_B is not None and of_C is not None
    end = rows.stop
    gradient = block.difference.mul_(2 * outer[..., None])  # of the matrix with its skip
    if of_skip is not None:
        of_skip += gradient.diagonal(rows.start, -2, -1).sum(-1)
    if block.row_sums is not None:
        assert sides.least_sum is not None
        along = (gradient * block.matrix).sum(-1, keepdim=True) * (block.row_sums >= sides.least_sum)
        gradient = gradient.sub_(along).div_(block.row_sums.clamp(min=sides.least_sum))
    if of_scale is not None:
        assert sides.scale is not None
        of_scale[:, :end] += (gradient * block.unscaled).sum(-2)
        gradient = gradient.mul_(sides.scale[:, None, :end])
    groups, heads = of_B.shape[0], of_sums.shape[0]
    products = (gradient * block.decay).unflatten(0, (groups, heads // groups)).sum(1)  # of C B^T, (G, R, J)
    of_C[:, rows] += products @ sides.B[:, :end]
    of_B[:, :end] += products.mT @ sides.C[:, rows]
    exponents = gradient.mul_(block.unscaled)
    of_sums[:, rows] += exponents.sum(-1)
    of_sums[:, :end] -= exponents.sum(-2)
