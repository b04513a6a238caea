"""Mamba-2: a stack of state-space dual mixers without attention or MLP.

Paper: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7; official code:
state-spaces/mamba@e9594ce, `modules/mamba2.py`. Parameter names and shapes are those of the official and of
transformers' checkpoints.

Symbols: B batch, L length, D width, E inner width, H heads, P head width, N state size, G groups, K convolution
width; z gate, x inputs, B and C input and output maps, dt step sizes, A decay rates.

Deviations from the official code: the residual is written norm -> mixer -> add (numerically equal to add -> norm
-> mixer); `D_has_hdim` and `d_ssm` are not offered. The classes are named after the mixer (SSD): transformers'
`generate`, before 5.24, hands its cache to classes with "mamba" in their name under another keyword than
`past_key_values`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..kernels.rms_norm import rms_norm
from ..kernels.ssd import ssd, ssd_matrix
from ..kernels.ssd_step import ssd_step
from .cache import layer_of
from .causal_lm import RMSNorm, ZooForCausalLM, ZooModel, ZooPreTrainedModel
from .configuration_mamba2 import ZooMamba2Config
from .sequence import Sequence


class GatedRMSNorm(nn.Module):
    """`RMSNorm(y * silu(z)) * weight`, with statistics over each group of channels."""

    def __init__(self, size: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size = group_size
        self.eps = eps

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps, z=gate, group_size=self.group_size)


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution: PyTorch's parameters, our op.

    A module that is called, so that hooks on it (offloading, say) see every use of its weights.
    """

    def __init__(self, channels: int, width: int, *, bias: bool, activation: str | None = None) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)
        self.activation = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolve along L.

        Args:
            x: (B, L, D) inputs.
            state: (B, D, K-1) the inputs before them.
            seq_idx: (B, L) document of each token, negative at padding.
            in_place: update `state`, which is then needed, in place; L must be 1 and `seq_idx` None.

        Returns:
            (B, L, D) outputs and the (B, D, K-1) state after them.
        """
        weight = self.weight[:, 0]
        if in_place:
            assert state is not None and seq_idx is None
            y = causal_conv1d_step(x[:, 0], state, weight, self.bias, activation=self.activation)
            return y[:, None], state
        y, state = causal_conv1d(
            x,
            weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            seq_idx=seq_idx,
            return_final_state=True,
        )
        return y, state


class Mamba2Mixer(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7.1)."""

    def __init__(self, config: ZooMamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = int(config.num_heads or 0), config.head_dim
        self.state_size, self.n_groups = config.state_size, config.n_groups
        self.time_step_limit = (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
        inner = config.intermediate_size
        maps = config.n_groups * config.state_size
        # rows in the order z, x, B, C, dt
        self.split = [inner, inner + 2 * maps, self.num_heads]
        self.conv_split = [inner, maps, maps]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.use_bias)
        self.conv1d = ShortConvolution(
            sum(self.conv_split), config.conv_kernel, bias=config.use_conv_bias, activation="silu"
        )
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedRMSNorm(inner, inner // config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, L) mixing matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        z, xBC, dt = self.in_proj(hidden_states).split(self.split, dim=-1)
        if _is_single_step(hidden_states, sequence, cache):
            return self.step(z, xBC, dt, cache), None

        started = bool(getattr(cache, "is_initialized", False))  # not where there is no cache
        xBC, conv_state = self.conv1d(xBC, cache.conv_state if started else None, sequence.seq_idx)
        x, B, C = xBC.split(self.conv_split, dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))  # (B, L, H, P)
        B = B.unflatten(-1, (self.n_groups, self.state_size))  # (B, L, G, N)
        C = C.unflatten(-1, (self.n_groups, self.state_size))
        A = -self.A_log.float().exp()
        y, state = ssd(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            initial_state=cache.recurrent_state if started else None,
            seq_idx=sequence.seq_idx,
            return_final_state=True,
        )
        if cache is not None:
            cache.set_states(conv_state, state, hidden_states.shape[1])
        attention = self.mixing_matrix(dt, A, B, C, sequence) if output_attentions else None
        return self.out_proj(self.norm(y.flatten(2), z)), attention

    def step(self, z: Tensor, xBC: Tensor, dt: Tensor, cache: Any) -> Tensor:
        """One token: (B, 1, ...) projections to (B, 1, D); the cache's states are updated in place."""
        xBC, _ = self.conv1d(xBC, cache.conv_state, in_place=True)
        x, B, C = xBC[:, 0].split(self.conv_split, dim=-1)
        y = ssd_step(
            cache.recurrent_state,
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt[:, 0],
            -self.A_log.float().exp(),
            B.unflatten(-1, (self.n_groups, self.state_size)),
            C.unflatten(-1, (self.n_groups, self.state_size)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
        )
        cache.columns += 1
        return self.out_proj(self.norm(y.flatten(1)[:, None], z))

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) mixing matrix for normed (B, L, D) hidden states, without the outputs."""
        _, xBC, dt = self.in_proj(hidden_states).split(self.split, dim=-1)
        xBC, _ = self.conv1d(xBC, seq_idx=sequence.seq_idx)
        _, B, C = xBC.split(self.conv_split, dim=-1)
        B = B.unflatten(-1, (self.n_groups, self.state_size))
        C = C.unflatten(-1, (self.n_groups, self.state_size))
        return self.mixing_matrix(dt, -self.A_log.float().exp(), B, C, sequence)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) logarithm of the decays for normed (B, L, D) hidden states."""
        dt = self.in_proj(hidden_states)[..., -self.num_heads :]
        steps = nn.functional.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        return -steps * self.A_log.float().exp()

    def mixing_matrix(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) hidden attention: y = M x per head, step sizes and the skip D on the diagonal included."""
        steps = nn.functional.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        matrix = ssd_matrix(steps * A, B, C, seq_idx=sequence.seq_idx) * steps.transpose(1, 2)[:, :, None, :]
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


def _is_single_step(hidden_states: Tensor, sequence: Sequence, cache: Any) -> bool:
    """Whether the in-place step may be taken: one token, a state to go on from, no padding, no gradients."""
    return (
        cache is not None
        and cache.is_initialized
        and hidden_states.shape[1] == 1
        and sequence.seq_idx is None
        and not torch.is_grad_enabled()
    )


class Mamba2Block(GradientCheckpointingLayer):
    """norm -> mixer -> add."""

    def __init__(self, config: ZooMamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))
        mixed, attention = self.mixer(normed, sequence, past_key_values, output_attentions)
        return residual + mixed, attention


def init_mamba2_mixer(mixer: Mamba2Mixer, config: ZooMamba2Config) -> None:
    """The official initialisation.

    | parameter | value |
    |---|---|
    | A_log | log of U(A_init_range) |
    | dt_bias | inverse softplus of a step size log-uniform in [time_step_min, time_step_max], at least the floor |
    | D, norm | 1 |
    | in_proj, conv1d | PyTorch's default, U(+-1 / sqrt(fan in)), conv bias too; other biases 0 |
    | out_proj | the same over sqrt(number of layers) |
    """
    low, high = (float(bound) for bound in config.A_init_range)
    rates = torch.empty_like(mixer.A_log).uniform_(low, high).clamp(min=1e-6)  # a range may start at 0
    init.copy_(mixer.A_log, rates.log())
    span = math.log(config.time_step_max) - math.log(config.time_step_min)
    dt = (torch.rand_like(mixer.dt_bias) * span + math.log(config.time_step_min)).exp()
    dt = dt.clamp(min=config.time_step_floor)
    init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))
    init.ones_(mixer.D)
    init.ones_(mixer.norm.weight)
    init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(mixer.conv1d.kernel_size[0])
    init.uniform_(mixer.conv1d.weight, -bound, bound)
    if mixer.conv1d.bias is not None:
        init.uniform_(mixer.conv1d.bias, -bound, bound)
    bound = 1 / math.sqrt(mixer.out_proj.in_features * config.num_hidden_layers)
    init.uniform_(mixer.out_proj.weight, -bound, bound)
    for projection in (mixer.in_proj, mixer.out_proj):
        if projection.bias is not None:
            init.zeros_(projection.bias)


class ZooSSDPreTrainedModel(ZooPreTrainedModel):
    """Mamba-2's configuration, blocks and initialisation."""

    config: ZooMamba2Config
    config_class = ZooMamba2Config
    _no_split_modules = ["Mamba2Block"]
    auto_classes = {"AutoModel": "ZooSSDModel", "AutoModelForCausalLM": "ZooSSDForCausalLM"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):  # after its projections, which it initialises again
            init_mamba2_mixer(module, self.config)


class ZooSSDModel(ZooSSDPreTrainedModel, ZooModel):
    """Mamba-2 without a head."""

    def make_block(self, config: ZooMamba2Config, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Mamba2Block(config, layer_idx)

    @staticmethod
    def norm_eps(config: ZooMamba2Config) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        return config.layer_norm_epsilon


class ZooSSDForCausalLM(ZooSSDPreTrainedModel, ZooForCausalLM):
    """Mamba-2 with a language-modelling head."""

    backbone_class = ZooSSDModel


__all__ = ["Mamba2Mixer", "ZooSSDForCausalLM", "ZooSSDModel", "ZooSSDPreTrainedModel"]
