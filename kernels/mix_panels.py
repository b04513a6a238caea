"""The torch path of the mixing of positions: products of panels of rows, each as long as its last row.

Symbols: B batch, L length, H heads, P head width, N positions that there are weights for; T rows of a panel.

Of the (L, L) weights of a head, panel by panel, only the columns up to the panel's last row are multiplied: half of
all, and T / 2 more a row. No (L, L) copy with zeros above the diagonal is made, forward or backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import accumulator

# Rows of a panel of short rows of the batch; twice as many from that length on.
_PANEL, _LONG = 128, 1024


class DenseWeights:
    """A head's weights for positions, and their gradient, by panel.

    Args:
        weight: (N, N).
        length: L.
    """

    def __init__(self, weight: Tensor, length: int) -> None:
        self.weight = weight
        self.length = length

    def rows(self, first: int, last: int) -> Tensor:
        """(T, last) what the rows from `first` to before `last` give to the columns up to them."""
        return self.weight[first:last, :last].tril(first)

    def columns(self, first: int, last: int) -> Tensor:
        """(T, L - first) what the columns from `first` to before `last` get from the rows from `first` on."""
        return self.weight[first : self.length, first:last].tril().T

    def sums(self, gradient: Tensor) -> Tensor:
        """What gradients of panels are added up in, zeros; `gradient` is where the weights' goes, and zero."""
        return gradient

    def panel_of(self, sums: Tensor, first: int, last: int) -> Tensor:
        """The part of them that belongs to `rows(first, last)`, a view."""
        return sums[first:last, :last]

    def finish(self, sums: Tensor, gradient: Tensor) -> None:
        """Make the weights' gradient of what was added up, panels that have a triangle above the diagonal too."""
        for first, last in _panels(self.length):
            gradient[first:last, first:last].tril_()


class ToeplitzWeights:
    """The same of weights that depend on the distance alone: all panels are views of one, of its last columns.

    Args:
        weight: (N) by distance.
        length: L.
    """

    def __init__(self, weight: Tensor, length: int) -> None:
        self.weight = weight
        self.length = length
        self.height = min(_height(length), length)
        self.width = -(-length // self.height) * self.height
        row = torch.arange(self.height, device=weight.device)[:, None]
        # Of the last panel, whose last row has the distance 0 in the last column.
        distance = self.width - self.height + row - torch.arange(self.width, device=weight.device)
        outside = (distance < 0) | (distance >= length)
        self.panel = weight[distance.clamp(0, length - 1)].masked_fill_(outside, 0)
        self.turned = self.panel.flip(0, 1)

    def rows(self, first: int, last: int) -> Tensor:
        return self.panel_of(self.panel, first, last)

    def columns(self, first: int, last: int) -> Tensor:
        return self.turned[: last - first, : self.length - first]

    def sums(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(self.panel)

    def panel_of(self, sums: Tensor, first: int, last: int) -> Tensor:
        begin = self.width - self.height - first
        return sums[: last - first, begin : begin + last]

    def finish(self, sums: Tensor, gradient: Tensor) -> None:
        """Sums over diagonals: with every row shifted by one more than the row above they are columns."""
        shifted = F.pad(sums, (self.height, 0)).flatten()
        by_column = F.pad(shifted, (0, self.height)).view(self.height, -1).sum(0)
        gradient[: self.length] = by_column[self.width - self.length + 1 : self.width + 1].flip(0)


def mix_panels(
    x: Tensor, weight: Tensor, bias: Tensor | None, weights: type[DenseWeights] | type[ToeplitzWeights]
) -> Tensor:
    """The mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N, N) or (H, N), N >= L.
        bias: (H, N), None for none.
        weights: how those of a head are read.

    Returns:
        (B, L, H, P) in float32, or float64 for float64 inputs.
    """
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen; autocast would round the products
        y = _Panels.apply(x, weight, bias, weights)
    assert isinstance(y, Tensor)  # `apply` is untyped
    return y


class _Panels(torch.autograd.Function):
    """Keeps its inputs only.

    Backward: dx_j = sum_{i >= j} W_ij dy_i,  dW_ij = sum over rows and features of dy_i x_j for j <= i,
    db_i = sum of dy_i.

    Measured on 1 CPU core, fp32, torch 2.13, H = 1, P = 1024, milliseconds of processor time, forward / forward +
    backward, fastest of 5; dense is one product with tril(W), made in the graph, and its gradient:
        B, L              1, 512       8, 512       1, 1024      1, 2048
        dense             12 / 28      100 / 255    32 / 109     118 / 382
        panels of 64      6.7 / 22     53 / 187     25 / 74      85 / 297
        panels of 128     6.2 / 20     52 / 146     20 / 85      79 / 265
        panels of 256     7.2 / 23     53 / 149     23 / 67      95 / 244
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weights: type[DenseWeights] | type[ToeplitzWeights]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.weights = weights
        B, L, H, P = x.shape
        u = x.to(accumulator(x))
        y = u.new_empty(B, L, H, P)
        for h in range(H):
            of_head = weights(weight[h].to(u.dtype), L)
            for first, last in _panels(L):
                panel = of_head.rows(first, last).expand(B, -1, -1)
                torch.bmm(panel, u[:, :last, h], out=y[:, first:last, h])
        if bias is not None:
            y += bias[:, :L].T[..., None]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = gradients[0]
        B, L, H, _ = x.shape
        u = x.to(dy.dtype)
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(weight, dtype=dy.dtype) if needs_weight else None
        for h in range(H):
            of_head = ctx.weights(weight[h].to(dy.dtype), L)
            sums = None if dweight is None else of_head.sums(dweight[h])
            for first, last in _panels(L):
                if needs_x:
                    panel = of_head.columns(first, last).expand(B, -1, -1)
                    torch.bmm(panel, dy[:, first:, h], out=dx[:, first:last, h])
                if sums is not None:
                    part = of_head.panel_of(sums, first, last)
                    for row in range(B):
                        part.addmm_(dy[row, first:last, h], u[row, :last, h].T)
            if dweight is not None:
                of_head.finish(sums, dweight[h])
        dbias = None
        if needs_bias:
            dbias = torch.zeros_like(bias)
            dbias[:, :L] = dy.sum((0, 3)).T
        return dx.to(x.dtype) if needs_x else None, None if dweight is None else dweight.to(weight.dtype), dbias, None


def _panels(length: int) -> list[tuple[int, int]]:
    """First row of each panel, and the row after its last."""
    height = _height(length)
    return [(first, min(first + height, length)) for first in range(0, length, height)]


def _height(length: int) -> int:
    return _PANEL if length < _LONG else 2 * _PANEL
