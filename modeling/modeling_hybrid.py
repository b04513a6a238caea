"""A Llama-shaped decoder whose token mixer is chosen layer by layer: what distillation turns a Transformer into.

Block: `h = h + mixer(norm(h)); h = h + mlp(norm(h))`, the residual shape, norms, gated MLP and rotary embedding of
Llama (transformers' `modeling_llama.py`); a block may leave one of the two out, and the rotary embedding turn only the
first channels of a head, or none. Mixers: softmax attention, full, over a sliding window, or over one and for selected
tokens only (`selective_attention.py`, added to the residual stream like the others); Mamba-1 (`modeling_mamba.py`) and
Mamba-2 (`modeling_mamba2.py`); masked mixing (`position_mixers.py`); and discrete Mamba-2, defined here.

Discrete Mamba-2 comes from MOHAWK (arXiv 2408.10189) and its Phi-Mamba (goombalab/phi-mamba@b2e405f,
`modules/lm_head.py` and `modules/mixers/discrete_mamba2.py`): one state-space head per attention head, a scalar
decay per token and head without a step size, an identity-initialised short convolution without activation, and a
gate that starts open.

Symbols: B batch, L length, D width, H heads, P head width, N state size, K convolution width.

Deviations from Phi-Mamba: the log-decay goes to the op directly instead of through `x / softplus(a)`; the decay
has a bias, `dt_bias`, so that it can be calibrated (0 gives Phi-Mamba); `feature_map`, `normalize` and
`ssm_rotary` bring the mixing matrix closer to softmax attention (all off gives Phi-Mamba).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from ..kernels.ssd import ssd_log_decay, ssd_matrix
from ..kernels.ssd_step import ssd_log_decay_step
from .attention import Attention
from .cache import is_single_step, layer_of, matrix_rows
from .causal_lm import RMSNorm, ZooForCausalLM, ZooModel, ZooPreTrainedModel
from .configuration_hybrid import ZooHybridConfig
from .gated_mlp import GatedMLP
from .heads import ZooForSequenceClassification, ZooForTokenClassification
from .mixer_parameters import float32_parameter, initialise_alone
from .mixing_kinds import make_position_mixer
from .modeling_mamba import MambaMixer, init_mamba_mixer
from .modeling_mamba2 import Mamba2Mixer, init_mamba2_mixer
from .position_mixers import PositionMixer
from .rotary import rotate
from .selective_attention import SelectiveAttention
from .short_convolution import ShortConvolution, init_short_convolution
from .step_sizes import inverse_softplus
from .token_layout import Sequence

OPEN_GATE = 1.278464542761  # silu(OPEN_GATE) = 1
_SMALLEST_ROW_SUM = 1e-6


class DiscreteMamba2Mixer(nn.Module):
    """Discrete Mamba-2: `h_t = sigmoid(-a_t) h_{t-1} + x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t + z_bias)`.

    With identity convolution, open gate, D = 0 and the projections of an attention layer this is un-normalised
    linear attention with a decay; with `feature_map="softplus"` and `normalize` it is linear attention with rows
    that sum to 1.
    """

    def __init__(self, config: ZooHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, int(config.head_dim or 0)
        self.state_size = int(config.state_size or 0)
        self.feature_map, self.normalize, self.rotary = config.feature_map, config.normalize, config.ssm_rotary
        inner, maps = self.num_heads * self.head_dim, self.num_heads * self.state_size
        # rows in the order x, B, C, z, a
        self.conv_split = [inner, maps, maps]
        self.split = [inner + 2 * maps, inner, self.num_heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.attention_bias)
        self.conv1d = ShortConvolution(self.split[0], config.conv_kernel, bias=True)
        self.z_bias = nn.Parameter(torch.empty(inner))
        self.dt_bias = float32_parameter(self.num_heads)
        self.D = float32_parameter(self.num_heads)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
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
        x, B, C, log_decay = self.maps(xBC, a, sequence)
        values = F.pad(x, (0, 1), value=1.0) if self.normalize else x  # the column of ones gives the row sums
        if single:
            y = ssd_log_decay_step(cache.recurrent_state, values[:, 0], log_decay[:, 0], B[:, 0], C[:, 0])[:, None]
            cache.columns += 1
        else:
            y, state = ssd_log_decay(
                values,
                log_decay,
                B,
                C,
                initial_state=cache.recurrent_state if started else None,
                seq_idx=sequence.seq_idx,
                return_final_state=True,
            )
            if cache is not None:
                cache.set_states(conv_state, state, length)
        if self.normalize:
            y = y[..., :-1] / y[..., -1:].clamp(min=_SMALLEST_ROW_SUM)
        y = y + self.D.to(y.dtype)[:, None] * x
        y = y.flatten(2) * F.silu(z + self.z_bias)
        attention = matrix_rows(self.mixing_matrix, (log_decay, B, C), sequence, cache) if output_attentions else None
        return self.out_proj(y), attention

    def maps(self, xBC: Tensor, a: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence reads, from the convolved (B, L, ...) projections and the (B, L, H) decay logits.

        Returns:
            x (B, L, H, P), B and C (B, L, H, N) with rotary embedding and feature map applied, log-decay (B, L, H)
            in float32.
        """
        x, B, C = xBC.split(self.conv_split, dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = B.unflatten(-1, (self.num_heads, self.state_size))
        C = C.unflatten(-1, (self.num_heads, self.state_size))
        if self.rotary:
            assert sequence.rotary is not None
            cos, sin = (table[:, :, None] for table in sequence.rotary)
            C, B = rotate(C, cos, sin), rotate(B, cos, sin)
        if self.feature_map == "softplus":
            B, C = F.softplus(B), F.softplus(C)
        return x, B, C, -F.softplus(a.float() + self.dt_bias)

    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) mixing matrix for normed (B, L, D) hidden states, without the outputs."""
        xBC, _, a = self.in_proj(hidden_states).split(self.split, dim=-1)
        xBC, _ = self.conv1d(xBC, seq_idx=sequence.seq_idx)
        _, B, C, log_decay = self.maps(xBC, a, sequence)
        return self.mixing_matrix(log_decay, B, C, sequence)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) logarithm of the decays for normed (B, L, D) hidden states."""
        a = self.in_proj(hidden_states)[..., -self.num_heads :]
        return -F.softplus(a.float() + self.dt_bias)

    def mixing_matrix(self, log_decay: Tensor, B: Tensor, C: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) hidden attention: y = M x per head, before the gate, with the skip D on the diagonal."""
        matrix = ssd_matrix(log_decay, B, C, seq_idx=sequence.seq_idx)
        if self.normalize:
            matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=_SMALLEST_ROW_SUM)
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, matrix.shape[-1]))


class HybridBlock(GradientCheckpointingLayer):
    """norm -> mixer -> add, norm -> MLP -> add; of a block with one of the two, that half."""

    def __init__(self, config: ZooHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        mixes = (config.mixer_types or [])[layer_idx] != "none"
        gated = (config.mlp_types or [])[layer_idx] != "none"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if mixes else None
        self.mixer = make_mixer(config, layer_idx) if mixes else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if gated else None
        self.mlp = make_mlp(config) if gated else None

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """(B, L, D) hidden states to (B, L, D), the mixer's matrix if asked for, and what a mixer adds to that."""
        if self.mixer is None or self.input_layernorm is None:
            assert self.post_attention_layernorm is not None and self.mlp is not None
            if past_key_values is not None:
                layer_of(past_key_values, self.layer_idx).skip(hidden_states.shape[1])
            normed = self.post_attention_layernorm(hidden_states)
            return hidden_states + self.mlp(normed), None
        mixed, *others = self.mixer(self.input_layernorm(hidden_states), sequence, past_key_values, output_attentions)
        if self.mlp is None or self.post_attention_layernorm is None:
            return hidden_states + mixed, *others
        normed, hidden_states = self.post_attention_layernorm(mixed, residual=hidden_states)
        return hidden_states + self.mlp(normed), *others


