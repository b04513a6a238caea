"""The torch path of the mixing of positions: panels of weights, Fourier transforms, and packed documents as rows.

Symbols: B batch, L length, H heads, P head width, N positions with weights, T rows of a panel.

Panels: the (L, L) weights of a head are cut into panels of T rows, each multiplied up to the column of its last row.
That is half of all products, plus T / 2 per row, without a copy of the weights with zeros above the diagonal.

Fourier transforms serve `toeplitz_mix` on long rows. They have n >= 2 L - 1 points, so that nothing wraps around into
the part that is used. The rounding error of a transform is relative to its largest term, so the last bits of an output
may depend on later tokens.

Packed documents become separate rows, because positions count from the first token of a document. D documents whose
lengths T differ by at most a factor of two share a table, so that padding at most doubles the number of tokens. In a
single table, every document would be padded to the length of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import accumulator, without_autocast

# Rows per panel of sequences shorter than _LONG; twice as many for longer ones.
_PANEL, _LONG = 128, 1024


class DenseWeights:
    """Panels of the weights of a head, and of their gradient.

    Args:
        weight: (N, N) weights.
        length: L.
    """

    def __init__(self, weight: Tensor, length: int) -> None:
        self.weight = weight
        self.length = length

    def rows(self, first: int, last: int) -> Tensor:
        """Return the (T, last) weights of rows `first` to `last - 1`, zero above the diagonal."""
        return self.weight[first:last, :last].tril(first)

    def columns(self, first: int, last: int) -> Tensor:
        """Return the transposed (T, L - first) weights of columns `first` to `last - 1`, rows from `first` on."""
        return self.weight[first : self.length, first:last].tril().T

    def sums(self, gradient: Tensor) -> Tensor:
        """Return a zeroed buffer for accumulating per-panel gradients; `gradient` is the zeroed output tensor."""
        return gradient

    def panel_of(self, sums: Tensor, first: int, last: int) -> Tensor:
        """Return the view of the buffer for the gradient of `rows(first, last)`."""
        return sums[first:last, :last]

    def finish(self, sums: Tensor, gradient: Tensor) -> None:
        """Write the gradient of the weights, without the triangles above the diagonal that panels include."""
        for first, last in _panels(self.length):
            gradient[first:last, first:last].tril_()


class ToeplitzWeights:
    """Panels of the weights of a head by distance, as views of the last panel; methods of :class:`DenseWeights`.

    Args:
        weight: (N) weights by distance.
        length: L.
    """

    def __init__(self, weight: Tensor, length: int) -> None:
        self.weight = weight
        self.length = length
        self.height = min(_height(length), length)
        self.width = -(-length // self.height) * self.height
        row = torch.arange(self.height, device=weight.device)[:, None]
        # Distances of the last panel, whose last row has distance 0 in the last column.
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
        """Sum over diagonals, which become columns if every row is shifted by one more than the previous one."""
        shifted = F.pad(sums, (self.height, 0)).flatten()
        by_column = F.pad(shifted, (0, self.height)).view(self.height, -1).sum(0)
        gradient[: self.length] = by_column[self.width - self.length + 1 : self.width + 1].flip(0)


def mix_panels(
    x: Tensor, weight: Tensor, bias: Tensor | None, weights: type[DenseWeights] | type[ToeplitzWeights]
) -> Tensor:
    """Return the mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N, N) or (H, N) weights, N >= L.
        bias: (H, N) bias or None.
        weights: class that reads the weights of a head.

    Returns:
        (B, L, H, P) in float32, or float64 for float64 inputs.
    """
    with without_autocast(x):
        y: Any = _Panels.apply(x, weight, bias, weights)
    return y


class _Panels(torch.autograd.Function):
    """Product with panels of weights; saves its inputs only.

    Backward: dx_j = sum_{i >= j} W_ij dy_i,  dW_ij = sum over rows and features of dy_i x_j for j <= i,
    db_i = sum of dy_i.

    Measured on 1 CPU core, fp32, torch 2.13, H = 1, P = 1024, milliseconds of processor time, forward / forward +
    backward, fastest of 5; "dense" is a product with tril(W), computed in the graph, and its gradient:
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
    """Return the first row of each panel, and the row after its last."""
    height = _height(length)
    return [(first, min(first + height, length)) for first in range(0, length, height)]


def _height(length: int) -> int:
    return _PANEL if length < _LONG else 2 * _PANEL


# Features per transform, so that spectra fit the cache. Measured as for `position_mix._TRANSFORM_FROM` at L = 1024,
# forward and backward take 47 ms; with 256 features 53 ms, with all 1024 features 96 ms.
_FEATURES = 64


