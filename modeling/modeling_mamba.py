"""Mamba: a stack of selective-scan (S6) mixers without attention or MLP.

Paper: Gu and Dao, "Mamba" (arXiv 2312.00752), sections 3.4 and 3.6; official code: state-spaces/mamba@e9594ce,
`modules/mamba_simple.py`. Parameter names and shapes are those of the official and of transformers' checkpoints.
`mixer_rms_eps` adds the norms of FalconMamba (arXiv 2410.05355; transformers' `modeling_falcon_mamba.py`), which
`mixer_rms_weight` makes those of Jamba (arXiv 2403.19887; transformers' `modeling_jamba.py`).

Symbols: B batch, L length, D width, E inner width, R rank of the step sizes, N state size, K convolution width; x
inputs, z gate, dt step sizes, A decay rates, B and C input and output maps.

An encoder (`bidirectional`) scans every document a second time, from its end, with its own convolution, `x_proj`,
`dt_proj`, decay rates and skip (`reverse`). Both directions share `in_proj`, the gate and `out_proj`, which hold most
parameters; the gated outputs of the two scans are added before `out_proj`. This is Vision Mamba (arXiv 2401.09417,
algorithm 1), and Caduceus's BiMamba (arXiv 2403.03234; kuleshov-group/caduceus@0d7fae1), which adds after `out_proj`,
with the same result if there is no bias. A causal checkpoint loads into an encoder; only `reverse` is new. With
`prefix_bidirectional` the second scan is over prefixes only, and the rest is causal (`prefix.py`).

Deviations from the official code: the residual is written norm -> mixer -> add (numerically equal to add -> norm
-> mixer); `dt_proj` is called, where the official code multiplies by its weight and passes its bias to the scan (see
:class:`StepProjection`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.selective_scan import selective_scan, selective_scan_step
from ..kernels.ssd import ssd_matrix
from .backbone import ZooModel
from .cache import layer_of
from .configuration_mamba import ZooMambaConfig
from .heads import ZooForCausalLM, ZooForMaskedLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import MixerBlock, PlainRMSNorm, RMSNorm, ShortConvolution, init_short_convolution, init_step_bias
from .mixer import (
    MixerSettings,
    TokenMixer,
    check_sizes,
    float32_parameter,
    initialise_alone,
    is_single_step,
    matrix_rows,
    scan_both_ways,
)
from .pretrained import ZooPreTrainedModel
from .token_layout import Sequence


class StepProjection(nn.Linear):
    """A linear layer whose bias is added in the bias's own precision, after the product is rounded.

    Before softplus a step size of 0.001 is -6.9, nearly all of it the bias. A float32 bias on a bfloat16 product, as in
    the official scan, leaves the rounding error of the product; a sum in bfloat16 would be up to 1.6 % off the step
    size. A model in bfloat16 therefore has `dt_proj.bias` in float32, beside a weight in bfloat16. Quantised layers,
    which take this one's place, add the bias in their own compute dtype.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = float32_parameter(out_features)

    def forward(self, input: Tensor) -> Tensor:
        """(..., R) to (..., E), in the wider dtype of the product and the bias."""
        return F.linear(input, self.weight) + self.bias


def _low_rank_norm(size: int, config: ZooMambaConfig) -> nn.Module:
    """Build the norm over `size` output channels of `x_proj`; the identity if the configuration has no such norm."""
    if config.mixer_rms_eps is None:
        return nn.Identity()
    if config.mixer_rms_weight:
        return RMSNorm(size, config.mixer_rms_eps)
    return PlainRMSNorm(config.mixer_rms_eps)


