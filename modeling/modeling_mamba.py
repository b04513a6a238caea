"""Mamba: a stack of selective-scan (S6) mixers without attention or MLP.

Paper: Gu and Dao, "Mamba" (arXiv 2312.00752), sections 3.4 and 3.6; official code: state-spaces/mamba@e9594ce,
`modules/mamba_simple.py`. Parameter names and shapes are those of the official and of transformers' checkpoints.
`mixer_rms_eps` adds the norms of FalconMamba (arXiv 2410.05355; transformers' `modeling_falcon_mamba.py`).

Symbols: B batch, L length, D width, E inner width, R rank of the step sizes, N state size, K convolution width; x
inputs, z gate, dt step sizes, A decay rates, B and C input and output maps.

Deviations from the official code: the residual is written norm -> mixer -> add (numerically equal to add -> norm
-> mixer); `dt_proj` is called, where the official code multiplies by its weight and passes its bias to the scan (see
:class:`StepProjection`). The classes are named after the mixer (S6): transformers' `generate`, before 5.24, hands its
cache to classes with "mamba" in their name under another keyword than `past_key_values`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.selective_scan import selective_scan, selective_scan_step
from ..kernels.ssd import ssd_matrix
from .cache import is_single_step, layer_of
from .causal_lm import ZooForCausalLM, ZooModel, ZooPreTrainedModel
from .configuration_mamba import ZooMambaConfig
from .heads import ZooForSequenceClassification, ZooForTokenClassification
from .mixer_block import MixerBlock
from .sequence import Sequence
from .short_convolution import ShortConvolution, init_short_convolution
from .step_sizes import init_step_bias


class StepProjection(nn.Linear):
    """A linear layer whose bias is added in the bias's own precision, after the product is rounded.

    Before softplus a step size of 0.001 is -6.9, nearly all of it the bias. A float32 bias on a bfloat16 product, as in
    the official scan, leaves the rounding error of the product; a sum in bfloat16 would be up to 1.6 % off the step
    size. Loading in bfloat16 therefore leaves `dt_proj.bias` in float32, beside a weight in bfloat16. Quantised layers,
    which take this one's place, add the bias in their own compute dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., R) to (..., E), in the wider dtype of the product and the bias."""
        return F.linear(input, self.weight) + self.bias


