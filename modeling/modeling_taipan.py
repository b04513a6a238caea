"""Taipan: Mamba-2 blocks with softmax attention in between, for the tokens that a gate selects.

Paper: Van Nguyen et al., "Taipan: Efficient and Expressive State Space Language Models with Selective Attention"
(arXiv 2410.18572). No official code and no checkpoint are public; this follows the paper's equations.

A block of selective attention is `h = h + m a (attention(norm(h)) - h); h = h + mlp(norm(h))`, where m is 1 at selected
tokens and a is the gate's probability (equations 1 to 6; see `selective_attention.py` for what the paper leaves open).
The Mamba-2 blocks are those of `modeling_mamba2.py`. In training, the loss includes `router_aux_loss_coef` times the
sum over layers of the squared difference between the share of selected tokens and the capacity (equation 7, for every
row over its real tokens).

Choices where the paper is silent: one RMSNorm before gate, queries, keys and values, and a second before the MLP, both
inside the residual branch; the fusion acts on the un-normalised stream; the gate is a linear layer with a bias that
starts at 0; no grouped key-value heads unless asked for; an incomplete last group of Mamba-2 blocks has no attention
after it; tied embeddings. The capacity loss is added in training only, so that an evaluated loss is the language
model's.

Symbols: B batch, L length, D width.
"""

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import ZooModel
from .configuration_taipan import TaipanConfig
from .heads import ZooForCausalLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import GatedMLP, MixerBlock, RMSNorm, as_weight, normed
from .modeling_mamba2 import Mamba2Mixer
from .pretrained import ZooPreTrainedModel
from .rollback import recorded
from .selective_attention import SelectiveAttention
from .token_layout import Sequence


class SelectiveAttentionBlock(GradientCheckpointingLayer):
    """Attention for selected tokens, fused into the residual stream, then an MLP for all of them."""

    def __init__(self, config: TaipanConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32, self.convex = config.residual_in_fp32, config.sal_fusion == "convex"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_idx = layer_idx
        self.mixer = SelectiveAttention(config, config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, int(config.intermediate_size or 0))

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(B, L, D) hidden states to (B, L, D), and the further outputs of `SelectiveAttention`."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        update, *others = recorded(
            self.mixer,
            self.layer_idx,
            normed(self.input_layernorm, residual),
            sequence,
            past_key_values,
            output_attentions,
            stream=residual if self.convex else None,
        )
        inputs, residual = self.post_attention_layernorm(update, residual=residual)
        return residual + self.mlp(as_weight(self.post_attention_layernorm, inputs)), *others


class TaipanPreTrainedModel(ZooPreTrainedModel):
    """Taipan's configuration, blocks and initialisation."""

    config: TaipanConfig
    config_class = TaipanConfig
    _no_split_modules = ["MixerBlock", "SelectiveAttentionBlock"]


class TaipanModel(TaipanPreTrainedModel, ZooModel):
    """Taipan without a head."""

    def make_block(self, config: TaipanConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        if layer_idx in (config.sal_layer_idx or []):
            return SelectiveAttentionBlock(config, layer_idx)
        return MixerBlock(config.mamba2, Mamba2Mixer(config.mamba2, layer_idx))


class TaipanForCausalLM(TaipanPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Taipan with a language-modelling head."""

    backbone_class = TaipanModel


class TaipanForSequenceClassification(TaipanPreTrainedModel, ZooForSequenceClassification):
    """Taipan with one score or one set of labels for each row."""

    backbone_class = TaipanModel


class TaipanForTokenClassification(TaipanPreTrainedModel, ZooForTokenClassification):
    """Taipan with labels for each token."""

    backbone_class = TaipanModel


__all__ = [
    "TaipanForCausalLM",
    "TaipanForSequenceClassification",
    "TaipanForTokenClassification",
    "TaipanModel",
    "TaipanPreTrainedModel",
]