class MambaScan(nn.Module):
    """One direction of the mixer: convolution, `x_proj`, `dt_proj`, decay rates and skip."""

    float32_parameters = ("A_log", "D", "dt_proj.bias")

    def __init__(self, config: ZooMambaConfig) -> None:
        super().__init__()
        self.config = config
        inner, rank, state_size = config.intermediate_size, int(config.time_step_rank or 0), config.state_size
        self.conv1d = ShortConvolution(inner, config.conv_kernel, bias=config.use_conv_bias, activation="silu")
        # rows in the order dt, B, C
        self.split = [rank, state_size, state_size]
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_layernorm = _low_rank_norm(rank, config)
        self.b_layernorm = _low_rank_norm(state_size, config)
        self.c_layernorm = _low_rank_norm(state_size, config)
        self.dt_proj = StepProjection(rank, inner)
        self.A_log = float32_parameter(inner, state_size)
        self.D = float32_parameter(inner)
        initialise_alone(init_mamba_scan, self, config)

    def initialise(self) -> None:
        init_mamba_scan(self, self.config)

    def scan(
        self, x: Tensor, z: Tensor, sequence: Sequence, cache: Any = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, E) inputs and gates to (B, L, E) gated outputs, and the matrix if asked for."""
        started = bool(getattr(cache, "is_initialized", False))  # not where there is no cache
        x, conv_state = self.conv1d(x, cache.conv_state if started else None, sequence.seq_idx)
        dt, B, C = self.recurrence_inputs(x)
        A = -self.A_log.float().exp()
        y, state = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            z=z,
            dt_softplus=True,
            initial_state=cache.recurrent_state if started else None,
            seq_idx=sequence.seq_idx,
            return_final_state=True,
        )
        if cache is not None:
            cache.set_states(conv_state, state, x.shape[1])
        attention = None
        if output_attentions:
            attention = matrix_rows(
                lambda dt, B, C, whole: self.mixing_matrix(dt, A, B, C, whole), (dt, B, C), sequence, cache
            )
        return y, attention

    def recurrence_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project convolved (B, L, E) inputs to dt (B, L, E) before softplus, B and C (B, L, 1, N)."""
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return self.dt_proj(dt), B[:, :, None], C[:, :, None]

    def mixing_matrix(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, E, L, L) hidden attention: y = M x before the gate, step sizes and the skip D on the diagonal included.

        `M[i, j] = sum_n C_i exp(A sum_{k=j+1..i} dt_k) B_j dt_j` (Ali et al., arXiv 2403.01590). Every channel has
        its own decay and so is a head: 4 E L^2 bytes per row and layer, 1.5 GiB for L = 512 in the 130M model.
        """
        steps = F.softplus(dt.float())
        states = range(A.shape[1])
        matrix = sum(
            ssd_matrix(steps * A[:, n], B[..., n, None], C[..., n, None], seq_idx=sequence.seq_idx) for n in states
        )
        matrix = matrix * steps.transpose(1, 2)[:, :, None, :]
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


class MambaMixer(MambaScan):
    """The Mamba mixer (arXiv 2312.00752, section 3.4), in one direction or, in an encoder, in both."""

    def __init__(self, config: ZooMambaConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        inner = config.intermediate_size
        # rows in the order x, z
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.reverse = MambaScan(config) if config.bidirectional or config.prefix_bidirectional else None
        initialise_alone(_init_ends, self, config)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, E, L, past + L) mixing matrix if asked for.

        With both directions, of the text or of prefixes, the matrix has 2 E heads: first the channels that look back,
        then those that look ahead, each over the outputs of its direction's convolution.
        """
        cache = layer_of(past_key_values, self.layer_idx)
        hidden_states = sequence.blank(hidden_states)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if not output_attentions and is_single_step(hidden_states, sequence, cache):
            return self.step(x, z, cache), None
        y, attention = scan_both_ways(self, self.reverse, (x, z), sequence, cache, output_attentions)
        return self.out_proj(y), attention

    def initialise(self) -> None:
        init_mamba_mixer(self, self.config)

    def step(self, x: Tensor, z: Tensor, cache: Any) -> Tensor:
        """Process one token: (B, 1, E) projections to (B, 1, D); the states in the cache are updated in place."""
        x, _ = self.conv1d(x, cache.conv_state, in_place=True)
        dt, B, C = self.recurrence_inputs(x)
        y = selective_scan_step(
            cache.recurrent_state,
            x[:, 0],
            dt[:, 0],
            -self.A_log.float().exp(),
            B[:, 0],
            C[:, 0],
            D=self.D,
            z=z[:, 0],
            dt_softplus=True,
        )
        cache.columns += 1
        return self.out_proj(y[:, None])


def init_mamba_mixer(mixer: MambaMixer, config: ZooMambaConfig) -> None:
    """Initialise a mixer as the official code does.

    | parameter | value |
    |---|---|
    | A_log | log of 1 ... N in every channel (S4D-Real) |
    | D, norms | 1 |
    | dt_proj.bias | inverse softplus of a step size log-uniform in [time_step_min, time_step_max], at least the floor |
    | other projections, conv1d | PyTorch's default, U(+-1 / sqrt(fan in)), conv bias too; other biases 0 |
    | out_proj | the same over sqrt(number of layers) |
    """
    init_mamba_scan(mixer, config)
    _init_ends(mixer, config)


