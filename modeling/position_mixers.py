"""Token mixing with weights that depend on positions and not on the input: dense, Toeplitz and repeat matrices.

Source: masked mixers (arXiv 2409.01482; blbadger/maskedmixers@8f9515d) and Toeplitz MLP mixers (arXiv 2605.06683;
ethan-w-roland/ToeplitzMixers@6a67297). Repeats are recurrences (:class:`RepeatMixer`).

Symbols: B batch, L length, D width, H heads, P head width, N positions, k taps, K places of a history.

    y_i = sum_t shift_t( sum_{j <= i} W^t_ij x_j ) + b_i  per head,      shift_t(y)[c] = y[c + t - left]

where x are the normed inputs, or their projection with several heads. The taps t mix neighbouring channels of a head,
not tokens: `left` is (k - 1) // 2 for dense matrices and k - 1 for the others, as in the authors' code. The matrix of
tap t and head h is `weight[t * H + h]`: (N, N), or for a Toeplitz matrix the N weights of its distances.

Deviations: one layer `in_proj` holds the input projections of all heads, which are separate layers in the authors'
code; the mask is part of the graph (theirs writes into the weights at every forward, and the optimiser moves masked
weights); the expanded mixer, two mixings with an activation between, has square matrices (theirs may have more rows
inside, which the mask hides); heads do not mix each other's inputs, which the authors' `MixerHead` does by mistake.
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
from ..kernels.ssd import ssd_log_decay, ssd_log_decay_step, ssd_matrix
from .cache import HistoryLayer, StateLayer, layer_of
from .mixer import (
    copy_output,
    distillation,
    float32_parameter,
    initialise_alone,
    is_single_step,
)
from .token_layout import Sequence


class PositionMixer(nn.Module):
    """Projections, taps and bias of a position mixer; a subclass defines the matrices."""

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
        """(B, L, D) to (B, L, D), and the (B, k H, L, past + L) mixing matrices if asked for: all heads of the first
        tap, then of the next, each over the head's shifted channels."""
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
        """Initialise what is not a projection as the authors do.

        | parameter | value |
        |---|---|
        | weight and bias of a dense mixer | U(+-1 / sqrt(N k)), as in a convolution over N channels; 0 where masked |
        | weight of others | N(0, 2 / N), bias 0 |
        | decay_value | 1 |
        """
        for weight, bias in self.stages():
            init.normal_(weight, std=math.sqrt(2 / self.positions))
            init.zeros_(bias)

    def stages(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return weight and bias of each mixing."""
        return [(self.weight, self.bias)]

    def mix(self, x: Tensor, sequence: Sequence, cache: Any) -> Tensor:
        """Mix (B, L, H, P) inputs to (B, L, H, P); `cache` is the layer to continue, or None."""
        raise NotImplementedError

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """Return the (B, k H, L, L) mixing matrices in float32; only the shape of the (B, L, D) inputs matters."""
        raise NotImplementedError

    def over_taps(self, weights: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over the taps of `mix`, shifted along the channels.

        Args:
            weights: (k, ...) arguments of `mix`, one for each tap.
            mix: computes (B, L, H, P) from one of them.
        """
        parts = [self.shifted(mix(weight), tap) for tap, weight in enumerate(weights)]
        return parts[0] if self.taps == 1 else torch.stack(parts).sum(0)

    def shifted(self, y: Tensor, tap: int) -> Tensor:
        """Shift (..., P) for a tap, with zeros for channels outside the head."""
        shift = tap - self.left
        return F.pad(y, (-shift, shift)) if shift else y


class HistoryMixer(PositionMixer):
    """A mixer that keeps all its inputs, as each token weighs them differently.

    Args:
        diagonal: distance to the nearest token that a position sees; 0: it sees itself.
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
        """Return the number of taps before the channel that they are summed into."""
        raise NotImplementedError

    @staticmethod
    def weight_shape(matrices: int, positions: int) -> tuple[int, ...]:
        """Return the shape of `weight`."""
        raise NotImplementedError

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Mix (B, L, H, P) documents with the matrices of one tap."""
        raise NotImplementedError

    def step(self, history: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        """Return (B, H, P) outputs at the (B) positions, which are the last ones of a (B, K, H, P) history."""
        raise NotImplementedError

    def entries(self, weight: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Return the unmasked (B, k H, L, K) weights between targets and sources at (B, L) and (B, K) positions."""
        raise NotImplementedError

    def below_diagonal(self, weights: Tensor) -> Tensor:
        """Set the weights of tokens that `diagonal` excludes to zero."""
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
        """Mix (B, L, H, P) inputs once, and append them to the history `slot` of the cache at the (B, L) positions."""
        # With one tap the bias is part of the op. With several it must not be shifted.
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
            raise ValueError("output_attentions must be False for an expanded mixer, which is not a matrix, got True")
        places = sequence.places()
        matrix = self.entries(self.weight, places, places).float()
        seen = places[:, None] <= places[..., None] - self.diagonal  # (B or 1, L, L)
        if sequence.seq_idx is not None:
            document = sequence.seq_idx
            seen = seen & (document[:, None] == document[..., None]) & (document >= 0)[:, None]
        return matrix.masked_fill(~seen[:, None], 0).expand(hidden_states.shape[0], -1, -1, -1)


def with_bias(y: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Add the (H, N) bias at the (B or 1, L) positions to (B, L, H, P)."""
    return y + bias.T[positions.clamp(min=0)].to(y.dtype)[..., None]


class DenseMixer(HistoryMixer):
    """A mixer with a weight for each pair of positions: `weight` (k H, N, N), whose lower triangle is used."""

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

    @torch.no_grad()
    def set_average_attention(self, matrix: Tensor) -> None:
        """Set the weights to the (H, N, N) mean attention of a layer, and the bias to 0.

        Raises:
            ValueError: if the mixer has other sizes or more than one tap.
        """
        if self.taps != 1 or self.weight.shape != matrix.shape:
            raise ValueError(
                f"the student's mixer must have the shape (heads, positions, positions) = {tuple(matrix.shape)} of the "
                f"average attention, and 1 tap; got {tuple(self.weight.shape)} and {self.taps} taps"
            )
        self.weight.copy_(matrix)
        self.bias.zero_()

    @distillation
    @torch.no_grad()
    def start_from(self, view: Any) -> None:
        """Copy projections of an attention layer: v to in_proj, with each key-value head repeated, o to out_proj.

        Raises:
            ValueError: if the mixer has no projections, or other heads.
        """
        sizes = (view.num_heads, view.head_dim)
        if self.in_proj is None or self.out_proj is None or (self.num_heads, self.head_dim) != sizes:
            raise ValueError(
                f"the student's mixer must have the attention's {sizes[0]} heads of {sizes[1]} channels, and "
                f"projections, to copy them; got {self.num_heads} heads of {self.head_dim} channels, "
                f"{'no' if self.in_proj is None else 'with'} projections"
            )
        self.in_proj.weight.copy_(view.expand_heads(view.v))
        self.in_proj.bias.copy_(view.expand_heads(view.v_bias) if view.v_bias is not None else torch.zeros(()))
        copy_output(self.out_proj, view)

    def entries(self, weight: Tensor, target: Tensor, source: Tensor) -> Tensor:
        return weight[:, target[:, :, None], source[:, None, :]].transpose(0, 1)


class ToeplitzMixer(HistoryMixer):
    """A mixer with a weight for each distance: `weight` (k H, N), W_ij = weight[i - j]."""

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


_SLOWEST, _FASTEST = 1.0, 0.9
_DECAY_CONTEXT = 512


class RepeatMixer(PositionMixer):
    """Mixing as a recurrence with one number for each channel; column repeats come first, then row repeats.

    Source: "Structured Recurrent Mixers" (arXiv 2605.08696; blbadger/mrm@b06563e, `mrm/repeat_main.py`). With the
    weights v and the state S:

        row repeat:     S_t = l S_{t-1} + v_t x_t,    y_t = S_t + b_t             W_ij = v_j l^(i - j)
        column repeat:  S_t = l S_{t-1} + x_t,        y_t = v_t S_t + b_t         W_ij = v_i l^(i - j)

    The decay is l = clip(decay_value, 0.9, 1)^(1 / c), c = max(N // 512, 1). Both are state-space duality with a state
    of one number and a decay that does not depend on the input, and are computed as such, in time linear in L. Taps mix
    neighbouring channels of a head: of x in a row repeat, of S in a column repeat.

    Deviations: `c` is at least 1 (the authors divide by 0 below N = 512); the sum of both matrices has the decay inside
    the power in both (theirs divides the row matrix by c); a column repeat keeps S itself (theirs recovers it by a
    division by v_t, which may be 0).

    `weight` (k S, N) and `decay_value` (S) belong to S recurrences: one for each head or, in the sum of both kinds, two
    for each, the columns of all heads first. The weights of tap t are `weight[t * S : (t + 1) * S]`.
    """

    float32_parameters = ("decay_value",)

    def __init__(
        self,
        layer_idx: int,
        width: int,
        positions: int,
        *,
        kind: str,
        heads: int = 1,
        taps: int = 1,
        projections: bool = False,
        decay: bool = True,
    ) -> None:
        super().__init__(layer_idx, width, positions, heads=heads, taps=taps, left=taps - 1, projections=projections)
        self.combined = kind == "combined_repeat"
        self.columns = {"row_repeat": 0, "mixed_repeat": heads // 2}.get(kind, heads)
        self.recurrences = 2 * heads if self.combined else heads
        self.weight = nn.Parameter(torch.empty(taps * self.recurrences, positions))
        self.decay_value = float32_parameter(self.recurrences) if decay else None
        initialise_alone(self.initialise)

    def initialise(self) -> None:
        super().initialise()
        if self.decay_value is not None:
            init.ones_(self.decay_value)

    def mix(self, x: Tensor, sequence: Sequence, cache: StateLayer | None) -> Tensor:
        batch, length = x.shape[:2]
        state = None if cache is None else cache.recurrent_state
        single = is_single_step(x, sequence, cache)
        places = sequence.places() if cache is None else cache.advance(x, sequence.real).clamp(min=0)
        weights = self.weights_at(places, x.dtype)
        column, row = slice(0, self.columns), slice(self.columns, None)
        inputs = torch.cat([x, x], dim=2) if self.combined else x
        if self.columns < self.recurrences:
            mixed = self.over_taps(weights[:, :, :, row], lambda weight: inputs[:, :, row] * weight)
            inputs = torch.cat([inputs[:, :, column], mixed], dim=2)
        log_decay = self.log_decay(x)
        ones = x.new_ones(batch, length, 1, 1)
        if single and state is not None:
            y = ssd_log_decay_step(state, inputs[:, 0], log_decay[:, 0], ones[:, 0], ones[:, 0])[:, None]
        else:
            y, state = ssd_log_decay(
                inputs,
                log_decay,
                ones,
                ones,
                initial_state=state,
                seq_idx=sequence.seq_idx,
                return_final_state=True,
            )
            if cache is not None:
                cache.recurrent_state = state
        if self.columns:
            scaled = self.over_taps(weights[:, :, :, column], lambda weight: y[:, :, column] * weight)
            y = torch.cat([scaled, y[:, :, row]], dim=2)
        if self.combined:
            y = y[:, :, : self.num_heads] + y[:, :, self.num_heads :]
        return with_bias(y, self.bias, places)

    def weights_at(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the (k, B or 1, L, S, 1) weights at the (B or 1, L) positions."""
        weights = self.weight.unflatten(0, (self.taps, self.recurrences))
        return weights[:, :, places].movedim(1, 3)[..., None].to(dtype)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """Return the (B, L, S) log-decays for (B, L, ...) inputs, the same at every token."""
        shape = (*hidden_states.shape[:2], self.recurrences)
        if self.decay_value is None:
            return torch.zeros(shape, device=hidden_states.device)
        stretch = max(self.positions // _DECAY_CONTEXT, 1)
        return (self.decay_value.clamp(_FASTEST, _SLOWEST).log() / stretch).expand(shape)

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        places = sequence.places()
        weights = self.weights_at(places, self.weight.dtype)
        log_decay = self.log_decay(places[..., None])
        matrices = []
        for weight in weights:  # (B or 1, L, S, 1)
            ones = torch.ones_like(weight)
            target = torch.cat([weight[:, :, : self.columns], ones[:, :, self.columns :]], dim=2)
            source = torch.cat([ones[:, :, : self.columns], weight[:, :, self.columns :]], dim=2)
            matrix = ssd_matrix(log_decay, source, target, seq_idx=sequence.seq_idx)
            if self.combined:
                matrix = matrix[:, : self.num_heads] + matrix[:, self.num_heads :]
            matrices.append(matrix)
        return torch.cat(matrices, dim=1).float().expand(hidden_states.shape[0], -1, -1, -1)
