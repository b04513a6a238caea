"""A Llama-shaped decoder whose token mixer is chosen layer by layer: what distillation turns a Transformer into.

Block: `h = h + mixer(norm(h)); h = h + mlp(norm(h))`, the residual shape, norms, gated MLP and rotary embedding of
Llama (transformers' `modeling_llama.py`); a block may leave one of the two out, and the rotary embedding turn only the
first channels of a head, or none. The mixers are those of the table in `token_mixers.py`.

Symbols: B batch, L length, D width.
"""

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from .backbone import ZooModel
from .cache import layer_of
from .configuration_hybrid import ZooHybridConfig
from .heads import ZooForCausalLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import GatedMLP, RMSNorm
from .pretrained import ZooPreTrainedModel
from .token_layout import Sequence
from .token_mixers import TOKEN_MIXERS


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
    return TOKEN_MIXERS[kind].make(config, config.settings_of(kind), layer_idx)


class ZooHybridPreTrainedModel(ZooPreTrainedModel):
    """The hybrid's configuration, blocks and initialisation."""

    config: ZooHybridConfig
    config_class = ZooHybridConfig
    _no_split_modules = ["HybridBlock"]
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


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
        if self.config.is_bounded:
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
