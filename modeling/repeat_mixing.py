"""Token mixing by position as a recurrence with one number for each channel: structured recurrent mixers.

Source: "Structured Recurrent Mixers" (arXiv 2605.08696; blbadger/mrm@b06563e, `mrm/repeat_main.py`).

Symbols: B batch, L length, D width, H heads, P head width, N positions, k taps; v weights, S state.

    row repeat:     S_t = l S_{t-1} + v_t x_t,    y_t = S_t + b_t             W_ij = v_j l^(i - j)
    column repeat:  S_t = l S_{t-1} + x_t,        y_t = v_t S_t + b_t         W_ij = v_i l^(i - j)

The decay is l = clip(decay_value, 0.9, 1)^(1 / c), c = max(N // 512, 1). Either is state-space duality with a state of
one number and a decay that no input changes, and is computed so: in time linear in L. Taps mix the neighbouring
channels of a head, of x in a row repeat and of S in a column repeat (`position_mixers.py`).

Deviations: `c` is at least 1 (the authors divide by 0 below N = 512); the sum of both matrices has the decay inside the
power in both (theirs divides the row matrix by c); a column repeat keeps S itself (theirs recovers it by a division by
v_t, which may be 0).
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..kernels.ssd import ssd_log_decay, ssd_matrix
from ..kernels.ssd_step import ssd_log_decay_step
from .cache import is_single_step
from .mixer_parameters import float32_parameter, initialise_alone
from .mixing_cache import StateLayer
from .position_mixers import PositionMixer
from .token_layout import Sequence

_SLOWEST, _FASTEST = 1.0, 0.9
_DECAY_CONTEXT = 512


class RepeatMixer(PositionMixer):
    """Column repeats in the first recurrences, row repeats in the others.

    `weight` (k S, N) and `decay_value` (S) are those of S recurrences: one for each head, or of the sum of both kinds
    two for each, the columns of all heads first. The weights of tap t are `weight[t * S : (t + 1) * S]`.
    """

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
        return y + self.bias.T[places].to(y.dtype)[..., None]

    def weights_at(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """(k, B or 1, L, S, 1) weights at the (B or 1, L) positions."""
        weights = self.weight.unflatten(0, (self.taps, self.recurrences))
        return weights[:, :, places].movedim(1, 3)[..., None].to(dtype)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """(B, L, S) logarithm of the decays at (B, L, ...) inputs, the same everywhere."""
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