def make_mlp(config: ZooHybridConfig) -> GatedMLP:
    """The channel mixer of a block that has one."""
    return GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act, bias=config.mlp_bias)


def make_mixer(config: ZooHybridConfig, layer_idx: int) -> nn.Module:
    """The token mixer that `config.mixer_types` names for a layer."""
    kind = (config.mixer_types or [])[layer_idx]
    if kind == "mamba":
        return MambaMixer(config.mamba, layer_idx)
    if kind == "mamba2":
        return Mamba2Mixer(config.mamba2, layer_idx)
    if kind == "discrete_mamba2":
        return DiscreteMamba2Mixer(config, layer_idx)
    if kind == "masked_mixing":
        return make_position_mixer(config.masked_mixer, layer_idx)
    if kind == "selective_attention":
        return SelectiveAttention(config, layer_idx, bias=config.attention_bias)
    if kind == "sliding_attention":
        return Attention(config, layer_idx, config.sliding_window)
    return Attention(config, layer_idx, None, config.attention_conv_kernel)


def init_discrete_mamba2_mixer(mixer: DiscreteMamba2Mixer) -> None:
    """Initialisation of discrete Mamba-2 after its projections have theirs.

    | parameter | value |
    |---|---|
    | conv1d | identity: last tap 1, others 0; bias 0 |
    | z rows of in_proj, z_bias | 0 and OPEN_GATE: the gate is open, whatever the input |
    | dt_bias | half-lives of 4 to 64 tokens, geometric over the heads |
    | D | 1 |
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


def half_life_to_bias(half_life: Tensor) -> Tensor:
    """The `dt_bias` with which a head that sees no decay input halves its state every `half_life` tokens (> 0)."""
    return inverse_softplus(math.log(2.0) / half_life)


class ZooHybridPreTrainedModel(ZooPreTrainedModel):
    """The hybrid's configuration, blocks and initialisation."""

    config: ZooHybridConfig
    config_class = ZooHybridConfig
    _no_split_modules = ["HybridBlock"]
    auto_classes = {
        "AutoModel": "ZooHybridModel",
        "AutoModelForCausalLM": "ZooHybridForCausalLM",
        "AutoModelForSequenceClassification": "ZooHybridForSequenceClassification",
        "AutoModelForTokenClassification": "ZooHybridForTokenClassification",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaMixer):  # after its projections, which it initialises again
            init_mamba_mixer(module, self.config.mamba)
        elif isinstance(module, Mamba2Mixer):
            init_mamba2_mixer(module, self.config.mamba2)
        elif isinstance(module, PositionMixer):
            module.initialise()
        elif isinstance(module, DiscreteMamba2Mixer):
            init_discrete_mamba2_mixer(module)
        elif isinstance(module, Attention) and module.conv1d is not None:
            init_short_convolution(module.conv1d)


