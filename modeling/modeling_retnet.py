"""RetNet: blocks of multi-scale retention and an MLP.

Paper: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (arXiv 2307.08621);
official code: microsoft/torchscale@4d1e0e8, `architecture/retnet.py`. Retention and the deviations in it are described
in `retention.py`.

Block: `h = h + retention(norm(h)); h = h + mlp(norm(h))`, with RMS norms and a gated MLP without biases as in the
official code, or a plain MLP (section 2.3 of the paper). Names of parameters are Llama's.

Not offered, because the sizes that torchscale publishes have none of them: mixtures of experts, DeepNorm, a norm of the
embeddings, dropout.

Symbols: B batch, L length, D width.
"""

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from .backbone import ZooModel
from .configuration_retnet import ZooRetNetConfig
from .heads import ZooForCausalLM, ZooForMaskedLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import GatedMLP, PlainMLP, RMSNorm, ScaledEmbedding, as_weight, normed
from .pretrained import ZooPreTrainedModel
from .retention import Retention
from .rollback import recorded
from .token_layout import Sequence


class RetNetBlock(GradientCheckpointingLayer):
    """Retention, then an MLP, each with a norm before it and added to the residual stream."""

    def __init__(self, config: ZooRetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = Retention(
            config,
            layer_idx,
            v_head_dim=int(config.v_head_dim or 0),
            use_output_gate=config.use_output_gate,
            normalize_scores=config.normalize_scores,
            elementwise_affine=config.elementwise_affine,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = GatedMLP if config.mlp_type == "gated" else PlainMLP
        self.mlp = kind(config.hidden_size, config.intermediate_size, act=config.hidden_act, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) hidden states to (B, L, D), and the mixing matrix of retention if asked for."""
        read = normed(self.input_layernorm, hidden_states)
        mixed, attention = recorded(self.mixer, self.layer_idx, read, sequence, past_key_values, output_attentions)
        inputs, residual = self.post_attention_layernorm(mixed, residual=hidden_states)
        return residual + self.mlp(as_weight(self.post_attention_layernorm, inputs)), attention


class ZooRetNetPreTrainedModel(ZooPreTrainedModel):
    """RetNet's configuration, blocks and initialisation."""

    config: ZooRetNetConfig
    config_class = ZooRetNetConfig
    _no_split_modules = ["RetNetBlock"]


class ZooRetNetModel(ZooRetNetPreTrainedModel, ZooModel):
    """RetNet without a head."""

    def __init__(self, config: ZooRetNetConfig) -> None:
        super().__init__(config)
        self.rotary_emb = GlmRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.post_init()

    def make_embeddings(self, config: ZooRetNetConfig) -> nn.Embedding:  # pyright: ignore[reportIncompatibleMethodOverride]
        if config.embedding_multiplier == 1:
            return super().make_embeddings(config)
        return ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)

    def make_block(self, config: ZooRetNetConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return RetNetBlock(config, layer_idx)

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        sequence.rotary = self.rotary_emb(hidden_states, position_ids=sequence.position_ids)


class ZooRetNetForCausalLM(ZooRetNetPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """RetNet with a language-modelling head."""

    backbone_class = ZooRetNetModel


class ZooRetNetForMaskedLM(ZooRetNetPreTrainedModel, ZooForMaskedLM):
    """Bidirectional RetNet with a head that fills in masked tokens."""

    backbone_class = ZooRetNetModel


class ZooRetNetForSequenceClassification(ZooRetNetPreTrainedModel, ZooForSequenceClassification):
    """RetNet with one score or one set of labels for each row."""

    backbone_class = ZooRetNetModel


class ZooRetNetForTokenClassification(ZooRetNetPreTrainedModel, ZooForTokenClassification):
    """RetNet with labels for each token."""

    backbone_class = ZooRetNetModel


__all__ = [
    "ZooRetNetForCausalLM",
    "ZooRetNetForMaskedLM",
    "ZooRetNetForSequenceClassification",
    "ZooRetNetForTokenClassification",
    "ZooRetNetModel",
    "ZooRetNetPreTrainedModel",
]
