"""Token mixing by weights that depend on positions and on no input: dense and Toeplitz matrices.

Source: masked mixers (arXiv 2409.01482; blbadger/maskedmixers@8f9515d) and Toeplitz MLP mixers (arXiv 2605.06683;
ethan-w-roland/ToeplitzMixers@6a67297). Repeats, which are recurrences, stand in `repeat_mixing.py`.

Symbols: B batch, L length, D width, H heads, P head width, N positions, k taps, K places of a history.

    y_i = sum_t shift_t( sum_{j <= i} W^t_ij x_j ) + b_i  per head,      shift_t(y)[c] = y[c + t - left]

with x the normed inputs, or their projection where there are several heads. The taps t mix neighbouring channels of a
head, not tokens: `left` is (k - 1) // 2 for dense matrices and k - 1 for the others, as in the authors' code. The
matrix of tap t and head h is `weight[t * H + h]`, (N, N) or, of a Toeplitz matrix, the N weights of its distances.

Deviations: the authors' heads have an input projection each, here one layer `in_proj` holds them all; the mask is in
the graph (theirs writes into the weights at every forward, and the optimiser moves what it hides); the expanded mixer
and the dead upper half of its matrices are not offered; nor is the use of one projection's head for all heads, which
their `MixerHead` does by mistake.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..kernels.masked_mix import masked_mix, masked_mix_step
from ..kernels.toeplitz_mix import toeplitz_mix, toeplitz_mix_step
from .cache import layer_of
from .mixing_cache import HistoryLayer
from .sequence import Sequence


class PositionMixer(nn.Module):
    """Projections, taps and bias; a subclass says what the matrices are."""

    weight: nn.Parameter

    def __init__(
        self, layer_idx: int, width: int, positions: int, *, heads: int, taps: int, left: int, projections: bool
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = heads, width // heads
        self.positions, self.taps, self.left = positions, taps, left
        self.bias = nn.Parameter(torch.empty(heads, positions))
        self.in_proj = nn.Linear(width, width) if projections else None
        self.out_proj = nn.Linear(width, width) if projections else None

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, k H, L, L) mixing matrices if asked for: of every tap those of all heads,
        each over the head's shifted channels."""
        x = hidden_states if self.in_proj is None else self.in_proj(hidden_states)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        y = self.mix(x, sequence, layer_of(past_key_values, self.layer_idx)).flatten(2)
        attention = self.hidden_attention(hidden_states, sequence) if output_attentions else None
        return y if self.out_proj is None else self.out_proj(y), attention

    def mix(self, x: Tensor, sequence: Sequence, cache: Any) -> Tensor:
        """(B, L, H, P) to (B, L, H, P), with `cache` the layer to go on from, or None."""
        raise NotImplementedError

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, k H, L, L) mixing matrices in float32 at (B, L, D) inputs, whose values do not matter."""
        raise NotImplementedError

    def over_taps(self, weights: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over the taps of `mix`, shifted along the channels.

        Args:
            weights: (k, ...), what `mix` takes for each tap.
            mix: gives (B, L, H, P) for it.
        """
        parts = [self.shifted(mix(weight), tap) for tap, weight in enumerate(weights)]
        return parts[0] if self.taps == 1 else torch.stack(parts).sum(0)

    def shifted(self, y: Tensor, tap: int) -> Tensor:
        """(..., P) shifted for a tap, zeros where channels beyond the head's would be read."""
        shift = tap - self.left
        return F.pad(y, (-shift, shift)) if shift else y