class ZooHybridModel(ZooHybridPreTrainedModel, ZooModel):
    """The hybrid without a head."""

    def __init__(self, config: ZooHybridConfig) -> None:
        super().__init__(config)
        # Llama's, with `partial_rotary_factor`
        self.rotary_emb = GlmRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.post_init()

    def make_block(self, config: ZooHybridConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return HybridBlock(config, layer_idx)

    @staticmethod
    def norm_eps(config: ZooHybridConfig) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        return config.rms_norm_eps

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        if "masked_mixing" in (self.config.mixer_types or []):
            sequence.check_length(self.config.max_position_embeddings)
        sequence.rotary = self.rotary_emb(hidden_states, position_ids=sequence.position_ids)


class ZooHybridForCausalLM(ZooHybridPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """The hybrid with a language-modelling head."""

    backbone_class = ZooHybridModel


class ZooHybridForSequenceClassification(ZooHybridPreTrainedModel, ZooForSequenceClassification):
    """The hybrid with one score or one set of labels for each row."""

    backbone_class = ZooHybridModel


class ZooHybridForTokenClassification(ZooHybridPreTrainedModel, ZooForTokenClassification):
    """The hybrid with labels for each token."""

    backbone_class = ZooHybridModel


__all__ = [
    "ZooHybridForCausalLM",
    "ZooHybridForSequenceClassification",
    "ZooHybridForTokenClassification",
    "ZooHybridModel",
    "ZooHybridPreTrainedModel",
]