class MambaMixer(nn.Module):
    """The Mamba mixer (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: ZooMambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.rms_eps = config.mixer_rms_eps
        inner, rank, state_size = config.intermediate_size, int(config.time_step_rank or 0), config.state_size
        # rows in the order x, z
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv1d = ShortConvolution(inner, config.conv_kernel, bias=config.use_conv_bias, activation="silu")
        # rows in the order dt, B, C
        self.split = [rank, state_size, state_size]
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, E, L, L) mixing matrix if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if is_single_step(hidden_states, sequence, cache):
            return self.step(x, z, cache), None
        started = bool(getattr(cache, "is_initialized", False))  # not where there is no cache
        x, conv_state = self.conv1d(x, cache.conv_state if started else None, sequence.seq_idx)
        dt, B, C = self.maps(x)
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
            cache.set_states(conv_state, state, hidden_states.shape[1])
        return self.out_proj(y), self.mixing_matrix(dt, A, B, C, sequence) if output_attentions else None

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (B, L, E) before softplus, B and C (B, L, 1, N), of convolved (B, L, E) inputs."""
        low_rank = self.x_proj(x).split(self.split, dim=-1)
        if self.rms_eps is not None:
            low_rank = [F.rms_norm(part, part.shape[-1:], eps=self.rms_eps) for part in low_rank]
        dt, B, C = low_rank
        return self.dt_proj(dt), B[:, :, None], C[:, :, None]

    def step(self, x: Tensor, z: Tensor, cache: Any) -> Tensor:
        """One token: (B, 1, E) projections to (B, 1, D); the cache's states are updated in place."""
        x, _ = self.conv1d(x, cache.conv_state, in_place=True)
        dt, B, C = self.maps(x)
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

    def mixing_matrix(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, E, L, L) hidden attention: y = M x before the gate, step sizes and the skip D on the diagonal included.

        `M[i, j] = sum_n C_i exp(A sum_{k=j+1..i} dt_k) B_j dt_j` (Ali et al., arXiv 2403.01590). Every channel decays
        by itself and so is a head of its own: 4 E L^2 bytes a row and layer, 1.5 GiB for L = 512 in the 130M model.
        """
        steps = F.softplus(dt.float())
        states = range(A.shape[1])
        matrix = sum(
            ssd_matrix(steps * A[:, n], B[..., n, None], C[..., n, None], seq_idx=sequence.seq_idx) for n in states
        )
        matrix = matrix * steps.transpose(1, 2)[:, :, None, :]
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


def init_mamba_mixer(mixer: MambaMixer, config: ZooMambaConfig) -> None:
    """The official initialisation.

    | parameter | value |
    |---|---|
    | A_log | log of 1 ... N in every channel (S4D-Real) |
    | D | 1 |
    | dt_proj.bias | inverse softplus of a step size log-uniform in [time_step_min, time_step_max], at least the floor |
    | other projections, conv1d | PyTorch's default, U(+-1 / sqrt(fan in)), conv bias too; other biases 0 |
    | out_proj | the same over sqrt(number of layers) |
    """
    rates = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=mixer.A_log.device)
    init.copy_(mixer.A_log, rates.log().expand_as(mixer.A_log))
    init.ones_(mixer.D)
    bounds = [(projection, projection.in_features**-0.5) for projection in (mixer.in_proj, mixer.x_proj, mixer.dt_proj)]
    bounds.append((mixer.out_proj, (mixer.out_proj.in_features * config.num_hidden_layers) ** -0.5))
    for projection, bound in bounds:
        init.uniform_(projection.weight, -bound, bound)
        if projection.bias is not None:
            init.zeros_(projection.bias)
    init_step_bias(mixer.dt_proj.bias, config.time_step_min, config.time_step_max, config.time_step_floor)
    init_short_convolution(mixer.conv1d)


class ZooS6PreTrainedModel(ZooPreTrainedModel):
    """Mamba's configuration, blocks and initialisation."""

    config: ZooMambaConfig
    config_class = ZooMambaConfig
    _no_split_modules = ["MixerBlock"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_proj.bias"]
    auto_classes = {
        "AutoModel": "ZooS6Model",
        "AutoModelForCausalLM": "ZooS6ForCausalLM",
        "AutoModelForSequenceClassification": "ZooS6ForSequenceClassification",
        "AutoModelForTokenClassification": "ZooS6ForTokenClassification",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaMixer):  # after its projections, which it initialises again
            init_mamba_mixer(module, self.config)


class ZooS6Model(ZooS6PreTrainedModel, ZooModel):
    """Mamba without a head."""

    def make_block(self, config: ZooMambaConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return MixerBlock(config, MambaMixer(config, layer_idx))

    @staticmethod
    def norm_eps(config: ZooMambaConfig) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        return config.layer_norm_epsilon


class ZooS6ForCausalLM(ZooS6PreTrainedModel, ZooForCausalLM):
    """Mamba with a language-modelling head."""

    backbone_class = ZooS6Model


class ZooS6ForSequenceClassification(ZooS6PreTrainedModel, ZooForSequenceClassification):
    """Mamba with one score or one set of labels for each row."""

    backbone_class = ZooS6Model


class ZooS6ForTokenClassification(ZooS6PreTrainedModel, ZooForTokenClassification):
    """Mamba with labels for each token."""

    backbone_class = ZooS6Model


__all__ = [
    "MambaMixer",
    "ZooS6ForCausalLM",
    "ZooS6ForSequenceClassification",
    "ZooS6ForTokenClassification",
    "ZooS6Model",
    "ZooS6PreTrainedModel",
]
