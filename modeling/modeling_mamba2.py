"""Mamba-2: a stack of state-space dual mixers without attention or MLP.

Paper: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7; official code:
state-spaces/mamba@e9594ce, `modules/mamba2.py`. Parameter names and shapes are those of the official and of
transformers' checkpoints.

Symbols: B batch, L length, D width, E inner width, H heads, P head width, N state size, G groups, K convolution
width; z gate, x inputs, B and C input and output maps, dt step sizes, A decay rates.

An encoder (`bidirectional`) scans every document a second time, from its end, with its own convolution, decay rates,
step size bias and skip (`reverse`). Both directions share `in_proj`, the gate, the norm and `out_proj`, which hold
nearly all parameters; the outputs of the two scans are added before the gate. Caduceus's BiMamba (arXiv 2403.03234;
kuleshov-group/caduceus@0d7fae1) is the same but adds after `out_proj`, Vision Mamba (arXiv 2401.09417) just before it.
A causal checkpoint loads into an encoder; only `reverse` is new. With `prefix_bidirectional` the second scan is over
prefixes only, and the rest is causal (`prefix.py`). A causal checkpoint would not load into Hydra's block (arXiv
2407.09941; goombalab/hydra@0daa208), which has a centred convolution and projects B, C and dt for each direction.

Deviations from the official code: the residual is written norm -> mixer -> add (numerically equal to add -> norm
-> mixer); `D_has_hdim` and `d_ssm` are not offered.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.mamba2_step import mamba2_step
from ..kernels.matrix_distance import SSDFactors
from ..kernels.rms_norm import rms_norm
from ..kernels.ssd import ssd, ssd_matrix
from .backbone import ZooModel
from .cache import layer_of
from .configuration_mamba2 import ZooMamba2Config
from .heads import ZooForCausalLM, ZooForMaskedLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import MixerBlock, ShortConvolution, init_short_convolution, init_step_bias, inverse_softplus
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
    scan_both_ways,
    start_from_attention,
)
from .pretrained import ZooPreTrainedModel
from .token_layout import Sequence


class GatedRMSNorm(nn.Module):
    """`RMSNorm(y * silu(z)) * weight`, with statistics over each group of channels."""

    def __init__(self, size: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size = group_size
        self.eps = eps

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps, z=gate, group_size=self.group_size)


class Mamba2Scan(nn.Module):
    """One direction of the mixer: convolution, decay rates, step size bias and skip."""

    float32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, config: ZooMamba2Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = int(config.num_heads or 0), config.head_dim
        self.state_size, self.n_groups = config.state_size, config.n_groups
        self.time_step_limit = (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
        states = config.n_groups * config.state_size
        self.conv_split = [config.intermediate_size, states, states]
        self.conv1d = ShortConvolution(
            sum(self.conv_split), config.conv_kernel, bias=config.use_conv_bias, activation="silu"
        )
        self.dt_bias = float32_parameter(self.num_heads)
        self.A_log = float32_parameter(self.num_heads)
        self.D = float32_parameter(self.num_heads)
        initialise_alone(init_mamba2_scan, self, config)

    def initialise(self) -> None:
        init_mamba2_scan(self, self.config)

    def scan(
        self, xBC: Tensor, dt: Tensor, sequence: Sequence, cache: Any = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, ...) projections to (B, L, E) outputs before gate and norm, and the matrix if asked for."""
        started = bool(getattr(cache, "is_initialized", False))  # not where there is no cache
        xBC, conv_state = self.conv1d(xBC, cache.conv_state if started else None, sequence.seq_idx)
        x, B, C = self.recurrence_inputs(xBC)
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
            cache.set_states(conv_state, state, xBC.shape[1])
        attention = None
        if output_attentions:
            attention = matrix_rows(
                lambda dt, B, C, whole: self.mixing_matrix(dt, A, B, C, whole), (dt, B, C), sequence, cache
            )
        return y.flatten(2), attention

    def recurrence_inputs(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split convolved projections into x (B, L, H, P), B and C (B, L, G, N)."""
        x, B, C = xBC.split(self.conv_split, dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = B.unflatten(-1, (self.n_groups, self.state_size))
        C = C.unflatten(-1, (self.n_groups, self.state_size))
        return x, B, C

    def mixing_matrix(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) hidden attention: y = M x per head, step sizes and the skip D on the diagonal included."""
        steps = nn.functional.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        matrix = ssd_matrix(steps * A, B, C, seq_idx=sequence.seq_idx) * steps.transpose(1, 2)[:, :, None, :]
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


class Mamba2Mixer(Mamba2Scan):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7.1), in one direction or, in an encoder, in both."""

    def __init__(self, config: ZooMamba2Config, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        inner = config.intermediate_size
        # rows in the order z, x, B, C, dt
        self.split = [inner, sum(self.conv_split), self.num_heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.use_bias)
        self.norm = GatedRMSNorm(inner, inner // config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.reverse = Mamba2Scan(config) if config.bidirectional or config.prefix_bidirectional else None
        initialise_alone(_init_projections, self, config)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) mixing matrix if asked for.

        With both directions, of the text or of prefixes, the matrix has 2 H heads: first the heads that look back, then
        those that look ahead, each over the outputs of its direction's convolution.
        """
        cache = layer_of(past_key_values, self.layer_idx)
        hidden_states = sequence.blank(hidden_states)
        z, xBC, dt = self.in_proj(hidden_states).split(self.split, dim=-1)
        if not output_attentions and is_single_step(hidden_states, sequence, cache):
            return self.step(z, xBC, dt, cache), None
        y, attention = scan_both_ways(self, self.reverse, (xBC, dt), sequence, cache, output_attentions)
        return self.out_proj(self.norm(y, z)), attention

    def initialise(self) -> None:
        init_mamba2_mixer(self, self.config)

    @distillation
    @torch.no_grad()
    def set_half_lives(self, half_lives: Tensor) -> None:
        """Set A = -1 and the step sizes with which each of H heads halves its state in the given number of tokens."""
        self.A_log.zero_()
        self.dt_bias.copy_(inverse_softplus(math.log(2.0) / half_lives))

    @distillation
    @torch.no_grad()
    def start_from(self, view: Any) -> None:
        """Start from an attention layer, see `start_from_attention`. The gate keeps its random projection, since it has
        no bias that could hold it open."""
        start_from_attention(self, view, first=self.split[0], query_scale=view.scaling)

    def step(self, z: Tensor, xBC: Tensor, dt: Tensor, cache: Any) -> Tensor:
        """Process one token: (B, 1, ...) projections to (B, 1, D); the states in the cache are updated in place."""

        def step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
            return mamba2_step(
                x,
                state,
                cache.recurrent_state,
                dt[:, 0],
                weight,
                bias,
                self.A_log,
                D=self.D,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                dt_limit=self.time_step_limit,
                arrivals=cache.step_counts(self.n_groups),
            )

        y, _ = self.conv1d(xBC, cache.conv_state, in_place=True, step=step)
        cache.columns += 1
        return self.out_proj(self.norm(y.flatten(2), z))

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """Return the causal (B, H, L, L) mixing matrix for normed (B, L, D) hidden states, without the outputs."""
        return self.matrix_factors(hidden_states, sequence).matrix(sequence.seq_idx)

    @distillation
    def matrix_factors(self, hidden_states: Tensor, sequence: Sequence) -> SSDFactors:
        """Return the factors of the causal mixing matrix for normed (B, L, D) hidden states."""
        _, xBC, dt = self.in_proj(hidden_states).split(self.split, dim=-1)
        xBC, _ = self.conv1d(xBC, seq_idx=sequence.seq_idx)
        _, B, C = self.recurrence_inputs(xBC)
        steps = nn.functional.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        return SSDFactors(steps * -self.A_log.float().exp(), B, C, scale=steps, skip=self.D.float())

    @distillation
    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """Return the (B, L, H) log-decays for normed (B, L, D) hidden states, of the causal direction."""
        dt = self.in_proj(hidden_states)[..., -self.num_heads :]
        steps = nn.functional.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        return -steps * self.A_log.float().exp()