def _init_ends(mixer: MambaMixer, config: ZooMambaConfig) -> None:
    """Initialise in_proj and out_proj, see :func:`init_mamba_mixer`."""
    _init_projection(mixer.in_proj, mixer.in_proj.in_features)
    _init_projection(mixer.out_proj, mixer.out_proj.in_features * config.num_hidden_layers)


def init_mamba_scan(scan: MambaScan, config: ZooMambaConfig) -> None:
    """Initialise the parameters of one direction, see :func:`init_mamba_mixer`."""
    rates = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=scan.A_log.device)
    init.copy_(scan.A_log, rates.log().expand_as(scan.A_log))
    init.ones_(scan.D)
    for projection in (scan.x_proj, scan.dt_proj):
        _init_projection(projection, projection.in_features)
    init_step_bias(scan.dt_proj.bias, config.time_step_min, config.time_step_max, config.time_step_floor)
    init_short_convolution(scan.conv1d)


def _init_projection(projection: nn.Linear, fan_in: int) -> None:
    """Initialise the weight with U(+-1 / sqrt(`fan_in`)) and the bias with 0."""
    init.uniform_(projection.weight, -(fan_in**-0.5), fan_in**-0.5)
    if projection.bias is not None:
        init.zeros_(projection.bias)


@strict
@dataclass
class MambaSettings(MixerSettings):
    """Mamba-1 in `zoo_hybrid`. `ZooMambaConfig` explains the keys; `state_size` defaults to the model's `head_dim`."""

    state_size: int | None = None
    expand: int = 2
    time_step_rank: int | None = None
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    mixer_rms_eps: float | None = None
    mixer_rms_weight: bool = False

    def validate_sizes(self) -> None:
        check_sizes(self, "state_size", "expand")
        check_sizes(self, "conv_kernel", least=2)

    def complete(self, config: Any) -> None:
        if self.state_size is None:
            self.state_size = config.head_dim
        if self.time_step_rank is None:
            self.time_step_rank = -(-config.hidden_size // 16)

    def check(self, config: Any) -> None:
        self.sizes(config)

    def sizes(self, config: Any) -> ZooMambaConfig:
        """Return the configuration of the mixers; its constructor checks the sizes."""
        sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
        modes = {name: getattr(config, name, False) for name in ("bidirectional", "prefix_bidirectional")}
        return ZooMambaConfig(**modes, **sizes, **vars(self))


MAMBA = TokenMixer(
    label="Mamba: a state-space layer in which every channel has its own decay",
    make=lambda config, settings, layer_idx: MambaMixer(settings.sizes(config), layer_idx),
    settings=MambaSettings,
    bidirectional=True,
    prefix=True,
    tags=("mamba",),
    flat={
        **{name: name for name in ("state_size", "expand", "conv_kernel", "time_step_rank")},
        **{name: name for name in ("mixer_rms_eps", "mixer_rms_weight")},
        "mamba_proj_bias": "use_bias",
        "mamba_conv_bias": "use_conv_bias",
    },
)


class ZooMambaPreTrainedModel(ZooPreTrainedModel):
    """Mamba's configuration, blocks and initialisation."""

    config: ZooMambaConfig
    config_class = ZooMambaConfig
    _no_split_modules = ["MixerBlock"]


class ZooMambaModel(ZooMambaPreTrainedModel, ZooModel):
    """Mamba without a head."""

    norm_eps = "layer_norm_epsilon"

    def make_block(self, config: ZooMambaConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return MixerBlock(config, MambaMixer(config, layer_idx))


class ZooMambaForCausalLM(ZooMambaPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Mamba with a language-modelling head."""

    backbone_class = ZooMambaModel


class ZooMambaForMaskedLM(ZooMambaPreTrainedModel, ZooForMaskedLM):
    """Bidirectional Mamba with a head that fills in masked tokens."""

    backbone_class = ZooMambaModel


class ZooMambaForSequenceClassification(ZooMambaPreTrainedModel, ZooForSequenceClassification):
    """Mamba with one score or one set of labels for each row."""

    backbone_class = ZooMambaModel


class ZooMambaForTokenClassification(ZooMambaPreTrainedModel, ZooForTokenClassification):
    """Mamba with labels for each token."""

    backbone_class = ZooMambaModel


__all__ = [
    "MambaMixer",
    "ZooMambaForCausalLM",
    "ZooMambaForMaskedLM",
    "ZooMambaForSequenceClassification",
    "ZooMambaForTokenClassification",
    "ZooMambaModel",
    "ZooMambaPreTrainedModel",
]
