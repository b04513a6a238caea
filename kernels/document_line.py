"""Packed documents as rows of their own, for ops that count positions from a document's first token.

Symbols: B batch, L length of a packed row; D documents of about one length, T tokens of the longest of them.

Documents of one length or up to twice as long share a table, so that there are at most twice as many places as tokens:
with a single table, one long document among many short ones would ask for a row of its length for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class DocumentLines:
    """Where the tokens of packed rows go, and where they come from.

    Args:
        seq_idx: (B, L) integer document of each token, non-decreasing over a row's real tokens; negative at padding.

    Attributes:
        real: (B, L) tokens that belong to a document.
        sizes: (D, T) of each table.
        longest: tokens of the longest document, 0 if there is none.
        whole: every row is one document, without padding.
    """

    def __init__(self, seq_idx: Tensor) -> None:
        self.shape = seq_idx.shape
        self.real = seq_idx >= 0
        place = self.real.flatten().nonzero().squeeze(1)  # of the real tokens, in order
        row = place // self.shape[1]
        document = seq_idx.flatten()[place].long()
        first = torch.ones_like(place, dtype=torch.bool)
        first[1:] = (row.diff() != 0) | (document.diff() != 0)
        start = first.nonzero().squeeze(1)
        length = torch.diff(start, append=start.new_tensor([place.shape[0]]))
        self.longest = max(length.tolist(), default=0)
        self.whole = len(place) == seq_idx.numel() and len(start) == len(seq_idx)
        # 1, 2, 3 to 4, 5 to 8, ... tokens.
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
        self._source = torch.cat(parts) if parts else place  # token of each place of the tables, -1 for none
        held = (self._source >= 0).nonzero().squeeze(1)
        self._target = torch.full_like(seq_idx.flatten(), -1, dtype=torch.long)  # place of each token, -1 for none
        self._target[self._source[held]] = held

    def lay_out(self, x: Tensor) -> list[Tensor]:
        """(B, L, ...) tokens to (D, T, ...) documents, a table after the other; zeros behind a document's end."""
        laid = _rearrange(x.flatten(0, 1), self._source, self._target)
        parts = laid.split([documents * longest for documents, longest in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def gather_back(self, tables: list[Tensor]) -> Tensor:
        """(D, T, ...) documents to (B, L, ...) tokens; zeros at padding."""
        y = _rearrange(torch.cat([table.flatten(0, 1) for table in tables]), self._target, self._source)
        return y.unflatten(0, self.shape)


def _rearrange(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    y = _Rearrange.apply(x, source, target)
    assert isinstance(y, Tensor)  # `apply` is untyped
    return y


class _Rearrange(torch.autograd.Function):
    """y_i = x_source(i), or zero where that is negative. Nothing is taken twice, so the gradient is a gather too:
    dx_j = dy_target(j), or zero; autograd's own would add up in an order that a CUDA device does not keep.
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