def init_mamba2_mixer(mixer: Mamba2Mixer, config: ZooMamba2Config) -> None:
    """Initialise a mixer as the official code does.

    | parameter | value |
    |---|---|
    | A_log | log of U(A_init_bounds) |
    | dt_bias | inverse softplus of a step size log-uniform in [time_step_min, time_step_max], at least the floor |
    | D, norm | 1 |
    | in_proj, conv1d | PyTorch's default, U(+-1 / sqrt(fan in)), conv bias too; other biases 0 |
    | out_proj | the same over sqrt(number of layers) |
    """
    init_mamba2_scan(mixer, config)
    init.ones_(mixer.norm.weight)
    _init_projections(mixer, config)


def _init_projections(mixer: Mamba2Mixer, config: ZooMamba2Config) -> None:
    """Initialise in_proj and out_proj, see :func:`init_mamba2_mixer`."""
    init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(mixer.out_proj.in_features * config.num_hidden_layers)
    init.uniform_(mixer.out_proj.weight, -bound, bound)
    for projection in (mixer.in_proj, mixer.out_proj):
        if projection.bias is not None:
            init.zeros_(projection.bias)


def init_mamba2_scan(scan: Mamba2Scan, config: ZooMamba2Config) -> None:
    """Initialise the parameters of one direction, see :func:`init_mamba2_mixer`."""
    low, high = (float(bound) for bound in config.A_init_bounds)
    rates = torch.empty_like(scan.A_log).uniform_(low, high).clamp(min=1e-6)  # a range may start at 0
    init.copy_(scan.A_log, rates.log())
    init_step_bias(scan.dt_bias, config.time_step_min, config.time_step_max, config.time_step_floor)
    init.ones_(scan.D)
    init_short_convolution(scan.conv1d)


