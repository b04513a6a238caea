"""A Llama-shaped decoder whose token mixer is chosen layer by layer, the result of distilling a Transformer.

Block: `h = h + mixer(norm(h)); h = h + mlp(norm(h))`, with the residuals, norms, gated MLP and rotary embedding of
Llama (transformers' `modeling_llama.py`). Settings of the configuration turn it into the block of another family:
another norm, norms behind the halves, both halves beside each other, an MLP without a gate. A block may omit one half,
and the rotary embedding may rotate only the first channels of a head, or none. The mixers are those of the table in
`token_mixers.py`.

Symbols: B batch, L length, D width.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from .backbone import ZooModel
from .cache import CACHE_FIELD, layer_of
from .configuration_hybrid import ZooHybridConfig
from .heads import ZooForCausalLM, ZooForMaskedLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import GatedMLP, PlainMLP, ScaledEmbedding, add_norm, make_norm, soft_capped
from .pretrained import ZooPreTrainedModel
from .rollback import recorded
from .token_layout import Sequence
from .token_mixers import TOKEN_MIXERS


class HybridBlock(GradientCheckpointingLayer):
    """A token mixer and an MLP, or one of them, each with norms and added to the residual stream.

    The names of the norms are Llama's: `input_layernorm` is before the mixer, `post_attention_layernorm` before the
    MLP. `mixer_output_layernorm` and `mlp_output_layernorm` are behind them.
    """

    def __init__(self, config: ZooHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.parallel = config.use_parallel_residual
        mixes = (config.mixer_types or [])[layer_idx] != "none"
        mlp_type = (config.mlp_types or [])[layer_idx]
        before, after = config.norm_placement != "after", config.norm_placement != "before"

        def norm(present: bool) -> nn.Module | None:
            return make_norm(config.norm_type, config.hidden_size, config.rms_norm_eps) if present else None

        self.input_layernorm = norm(mixes and before)
        self.mixer = make_mixer(config, layer_idx) if mixes else None
        self.mixer_output_layernorm = norm(mixes and after)
        self.post_attention_layernorm = norm(mlp_type != "none" and before and not config.share_norm)
        self.mlp = make_mlp(config, mlp_type)
        self.mlp_output_layernorm = norm(mlp_type != "none" and after)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """(B, L, D) hidden states to (B, L, D), the mixer's matrix if asked for, and the mixer's further outputs."""
        if self.mixer is None:
            recorded(self._skip, self.layer_idx, hidden_states, sequence, past_key_values, output_attentions)
            return hidden_states + self._transform(_apply(self.post_attention_layernorm, hidden_states)), None
        read = _apply(self.input_layernorm, hidden_states)
        mixed, *others = self._mix(read, sequence, past_key_values, output_attentions)
        if self.mlp is None:
            return hidden_states + mixed, *others
        norm = self.post_attention_layernorm
        if self.parallel:
            if norm is not None:
                read = norm(hidden_states)
            return hidden_states + mixed + self._transform(read), *others
        if norm is None:
            hidden_states = hidden_states + mixed
            return hidden_states + self._transform(hidden_states), *others
        read, hidden_states = add_norm(norm, mixed, hidden_states)
        return hidden_states + self._transform(read), *others

    def _skip(self, hidden_states: Tensor, sequence: Sequence, past_key_values: Cache | None, _: bool) -> None:
        """Count the columns of (B, L, D) states in the cache of a block without a mixer."""
        if past_key_values is not None:
            layer_of(past_key_values, self.layer_idx).skip(hidden_states.shape[1])

    def _mix(self, read: Tensor, *arguments: Any) -> tuple[Any, ...]:
        """Return what the mixer adds to the stream, from (B, L, D) states behind the norm before it, and its other
        outputs."""
        assert self.mixer is not None
        mixed, *others = recorded(self.mixer, self.layer_idx, read, *arguments)
        return self.dropout(_apply(self.mixer_output_layernorm, mixed)), *others

    def _transform(self, hidden_states: Tensor) -> Tensor:
        """Return what the MLP adds to the stream, from (B, L, D) states behind the norm before it."""
        assert self.mlp is not None
        return self.dropout(_apply(self.mlp_output_layernorm, self.mlp(hidden_states)))


def _apply(norm: nn.Module | None, hidden_states: Tensor) -> Tensor:
    """Apply a norm, if there is one."""
    return hidden_states if norm is None else norm(hidden_states)


def make_mlp(config: ZooHybridConfig, kind: str) -> nn.Module | None:
    """Build a channel mixer, one of MLP_TYPES in `configuration_hybrid.py`."""
    sizes: dict[str, Any] = {"act": config.hidden_act, "bias": config.mlp_bias}
    if kind == "none":
        return None
    return (GatedMLP if kind == "gated" else PlainMLP)(config.hidden_size, config.intermediate_size, **sizes)


def make_mixer(config: ZooHybridConfig, layer_idx: int) -> nn.Module:
    """Build the token mixer that `config.mixer_types` names for a layer."""
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
        self.rotary_emb = make_rotary(config)
        self.local_rotary_emb = None if config.local_rope_parameters is None else make_rotary(config, local=True)
        self.position_embeddings = None
        if config.learned_positions:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def make_block(self, config: ZooHybridConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return HybridBlock(config, layer_idx)

    def make_norm(self, config: ZooHybridConfig) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return make_norm(config.norm_type, config.hidden_size, config.rms_norm_eps)

    def make_embeddings(self, config: ZooHybridConfig) -> nn.Embedding:  # pyright: ignore[reportIncompatibleMethodOverride]
        if config.embedding_multiplier == 1:
            return super().make_embeddings(config)
        return ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)

    def add_positions(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.position_embeddings(sequence.position_ids)
        return self.dropout(hidden_states)

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        if self.config.is_bounded:
            sequence.check_length(self.config.max_position_embeddings)
        if "rope" in (self.config.position_types or ["rope"]):
            sequence.rotary = self.rotary_emb(hidden_states, position_ids=sequence.position_ids)
        if self.local_rotary_emb is not None:
            sequence.local_rotary = self.local_rotary_emb(hidden_states, position_ids=sequence.position_ids)


def make_rotary(config: ZooHybridConfig, *, local: bool = False) -> nn.Module:
    """Build the rotary embedding, or the second one: Llama's, with `partial_rotary_factor`."""
    if local:
        config = copy.deepcopy(config)
        config.rope_parameters = config.local_rope_parameters
    return GlmRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]


