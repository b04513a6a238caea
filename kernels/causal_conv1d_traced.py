"""The convolution of :mod:`causal_conv1d` in a traced graph (:mod:`tracing`), by dense operations; symbols as there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import accumulator


def convolve_traced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of the convolution; arguments and results as in `causal_conv1d`.

    The real tokens of a row are moved to its left, so that the window of each is the K places up to it; in a window
    what is of another document counts as zero.
    """
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    past = x.new_zeros(batch, reach, channels) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    if seq_idx is None:
        line = torch.cat([past, x], dim=1)
        return _convolve(line, None, length, weight, bias, activation), _state(line[:, length:])
    real = seq_idx >= 0
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)  # columns of the real tokens, then of the others
    inputs = x.masked_fill(~real[..., None], 0).gather(1, order[..., None].expand(-1, -1, channels))
    document = seq_idx.long().gather(1, order)
    document = torch.cat([document[:, :1].expand(-1, reach), document], dim=1)
    line = torch.cat([past, inputs], dim=1)  # (B, K-1+L, D)
    y = _convolve(line, document, length, weight, bias, activation)
    rank = (real.cumsum(1) - 1).clamp(min=0)
    y = y.gather(1, rank[..., None].expand(-1, -1, channels)).masked_fill(~real[..., None], 0)
    place = real.sum(1, keepdim=True) + torch.arange(reach, device=x.device)  # the last real ones
    kept = document.gather(1, place)
    state = line.gather(1, place[..., None].expand(-1, -1, channels))
    return y, _state(state.where((kept == kept[:, -1:])[..., None], 0))


def _convolve(
    line: Tensor,
    document: Tensor | None,
    length: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """(B, L, D) of a (B, K-1+L, D) line, whose places are of the (B, K-1+L) documents."""
    reach, sums = weight.shape[1] - 1, accumulator(line)
    taps = weight.to(sums)
    y = line[:, reach : reach + length].to(sums) * taps[:, reach]
    for k in range(reach):
        part = line[:, k : k + length].to(sums)
        if document is not None:
            own = document[:, k : k + length] == document[:, reach : reach + length]
            part = part.where(own[..., None], 0)
        y = y + part * taps[:, k]
    if bias is not None:
        y = y + bias.to(sums)
    return (y if activation is None else F.silu(y)).to(line.dtype)


def _state(last: Tensor) -> Tensor:
    """(B, D, K-1) of the last (B, K-1, D) inputs."""
    return last.transpose(1, 2).contiguous()
