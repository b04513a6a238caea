"""Discrete Mamba-2, a state-space mixer without step sizes that can be initialised from an attention layer.

Source: Phi-Mamba of MOHAWK (arXiv 2408.10189; goombalab/phi-mamba@b2e405f, `modules/lm_head.py` and
`modules/mixers/discrete_mamba2.py`): one state-space head per attention head, a scalar decay per token and head without
a step size, a short convolution without activation that starts as the identity, and a gate that starts open.

Symbols: B batch, L length, D width, H heads, P head width, N state size, K convolution width.

Deviations from Phi-Mamba: the log-decay is passed to the op directly, not through `x / softplus(a)`; the decay has a
bias, `dt_bias`, so that it can be calibrated (0 gives Phi-Mamba); `feature_map`, `normalize` and `rotary` bring the
mixing matrix closer to softmax attention (without them it is Phi-Mamba's). The feature map "hedgehog" is learned: a
linear map of each head, and softmax over its channels and over their negatives (Hedgehog, arXiv 2402.04347; LoLCATs,
arXiv 2410.10254, `src/model/feature_map.py` of HazyResearch/lolcats). With `prefix_bidirectional` a second scan with
the same parameters runs from the end of each prefix to its start (`prefix.py`): token t has of a later token s of its
prefix the decays of t to s - 1, where the first scan has of an earlier one those of s + 1 to t.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.matrix_distance import SSDFactors
from ..kernels.ssd import ssd_log_decay, ssd_log_decay_step, ssd_matrix
from .cache import layer_of
from .layers import (
    ShortConvolution,
    hedgehog_features,
    inverse_softplus,
    make_qk_norm,
    normed_heads,
    output_bias,
    position_type,
    rotate,
)
from .mixer import (
    FromAttention,
    MixerSettings,
    TokenMixer,
    check_sizes,
    distillation,
    float32_parameter,
    initialise_alone,
    is_single_step,
    matrix_rows,
    start_from_attention,
)
from .prefix import prefix_alone
from .retention import matrix_ahead, scan_ahead
from .token_layout import Sequence

FEATURE_MAPS = ("identity", "softplus", "hedgehog")
OPEN_GATE = 1.278464542761  # silu(OPEN_GATE) = 1
_SMALLEST_ROW_SUM = 1e-6


class DiscreteMamba2Mixer(nn.Module):
    """Discrete Mamba-2: `h_t = sigmoid(-a_t) h_{t-1} + x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t + z_bias)`.

    With identity convolution, open gate, D = 0 and the projections of an attention layer this is linear attention with
    a decay; with `feature_map="softplus"` and `normalize` its rows sum to 1.
    """

    float32_parameters = ("dt_bias", "D")

    def __init__(self, config: Any, settings: "DiscreteMamba2Settings", layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, int(config.head_dim or 0)
        self.state_size = int(settings.state_size or 0)
        self.feature_map, self.normalize, self.rotary = settings.feature_map, settings.normalize, settings.rotary
        inner, states = self.num_heads * self.head_dim, self.num_heads * self.state_size
        # rows in the order x, B, C, z, a
        self.conv_split = [inner, states, states]
        self.split = [inner + 2 * states, inner, self.num_heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.attention_bias)
        self.conv1d = ShortConvolution(self.split[0], settings.conv_kernel, bias=True)
        self.z_bias = nn.Parameter(torch.empty(inner))
        self.dt_bias = float32_parameter(self.num_heads)
        self.D = float32_parameter(self.num_heads)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=output_bias(config, config.attention_bias))
        self.qk_norm, self.positions = config.qk_norm, position_type(config, layer_idx)
        self.q_norm = make_qk_norm(config, self.num_heads, self.state_size)
        self.k_norm = make_qk_norm(config, self.num_heads, self.state_size)
        self.B_features = self.C_features = None
        if self.feature_map == "hedgehog":
            self.B_features = nn.Parameter(torch.empty(self.num_heads, self.state_size, self.state_size))
            self.C_features = nn.Parameter(torch.empty(self.num_heads, self.state_size, self.state_size))
        initialise_alone(init_discrete_mamba2_mixer, self)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) mixing matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        started = bool(getattr(cache, "is_initialized", False))  # not where there is no cache
        length = hidden_states.shape[1]
        single = is_single_step(hidden_states, sequence, cache)
        hidden_states = sequence.blank(hidden_states)
        xBC, z, a = self.in_proj(hidden_states).split(self.split, dim=-1)
        xBC, conv_state = self.conv1d(xBC, cache.conv_state if started else None, sequence.seq_idx, in_place=single)
        x, B, C, log_decay = self.recurrence_inputs(xBC, a, sequence)
        row_sums = self.normalize
        if single:
            token = (each[:, 0] for each in (x, log_decay, B, C))
            found = ssd_log_decay_step(cache.recurrent_state, *token, row_sums=row_sums)
            y, *sums = (each[:, None] for each in (found if isinstance(found, tuple) else (found,)))
            cache.columns += 1
        else:
            y, *sums, state = ssd_log_decay(
                x,
                log_decay,
                B,
                C,
                initial_state=cache.recurrent_state if started else None,
                seq_idx=sequence.seq_idx,
                return_final_state=True,
                row_sums=row_sums,
            )
            if cache is not None:
                cache.set_states(conv_state, state, length)
        if sequence.prefix is not None:
            ahead = scan_ahead(x, log_decay, B, C, prefix_alone(sequence), row_sums)
            y, *sums = (own + more for own, more in zip((y, *sums), ahead, strict=True))
        if self.normalize:
            y = (y / sums[0].clamp(min=_SMALLEST_ROW_SUM)[..., None]).to(y.dtype)
        y = y + self.D.to(y.dtype)[:, None] * x
        y = y.flatten(2) * F.silu(z + self.z_bias)
        attention = matrix_rows(self.mixing_matrix, (log_decay, B, C), sequence, cache) if output_attentions else None
        return self.out_proj(y), attention

    def initialise(self) -> None:
        init_discrete_mamba2_mixer(self)

    @distillation
    @torch.no_grad()
    def set_half_lives(self, half_lives: Tensor) -> None:
        """Set the decays with which each of H heads halves its state in the given number of tokens, for input 0."""
        self.dt_bias.copy_(half_life_to_bias(half_lives))

    @distillation
    @torch.no_grad()
    def set_gates(self, weight: Tensor, bias: Tensor) -> None:
        """Set the gate of each head to about `1 + bias + weight @ hidden`, for a weight (H, D) and a bias (H).

        Where silu is 1 its slope is 1, too; far below, the gate closes.
        """
        start, inner = self.split[0], self.split[1]
        self.in_proj.weight[start : start + inner] = weight.repeat_interleave(self.head_dim, 0).to(self.in_proj.weight)
        self.z_bias.copy_(OPEN_GATE + bias.repeat_interleave(self.head_dim))

    @distillation
    @torch.no_grad()
    def start_from(self, view: Any) -> None:
        """Start from an attention layer, see `start_from_attention`. With positive features, queries are not scaled
        down: larger arguments give sharper features. The gate remains open. A soft cap of the scores is ignored."""
        query_scale = view.scaling if self.feature_map == "identity" else 1.0
        start_from_attention(self, view, first=0, query_scale=query_scale)

    def recurrence_inputs(self, xBC: Tensor, a: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the inputs of the recurrence from convolved (B, L, ...) projections and (B, L, H) decay logits.

        Returns:
            x (B, L, H, P), B and C (B, L, H, N) with norm, rotary embedding and feature map applied ("hedgehog": 2 N
            features), log-decay (B, L, H) in float32.
        """
        x, B, C = xBC.split(self.conv_split, dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = normed_heads(B, self.k_norm, self.qk_norm, self.state_size)
        C = normed_heads(C, self.q_norm, self.qk_norm, self.state_size)
        tables = sequence.rotary_tables(self.positions) if self.rotary else None
        if tables is not None:
            cos, sin = (table[:, :, None] for table in tables)
            C, B = rotate(C, cos, sin), rotate(B, cos, sin)
        if self.feature_map == "softplus":
            B, C = F.softplus(B), F.softplus(C)
        elif self.feature_map == "hedgehog":
            B, C = hedgehog_features(B, self.B_features), hedgehog_features(C, self.C_features)
        return x, B, C, -F.softplus(a.float() + self.dt_bias)

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """Return the (B, H, L, L) mixing matrix for normed (B, L, D) hidden states, without the outputs."""
        return self.matrix_factors(hidden_states, sequence).matrix(sequence.seq_idx)

    @distillation
    def matrix_factors(self, hidden_states: Tensor, sequence: Sequence) -> SSDFactors:
        """Return the factors of the mixing matrix for normed (B, L, D) hidden states."""
        xBC, _, a = self.in_proj(hidden_states).split(self.split, dim=-1)
        xBC, _ = self.conv1d(xBC, seq_idx=sequence.seq_idx)
        _, B, C, log_decay = self.recurrence_inputs(xBC, a, sequence)
        least_sum = _SMALLEST_ROW_SUM if self.normalize else None
        return SSDFactors(log_decay, B, C, skip=self.D.float(), least_sum=least_sum)

    @distillation
    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """Return the (B, L, H) log-decays for normed (B, L, D) hidden states."""
        a = self.in_proj(hidden_states)[..., -self.num_heads :]
        return -F.softplus(a.float() + self.dt_bias)

    def mixing_matrix(self, log_decay: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) hidden attention: y = M x per head, before the gate, with the skip D on the diagonal."""
        matrix = ssd_matrix(log_decay, B, C, seq_idx=sequence.seq_idx)
        if sequence.prefix is not None:
            matrix = matrix + matrix_ahead(log_decay, B, C, prefix_alone(sequence))
        if self.normalize:
            matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=_SMALLEST_ROW_SUM)
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


def init_discrete_mamba2_mixer(mixer: DiscreteMamba2Mixer) -> None:
    """Initialise discrete Mamba-2, after its linear layers.

    | parameter | value |
    |---|---|
    | conv1d | identity: last tap 1, others 0; bias 0 |
    | z rows of in_proj, z_bias | 0 and OPEN_GATE: the gate is open, whatever the input |
    | dt_bias | half-lives of 4 to 64 tokens, geometric over the heads |
    | D | 1 |
    | B_features, C_features | identity in each head |
    """
    identity = torch.zeros_like(mixer.conv1d.weight)
    identity[:, :, -1] = 1.0
    init.copy_(mixer.conv1d.weight, identity)
    assert mixer.conv1d.bias is not None
    init.zeros_(mixer.conv1d.bias)
    weight = mixer.in_proj.weight.detach().clone()
    start = mixer.split[0]
    weight[start : start + mixer.split[1]] = 0.0
    init.copy_(mixer.in_proj.weight, weight)
    init.constant_(mixer.z_bias, OPEN_GATE)
    span = torch.linspace(0.0, 1.0, mixer.num_heads, device=mixer.dt_bias.device, dtype=torch.float32)
    init.copy_(mixer.dt_bias, half_life_to_bias(4.0 * 16.0**span))
    init.ones_(mixer.D)
    for weight in (mixer.B_features, mixer.C_features):
        if weight is not None:
            init.copy_(weight, torch.eye(mixer.state_size, device=weight.device, dtype=weight.dtype).expand_as(weight))


@strict
@dataclass
class DiscreteMamba2Settings(MixerSettings):
    """Discrete Mamba-2 in `zoo_hybrid`, with the heads of attention.

    Args:
        state_size: N, state channels of a head; the width of an attention head if not given.
        conv_kernel: K, width of the short convolution, at least 2.
        feature_map: map on B and C: "identity", or with positive features "softplus" or "hedgehog" (learned).
        normalize: divide each output by its row sum, as softmax does; needs positive features.
        rotary: apply the rotary embedding to B and C, as attention does to k and q in a block that has it.
    """

    state_size: int | None = None
    conv_kernel: int = 4
    feature_map: str = "identity"
    normalize: bool = False
    rotary: bool = False

    def validate_choices(self) -> None:
        check_sizes(self, "state_size")
        check_sizes(self, "conv_kernel", least=2)
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.normalize and self.feature_map == "identity":
            raise ValueError("feature_map must be 'softplus' or 'hedgehog' with normalize=True, got 'identity'")

    def complete(self, config: Any) -> None:
        if self.state_size is None:
            self.state_size = config.head_dim

    def check(self, config: Any) -> None:
        if self.rotary and self.state_size != config.head_dim:
            raise ValueError(f"state_size must be head_dim ({config.head_dim}) with rotary=True, got {self.state_size}")


def _discrete_mamba2_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    if spec.normalize and spec.feature_map == "identity":
        raise ValueError(
            "`student.normalize` must be False with feature_map 'identity', whose row sums may be 0 or negative, got "
            "True. Set feature_map to 'softplus' or 'hedgehog'"
        )
    names = ("conv_kernel", "feature_map", "normalize", "rotary")
    return {"discrete_mamba2": {"state_size": teacher.head_dim} | {name: getattr(spec, name) for name in names}}


DISCRETE_MAMBA2 = TokenMixer(
    label="discrete Mamba-2: a state-space layer without a step size",
    make=DiscreteMamba2Mixer,
    settings=DiscreteMamba2Settings,
    prefix=True,
    student=FromAttention(
        _discrete_mamba2_keys,
        ("conv_kernel", "feature_map", "normalize", "rotary", "half_life", "calibration", "copy_projections"),
    ),
    tags=("mamba2",),
    flat={
        **{name: name for name in ("state_size", "conv_kernel", "feature_map", "normalize")},
        "ssm_rotary": "rotary",
    },
)


def half_life_to_bias(half_life: Tensor) -> Tensor:
    """Return the `dt_bias` that halves a head's state every `half_life` tokens (> 0) if its decay input is 0."""
    return inverse_softplus(math.log(2.0) / half_life)
