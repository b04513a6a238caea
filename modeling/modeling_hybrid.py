"""A Llama-shaped decoder whose token mixer is chosen layer by layer: what distillation turns a Transformer into.

Block: `h = h + mixer(norm(h)); h = h + mlp(norm(h))`, the residual shape, norms, gated MLP and rotary embedding of
Llama (transformers' `modeling_llama.py`); a block may leave one of the two out, and the rotary embedding turn only the
first channels of a head, or none. Mixers: softmax attention, full, over a sliding window, or over one and for selected
tokens only (`selective_attention.py`, added to the residual stream like the others); Mamba-1 (`modeling_mamba.py`) and
Mamba-2 (`modeling_mamba2.py`); masked mixing (`position_mixers.py`); and discrete Mamba-2
(`discrete_mamba2.py`).

Symbols: B batch, L length, D width.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from .attention import Attention
from .backbone import ZooModel
from .cache import layer_of
from .configuration_hybrid import ZooHybridConfig
from .discrete_mamba2 import DiscreteMamba2Mixer, init_discrete_mamba2_mixer
from .heads import ZooForCausalLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import GatedMLP, RMSNorm, init_short_convolution
from .modeling_mamba import MambaMixer, init_mamba_mixer
from .modeling_mamba2 import Mamba2Mixer, init_mamba2_mixer
from .position_mixers import PositionMixer, make_position_mixer
from .pretrained import ZooPreTrainedModel
from .selective_attention import SelectiveAttention
from .token_layout import Sequence


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