def mix_fourier(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mixture of every token, differentiable.

    Args:
        x: (B, L, H, P) inputs.
        weight: (H, N) weights by distance, N >= L.
        bias: (H, N) bias or None.

    Returns:
        (B, L, H, P) in float32, or float64 for float64 inputs.
    """
    y: Any = _Fourier.apply(x, weight)
    return y if bias is None else y + bias[:, : x.shape[1]].T[..., None].to(y.dtype)


class _Fourier(torch.autograd.Function):
    """y = F^-1(F(w) F(x)) for every feature and row; saves its inputs only.

    Backward: dx = F^-1(F(w)* F(dy)),  dw = F^-1(sum of F(x)* F(dy) over features and rows).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        points, spectrum = _spectrum(weight, x)
        y = torch.empty(x.shape, dtype=accumulator(x), device=x.device)
        for b, h, part in _parts(x):
            product = _transform(x[b, :, h, part], points).mul_(spectrum[:, h, None])
            y[b, :, h, part] = _back(product, x.shape[1], points)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dy = gradients[0]
        L = x.shape[1]
        points, spectrum = _spectrum(weight, x)
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_x else None
        sums = torch.zeros_like(spectrum)
        for b, h, part in _parts(x):
            cotangent = _transform(dy[b, :, h, part], points)
            if needs_weight:
                sums[:, h] += _transform(x[b, :, h, part], points).conj().mul(cotangent).sum(1)
            if dx is not None:
                dx[b, :, h, part] = _back(cotangent.mul_(spectrum[:, h, None].conj()), L, points)
        dweight = None
        if needs_weight:
            dweight = torch.zeros_like(weight)
            dweight[:, :L] = _back(sums, L, points).T
        return None if dx is None else dx.to(x.dtype), dweight


def _parts(x: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield row, head and features of each transform."""
    B, _, H, P = x.shape
    for b in range(B):
        for h in range(H):
            for first in range(0, P, _FEATURES):
                yield b, h, slice(first, first + _FEATURES)


def _spectrum(weight: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """Return n, the smallest sufficient 4, 5, 6 or 7 times a power of two, and the (n / 2 + 1, H) weight spectrum."""
    L = x.shape[1]
    step = 1 << max((2 * L - 1).bit_length() - 3, 1)
    points = -(-(2 * L - 1) // step) * step
    return points, _transform(weight[:, :L].T.to(accumulator(x)), points)


def _transform(x: Tensor, points: int) -> Tensor:
    """Return the (n / 2 + 1, C) spectrum of (L, C) values in float32 or float64."""
    return torch.fft.rfft(x.to(accumulator(x)), points, dim=0)


def _back(spectrum: Tensor, length: int, points: int) -> Tensor:
    return torch.fft.irfft(spectrum, points, dim=0)[:length]


class DocumentLines:
    """Mapping between the tokens of packed rows and tables with one document per row.

    Args:
        seq_idx: (B, L) integer document of each token, non-decreasing over a row's real tokens; negative at padding.

    Attributes:
        real: (B, L) mask of tokens that belong to a document.
        sizes: (D, T) size of each table.
        longest: length of the longest document, 0 if there is none.
        whole: whether every row is one document without padding.
    """

    def __init__(self, seq_idx: Tensor) -> None:
        self.shape = seq_idx.shape
        self.real = seq_idx >= 0
        place = self.real.flatten().nonzero().squeeze(1)  # indices of the real tokens
        row = place // self.shape[1]
        document = seq_idx.flatten()[place].long()
        first = torch.ones_like(place, dtype=torch.bool)
        first[1:] = (row.diff() != 0) | (document.diff() != 0)
        start = first.nonzero().squeeze(1)
        length = torch.diff(start, append=start.new_tensor([place.shape[0]]))
        self.longest = max(length.tolist(), default=0)
        self.whole = len(place) == seq_idx.numel() and len(start) == len(seq_idx)
        # Documents of 1, 2, 3 to 4, 5 to 8, ... tokens share a table.
        kind = torch.tensor([(n - 1).bit_length() for n in length.tolist()], dtype=torch.long, device=start.device)
        self.sizes: list[tuple[int, int]] = []
        parts = []
        for one in kind.unique().tolist():
            mine = (kind == one).nonzero().squeeze(1)
            longest = int(length[mine].max())
            offset = torch.arange(longest, device=start.device)
            inside = offset < length[mine, None]
            token = (start[mine, None] + offset).clamp(max=place.shape[0] - 1)
            parts.append(place[token].masked_fill(~inside, -1).flatten())
            self.sizes.append((len(mine), longest))
        self._source = torch.cat(parts) if parts else place  # token at each place of the tables, or -1
        held = (self._source >= 0).nonzero().squeeze(1)
        self._target = torch.full_like(seq_idx.flatten(), -1, dtype=torch.long)  # place of each token, or -1
        self._target[self._source[held]] = held

    def lay_out(self, x: Tensor) -> list[Tensor]:
        """Return the (B, L, ...) tokens as tables of (D, T, ...) documents, padded with zeros."""
        laid = _rearrange(x.flatten(0, 1), self._source, self._target)
        parts = laid.split([documents * longest for documents, longest in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def gather_back(self, tables: list[Tensor]) -> Tensor:
        """Return the tables of (D, T, ...) documents as (B, L, ...) tokens, with zeros at padding."""
        y = _rearrange(torch.cat([table.flatten(0, 1) for table in tables]), self._target, self._source)
        return y.unflatten(0, self.shape)


def _rearrange(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    y: Any = _Rearrange.apply(x, source, target)
    return y


class _Rearrange(torch.autograd.Function):
    """y_i = x_source(i), or zero for negative sources.

    No element is read twice, so the gradient is also a gather: dx_j = dy_target(j), or zero. Autograd's own gradient
    would sum in no fixed order on CUDA devices.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return _take(x, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (target,) = ctx.saved_tensors
        return _take(gradients[0], target), None, None


def _take(x: Tensor, source: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros(source.shape[0], *x.shape[1:])
    taken = x.index_select(0, source.clamp(min=0))
    return taken.masked_fill_((source < 0).view(-1, *[1] * (x.dim() - 1)), 0)