class ZooHybridForCausalLM(ZooHybridPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """The hybrid with a language-modelling head."""

    backbone_class = ZooHybridModel

    def make_head(self, config: ZooHybridConfig) -> nn.Linear:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        length, cache = self.config.recompute_length, kwargs.get(CACHE_FIELD)
        if length is not None and cache is not None and input_ids.shape[1] > length >= cache.get_seq_length() > 0:
            kwargs |= {CACHE_FIELD: None, "next_sequence_length": None}
        prepare: Any = super().prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        return prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def scale_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else soft_capped(logits, cap)


class ZooHybridForMaskedLM(ZooHybridPreTrainedModel, ZooForMaskedLM):
    """The hybrid in both directions with a head that fills in masked tokens."""

    backbone_class = ZooHybridModel


class ZooHybridForSequenceClassification(ZooHybridPreTrainedModel, ZooForSequenceClassification):
    """The hybrid with one score or one set of labels for each row."""

    backbone_class = ZooHybridModel


class ZooHybridForTokenClassification(ZooHybridPreTrainedModel, ZooForTokenClassification):
    """The hybrid with labels for each token."""

    backbone_class = ZooHybridModel


__all__ = [
    "ZooHybridForCausalLM",
    "ZooHybridForMaskedLM",
    "ZooHybridForSequenceClassification",
    "ZooHybridForTokenClassification",
    "ZooHybridModel",
    "ZooHybridPreTrainedModel",
]