@strict
@dataclass
class Mamba2Settings(MixerSettings):
    """Mamba-2 in `zoo_hybrid`. `ZooMamba2Config` explains the keys; `state_size` defaults to the model's `head_dim`."""

    state_size: int | None = None
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)

    def validate_sizes(self) -> None:
        check_sizes(self, "state_size", "expand", "n_groups")
        check_sizes(self, "conv_kernel", least=2)

    def complete(self, config: Any) -> None:
        if self.state_size is None:
            self.state_size = config.head_dim

    def check(self, config: Any) -> None:
        self.sizes(config)

    def sizes(self, config: Any) -> ZooMamba2Config:
        """Return the configuration of the mixers; its constructor checks the sizes."""
        return ZooMamba2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            layer_norm_epsilon=config.rms_norm_eps,
            bidirectional=getattr(config, "bidirectional", False),
            prefix_bidirectional=config.prefix_bidirectional,
            **vars(self),
        )


def _mamba2_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    inner = teacher.num_attention_heads * teacher.head_dim
    if inner % teacher.hidden_size:
        raise ValueError(
            f"`student.mixer` must be 'discrete_mamba2' or 'sliding_attention' for this teacher, got 'mamba2', which "
            f"needs heads * head_dim ({inner}) to be a multiple of the teacher's hidden_size ({teacher.hidden_size})"
        )
    sizes = {"state_size": teacher.head_dim, "head_dim": teacher.head_dim, "n_groups": teacher.num_attention_heads}
    return {"mamba2": sizes | {"expand": inner // teacher.hidden_size, "conv_kernel": spec.conv_kernel}}


MAMBA2 = TokenMixer(
    label="Mamba-2: a state-space layer",
    make=lambda config, settings, layer_idx: Mamba2Mixer(settings.sizes(config), layer_idx),
    settings=Mamba2Settings,
    bidirectional=True,
    student=FromAttention(_mamba2_keys, ("conv_kernel", "half_life", "calibration", "copy_projections")),
    tags=("mamba2",),
    prefix=True,
    flat={
        **{name: name for name in ("state_size", "expand", "n_groups", "conv_kernel", "time_step_limit")},
        "mamba_head_dim": "head_dim",
        "mamba_proj_bias": "use_bias",
        "mamba_conv_bias": "use_conv_bias",
    },
)


class ZooMamba2PreTrainedModel(ZooPreTrainedModel):
    """Mamba-2's configuration, blocks and initialisation."""

    config: ZooMamba2Config
    config_class = ZooMamba2Config
    _no_split_modules = ["MixerBlock"]


class ZooMamba2Model(ZooMamba2PreTrainedModel, ZooModel):
    """Mamba-2 without a head."""

    norm_eps = "layer_norm_epsilon"

    def make_block(self, config: ZooMamba2Config, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return MixerBlock(config, Mamba2Mixer(config, layer_idx))


class ZooMamba2ForCausalLM(ZooMamba2PreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Mamba-2 with a language-modelling head."""

    backbone_class = ZooMamba2Model


class ZooMamba2ForMaskedLM(ZooMamba2PreTrainedModel, ZooForMaskedLM):
    """Bidirectional Mamba-2 with a head that fills in masked tokens."""

    backbone_class = ZooMamba2Model


class ZooMamba2ForSequenceClassification(ZooMamba2PreTrainedModel, ZooForSequenceClassification):
    """Mamba-2 with one score or one set of labels for each row."""

    backbone_class = ZooMamba2Model


class ZooMamba2ForTokenClassification(ZooMamba2PreTrainedModel, ZooForTokenClassification):
    """Mamba-2 with labels for each token."""

    backbone_class = ZooMamba2Model


__all__ = [
    "Mamba2Mixer",
    "ZooMamba2ForCausalLM",
    "ZooMamba2ForMaskedLM",
    "ZooMamba2ForSequenceClassification",
    "ZooMamba2ForTokenClassification",
    "ZooMamba2Model",
    "ZooMamba2PreTrainedModel",
]