class HistoryMixer(PositionMixer):
    """A mixer that keeps all its inputs: each token weighs them anew.

    `diagonal` tokens before the last one are the first that are seen: 0, the token itself is the first.
    """

    diagonal: int = 0

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Mix (B, L, H, P) documents by one tap's matrices."""
        raise NotImplementedError

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        """(B, H, P) of the tokens at the (B) positions, the last ones of a (B, K, H, P) history."""
        raise NotImplementedError

    def entries(self, target: Tensor, source: Tensor) -> Tensor:
        """(B, k H, L, K) weights of sources for targets, at their (B, L) and (B, K) positions; not masked."""
        raise NotImplementedError

    def tap_weights(self) -> Tensor:
        """(k, H, ...) weights."""
        return self.weight.unflatten(0, (self.taps, self.num_heads))

    def mix(self, x: Tensor, sequence: Sequence, cache: HistoryLayer | None) -> Tensor:
        weights = self.tap_weights()
        # One tap: the bias is part of the op. Of several it must not be shifted.
        bias = self.bias if self.taps == 1 else None
        started = cache is not None and cache.is_initialized
        if cache is not None:
            history, positions = cache.append(x, sequence.real, self.positions)
        if cache is None or not started:
            y = self.over_taps(weights, lambda weight: self.whole(x, weight, bias, sequence.seq_idx))
            return y if bias is not None else self.with_bias(y, sequence.places())
        if x.shape[1] == 1 and sequence.real is None:
            y = self.over_taps(weights, lambda weight: self.step(history, weight, bias, positions[:, 0])[:, None])
            return y if bias is not None else self.with_bias(y, positions)
        target = positions.clamp(min=0) if cache.padded else positions[:1]
        source = torch.arange(history.shape[1], device=x.device)[None]
        matrix = self.entries(target, source).to(x.dtype)
        matrix = matrix.masked_fill((source[:, None] > target[..., None])[:, None], 0)
        matrices = matrix.unflatten(1, (self.taps, self.num_heads)).movedim(1, 0)  # (k, B or 1, H, L, K)
        columns = history.transpose(1, 2)
        y = self.over_taps(matrices, lambda matrix: (matrix @ columns).transpose(1, 2))
        return self.with_bias(y, positions)

    def with_bias(self, y: Tensor, positions: Tensor) -> Tensor:
        """(B, L, H, P) with the bias of the (B or 1, L) positions added."""
        return y + self.bias.T[positions.clamp(min=0)].to(y.dtype)[..., None]

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        places = sequence.places()
        matrix = self.entries(places, places).float()
        seen = places[:, None] <= places[..., None] - self.diagonal  # (B or 1, L, L)
        if sequence.seq_idx is not None:
            document = sequence.seq_idx
            seen = seen & (document[:, None] == document[..., None]) & (document >= 0)[:, None]
        return matrix.masked_fill(~seen[:, None], 0).expand(hidden_states.shape[0], -1, -1, -1)


class DenseMixer(HistoryMixer):
    """A free weight for each pair of positions: `weight` (k H, N, N), of which the lower triangle is used."""

    def __init__(
        self,
        layer_idx: int,
        width: int,
        positions: int,
        *,
        heads: int = 1,
        taps: int = 1,
        projections: bool = False,
        diagonal: int = 0,
    ) -> None:
        left = (taps - 1) // 2
        super().__init__(layer_idx, width, positions, heads=heads, taps=taps, left=left, projections=projections)
        self.diagonal = diagonal
        self.weight = nn.Parameter(torch.empty(taps * heads, positions, positions))

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        return masked_mix(x, weight, bias, seq_idx=seq_idx)

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        return masked_mix_step(history, weight, bias, positions)

    def tap_weights(self) -> Tensor:
        weights = super().tap_weights()
        return weights.tril(-self.diagonal) if self.diagonal else weights

    def entries(self, target: Tensor, source: Tensor) -> Tensor:
        return self.weight[:, target[:, :, None], source[:, None, :]].transpose(0, 1)


class ToeplitzMixer(HistoryMixer):
    """A weight for each distance: `weight` (k H, N), W_ij = weight[i - j]."""

    def __init__(
        self,
        layer_idx: int,
        width: int,
        positions: int,
        *,
        heads: int = 1,
        taps: int = 1,
        projections: bool = False,
        diagonal: int = 0,
    ) -> None:
        super().__init__(layer_idx, width, positions, heads=heads, taps=taps, left=taps - 1, projections=projections)
        self.diagonal = diagonal
        self.weight = nn.Parameter(torch.empty(taps * heads, positions))

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        return toeplitz_mix(x, weight, bias, seq_idx=seq_idx)

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        return toeplitz_mix_step(history, weight, bias, positions)

    def tap_weights(self) -> Tensor:
        weights = super().tap_weights()
        return F.pad(weights[..., self.diagonal :], (self.diagonal, 0)) if self.diagonal else weights

    def entries(self, target: Tensor, source: Tensor) -> Tensor:
        distance = (target[:, :, None] - source[:, None, :]).clamp(min=0)
        return self.weight[:, distance].transpose(0, 1)
