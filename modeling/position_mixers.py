"""Token mixing by weights that depend on positions and on no input: dense and Toeplitz matrices.

Source: masked mixers (arXiv 2409.01482; blbadger/maskedmixers@8f9515d) and Toeplitz MLP mixers (arXiv 2605.06683;
ethan-w-roland/ToeplitzMixers@6a67297). Repeats, which are recurrences, stand in `repeat_mixing.py`.

Symbols: B batch, L length, D width, H heads, P head width, N positions, k taps, K places of a history.

    y_i = sum_t shift_t( sum_{j <= i} W^t_ij x_j ) + b_i  per head,      shift_t(y)[c] = y[c + t - left]

with x the normed inputs, or their projection where there are several heads. The taps t mix neighbouring channels of a
head, not tokens: `left` is (k - 1) // 2 for dense matrices and k - 1 for the others, as in the authors' code. The
matrix of tap t and head h is `weight[t * H + h]`, (N, N) or, of a Toeplitz matrix, the N weights of its distances.

Deviations: the authors' heads have an input projection each, here one layer `in_proj` holds them all; the mask is in
the graph (theirs writes into the weights at every forward, and the optimiser moves what it hides); the expanded mixer,
two mixings with an activation between, has square matrices (theirs may have more rows inside, which the mask leaves
unread); no head mixes the inputs of another, as those of their `MixerHead` do by mistake.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..kernels.position_mix import masked_mix, masked_mix_step, toeplitz_mix, toeplitz_mix_step
from .cache import layer_of
from .mixer_parameters import initialise_alone
from .mixing_cache import HistoryLayer
from .token_layout import Sequence


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
        """(B, L, D) to (B, L, D), and the (B, k H, L, past + L) mixing matrices if asked for: of every tap those of all
        heads, each over the head's shifted channels."""
        hidden_states = sequence.blank(hidden_states)
        x = hidden_states if self.in_proj is None else self.in_proj(hidden_states)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        attention = None
        if output_attentions:
            columns = hidden_states.new_zeros(()).expand(len(hidden_states), sequence.past + x.shape[1], 1)
            attention = self.hidden_attention(columns, sequence.whole())[:, :, sequence.past :]
        y = self.mix(x, sequence, layer_of(past_key_values, self.layer_idx)).flatten(2)
        return y if self.out_proj is None else self.out_proj(y), attention

    def initialise(self) -> None:
        """Set what is not a projection as the authors do.

        | parameter | value |
        |---|---|
        | weight and bias of a dense mixer | U(+-1 / sqrt(N k)), as of a convolution over N channels; 0 where hidden |
        | weight of others | N(0, 2 / N), bias 0 |
        | decay_value | 1 |
        """
        for weight, bias in self.stages():
            init.normal_(weight, std=math.sqrt(2 / self.positions))
            init.zeros_(bias)

    def stages(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weight and bias of each mixing."""
        return [(self.weight, self.bias)]

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

    Args:
        diagonal: how many tokens before a position the first one that it sees is: 0, it sees itself.
        inner: activation of an expanded mixer, W act(W' x + b') + b with `inner_weight` and `inner_bias`, or None.
    """

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
        inner: str | None = None,
    ) -> None:
        left = self.left_of(taps)
        super().__init__(layer_idx, width, positions, heads=heads, taps=taps, left=left, projections=projections)
        self.diagonal = diagonal
        shape = self.weight_shape(taps * heads, positions)
        self.weight = nn.Parameter(torch.empty(shape))
        self.act = None if inner is None else ACT2FN[inner]
        self.inner_weight = None if inner is None else nn.Parameter(torch.empty(shape))
        self.inner_bias = None if inner is None else nn.Parameter(torch.empty(heads, positions))
        initialise_alone(self.initialise)

    def stages(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        if self.inner_weight is None or self.inner_bias is None:
            return super().stages()
        return [*super().stages(), (self.inner_weight, self.inner_bias)]

    @staticmethod
    def left_of(taps: int) -> int:
        """Taps before the channel that they are summed into."""
        raise NotImplementedError

    @staticmethod
    def weight_shape(matrices: int, positions: int) -> tuple[int, ...]:
        """Of `weight`."""
        raise NotImplementedError

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Mix (B, L, H, P) documents by one tap's matrices."""
        raise NotImplementedError

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        """(B, H, P) of the tokens at the (B) positions, the last ones of a (B, K, H, P) history."""
        raise NotImplementedError

    def entries(self, weight: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """(B, k H, L, K) weights of sources for targets, at their (B, L) and (B, K) positions; not masked."""
        raise NotImplementedError

    def below_diagonal(self, weights: Tensor) -> Tensor:
        """The weights with zeros for the tokens that `diagonal` leaves out."""
        raise NotImplementedError

    def mix(self, x: Tensor, sequence: Sequence, cache: HistoryLayer | None) -> Tensor:
        started = cache is not None and cache.is_initialized
        positions = None if cache is None else cache.advance(x, sequence.real)
        if self.act is not None and self.inner_weight is not None and self.inner_bias is not None:
            weights = self.inner_weight, self.inner_bias
            x = self.act(self.stage(x, *weights, sequence, cache, started, positions, "inner_history"))
        return self.stage(x, self.weight, self.bias, sequence, cache, started, positions, "history")

    def stage(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        sequence: Sequence,
        cache: HistoryLayer | None,
        started: bool,
        positions: Tensor | None,
        slot: str,
    ) -> Tensor:
        """One mixing of (B, L, H, P) inputs by the matrices in `weight`, at the (B, L) positions that the cache counts,
        whose history `slot` they go into."""
        # One tap: the bias is part of the op. Of several it must not be shifted.
        fused = bias if self.taps == 1 else None
        taps = self.below_diagonal(weight.unflatten(0, (self.taps, self.num_heads)))
        if cache is not None and positions is not None:
            history = cache.append(slot, x, positions, sequence.real, self.positions)
        if cache is None or positions is None or not started:
            y = self.over_taps(taps, lambda weight: self.whole(x, weight, fused, sequence.seq_idx))
            return y if fused is not None else with_bias(y, bias, sequence.places())
        if x.shape[1] == 1 and sequence.real is None:
            y = self.over_taps(taps, lambda weight: self.step(history, weight, fused, positions[:, 0])[:, None])
            return y if fused is not None else with_bias(y, bias, positions)
        target = positions.clamp(min=0) if cache.padded else positions[:1]
        source = torch.arange(history.shape[1], device=x.device)[None]
        matrix = self.entries(weight, target, source).to(x.dtype)
        matrix = matrix.masked_fill((source[:, None] > target[..., None])[:, None], 0)
        matrices = matrix.unflatten(1, (self.taps, self.num_heads)).movedim(1, 0)  # (k, B or 1, H, L, K)
        columns = history.transpose(1, 2)
        y = self.over_taps(matrices, lambda matrix: (matrix @ columns).transpose(1, 2))
        return with_bias(y, bias, positions)

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        if self.act is not None:
            raise ValueError("output_attentions: an expanded mixer is no matrix, got True; accepted: False")
        places = sequence.places()
        matrix = self.entries(self.weight, places, places).float()
        seen = places[:, None] <= places[..., None] - self.diagonal  # (B or 1, L, L)
        if sequence.seq_idx is not None:
            document = sequence.seq_idx
            seen = seen & (document[:, None] == document[..., None]) & (document >= 0)[:, None]
        return matrix.masked_fill(~seen[:, None], 0).expand(hidden_states.shape[0], -1, -1, -1)


def with_bias(y: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """(B, L, H, P) with the (H, N) bias at the (B or 1, L) positions added."""
    return y + bias.T[positions.clamp(min=0)].to(y.dtype)[..., None]


class DenseMixer(HistoryMixer):
    """A free weight for each pair of positions: `weight` (k H, N, N), of which the lower triangle is used."""

    @staticmethod
    def left_of(taps: int) -> int:
        return (taps - 1) // 2

    @staticmethod
    def weight_shape(matrices: int, positions: int) -> tuple[int, ...]:
        return matrices, positions, positions

    def initialise(self) -> None:
        bound = (self.positions * self.taps) ** -0.5
        for weight, bias in self.stages():
            init.copy_(weight, torch.empty_like(weight).uniform_(-bound, bound).tril(-self.diagonal))
            init.uniform_(bias, -bound, bound)

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        return masked_mix(x, weight, bias, seq_idx=seq_idx)

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        return masked_mix_step(history, weight, bias, positions)

    def below_diagonal(self, weights: Tensor) -> Tensor:
        return weights.tril(-self.diagonal) if self.diagonal else weights

    def entries(self, weight: Tensor, target: Tensor, source: Tensor) -> Tensor:
        return weight[:, target[:, :, None], source[:, None, :]].transpose(0, 1)


class ToeplitzMixer(HistoryMixer):
    """A weight for each distance: `weight` (k H, N), W_ij = weight[i - j]."""

    @staticmethod
    def left_of(taps: int) -> int:
        return taps - 1

    @staticmethod
    def weight_shape(matrices: int, positions: int) -> tuple[int, ...]:
        return matrices, positions

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        return toeplitz_mix(x, weight, bias, seq_idx=seq_idx)

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        return toeplitz_mix_step(history, weight, bias, positions)

    def below_diagonal(self, weights: Tensor) -> Tensor:
        return F.pad(weights[..., self.diagonal :], (self.diagonal, 0)) if self.diagonal else weights

    def entries(self, weight: Tensor, target: Tensor, source: Tensor) -> Tensor:
        distance = (target[:, :, None] - source[:, None, :]).clamp(min=0)
        return weight[:, distance].transpose(0, 1)
