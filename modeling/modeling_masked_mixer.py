"""Masked mixers and their relatives, which mix tokens with weights that depend on positions, not on the input.

Papers: Badger, "Masked Mixers for Language Generation and Retrieval" (arXiv 2409.01482; blbadger/maskedmixers@8f9515d),
"Toeplitz MLP Mixers are Low Complexity, Information-Rich Sequence Models" (arXiv 2605.06683;
ethan-w-roland/ToeplitzMixers@6a67297) and "Structured Recurrent Mixers" (arXiv 2605.08696; blbadger/mrm@b06563e).

    masked mixer                 x = x + mix(norm(x));  x = x + mlp(norm(x))
    Toeplitz and recurrent       x = x + mlp(norm(x));  x = x + mix(norm(x))
    with attention in series     x = x + attention(norm(x));  x = x + mix(norm(x));  x = x + mlp(norm(x))
    with attention in parallel   x = x + attention(norm(x)) + mix(norm(x));  x = x + mlp(norm(x)),  one norm for both

There is no norm before the head, except with attention, where blocks are otherwise those of Llama.
`position_mixers.py` defines `mix`.

An encoder (`bidirectional`) keeps two streams, which start as the embeddings. The first mixes the tokens before each
token, the second those that follow from `lookahead` tokens on; each has its own weights and norms, and both share the
MLP and its norm. They are added after the last block, since adding them earlier would let a token see itself through
its own prediction. The second stream counts positions from the end of a document. The authors' `DoubleMixerBlock` is
the same with `lookahead=2` and rows that fill the context; its weights of the second stream are reversed in both axes.

A mixer has N = `max_position_embeddings` positions. A shorter row gives exactly the same outputs as that row padded on
the right; a longer one raises ValueError. Output N - 1 is not trained if rows fill the context, as it has no label.

Deviations: padding is left out and documents are mixed separately (`pad_mode`). The paper draws attention in series
without norms and residuals; here the mixing has its own residual branch.

Symbols: B batch, L length, D width, N positions.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..kernels.tracing import host_reads
from .attention import Attention
from .backbone import ZooModel
from .configuration_masked_mixer import MaskedMixerConfig
from .heads import (
    ZooForCausalLM,
    ZooForMaskedLM,
    ZooForSequenceClassification,
    ZooForTokenClassification,
    enter_class_name,
)
from .layers import GatedMLP, LayerNorm, PlainMLP, RMSNorm, init_linear, init_linear_normal, normed
from .masked_mixing import make_position_mixer
from .pretrained import ZooPreTrainedModel
from .rollback import recorded
from .token_layout import Sequence

_NEXT_TOKEN = "MaskedMixerForMaskedLM(lookahead=2)"


def make_norm(config: MaskedMixerConfig) -> nn.Module:
    """Build a norm over the width."""
    kind = RMSNorm if config.norm_type == "rms_norm" else LayerNorm
    return kind(config.hidden_size, config.norm_eps)


def make_mlp(config: MaskedMixerConfig) -> nn.Module:
    """Build the channel mixer."""
    kind = GatedMLP if config.mlp_type == "gated" else PlainMLP
    inner, act = int(config.intermediate_size or 0), str(config.hidden_act)
    return kind(config.hidden_size, inner, act=act, bias=bool(config.mlp_bias))


class MaskedMixerBlock(GradientCheckpointingLayer):
    """Mixing, MLP and, if configured, attention, each added to the stream."""

    def __init__(self, config: MaskedMixerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mlp_first, self.parallel = bool(config.mlp_first), config.attention == "parallel"
        attends = config.attention != "none"
        self.attention_norm = make_norm(config) if config.attention == "series" else None
        self.attention = Attention(config, layer_idx, None) if attends else None
        self.token_norm = make_norm(config)
        self.mixer = make_position_mixer(config, config, layer_idx)
        self.reverse_norm = make_norm(config) if config.bidirectional else None
        self.reverse = (
            make_position_mixer(config, config, layer_idx, config.lookahead) if config.bidirectional else None
        )
        self.channel_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix and transform.

        Args:
            hidden_states: (B, L, D); in an encoder (2, B, L, D), the streams that look back and ahead.
            sequence: positions, documents and padding.
            past_key_values: cache to continue.
            output_attentions: return the matrices.

        Returns:
            Hidden states of the same shape, and if asked for the (B, H, L, L) matrices: of attention, of the mixing
            and, in an encoder, of the mixing that looks ahead.
        """
        if self.mlp_first:
            hidden_states = hidden_states + self.mlp(normed(self.channel_norm, hidden_states))
        hidden_states, matrices = recorded(
            self.mix_tokens, self.layer_idx, hidden_states, sequence, past_key_values, output_attentions
        )
        if not self.mlp_first:
            hidden_states = hidden_states + self.mlp(normed(self.channel_norm, hidden_states))
        found = [matrix for matrix in matrices if matrix is not None]
        return hidden_states, torch.cat(found, dim=1) if found else None

    def mix_tokens(
        self, hidden_states: Tensor, sequence: Sequence, past_key_values: Cache | None, output_attentions: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Apply the block without its MLP; return the stream and the matrices."""
        options = (sequence, past_key_values, output_attentions)
        matrices: list[Tensor | None] = []
        if self.reverse is not None and self.reverse_norm is not None:
            back, ahead = hidden_states.unbind()
            mixed, matrix = self.mixer(normed(self.token_norm, back), *options)
            turned = sequence.reverse(normed(self.reverse_norm, ahead))
            mixed_ahead, matrix_ahead = self.reverse(turned, *options)
            if matrix_ahead is not None:
                matrix_ahead = sequence.reverse(sequence.reverse(matrix_ahead, 2), 3)
            return torch.stack([back + mixed, ahead + sequence.reverse(mixed_ahead)]), [matrix, matrix_ahead]
        attended = 0
        if self.attention is not None and self.attention_norm is not None:
            attended, matrix = self.attention(normed(self.attention_norm, hidden_states), *options)
            hidden_states = hidden_states + attended
            matrices.append(matrix)
        inputs = normed(self.token_norm, hidden_states)
        if self.attention is not None and self.parallel:
            attended, matrix = self.attention(inputs, *options)
            hidden_states = hidden_states + attended
            matrices.append(matrix)
        mixed, matrix = self.mixer(inputs, *options)
        return hidden_states + mixed, [*matrices, matrix]


class MaskedMixerPreTrainedModel(ZooPreTrainedModel):
    """The masked mixers' configuration, blocks and initialisation."""

    config: MaskedMixerConfig
    config_class = MaskedMixerConfig
    _no_split_modules = ["MaskedMixerBlock"]
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            (init_linear if self.config.mixing == "dense" else init_linear_normal)(module)


class MaskedMixerModel(MaskedMixerPreTrainedModel, ZooModel):
    """A masked mixer without a head."""

    def __init__(self, config: MaskedMixerConfig) -> None:
        super().__init__(config)
        attends = config.attention != "none"
        self.rotary_emb = LlamaRotaryEmbedding(config) if attends else None  # pyright: ignore[reportArgumentType]
        self.post_init()

    def make_block(self, config: MaskedMixerConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return MaskedMixerBlock(config, layer_idx)

    def make_norm(self, config: MaskedMixerConfig) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return make_norm(config) if config.final_norm else nn.Identity()

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        sequence.check_length(self.config.max_position_embeddings)
        if self.rotary_emb is not None:
            sequence.rotary = self.rotary_emb(hidden_states, position_ids=sequence.position_ids)

    @functools.wraps(ZooModel.forward)  # callers inspect the signature
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As :meth:`ZooModel.forward`. With `pad_mode="as_trained"` rows are padded first, and the added columns are
        removed from all outputs."""
        if self.config.pad_mode == "shift":
            return super().forward(input_ids, attention_mask, **kwargs)
        arguments, added = fill_context(
            self.embeddings, self.config, input_ids, kwargs | {"attention_mask": attention_mask}
        )
        return without_fill(super().forward(**arguments), added)

    def split(self, hidden_states: Tensor) -> Tensor:
        return torch.stack([hidden_states, hidden_states]) if self.config.bidirectional else hidden_states

    def join(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.sum(0) if self.config.bidirectional else hidden_states


class MaskedMixerForCausalLM(MaskedMixerPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """A masked mixer with a language-modelling head."""

    backbone_class = MaskedMixerModel

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As in transformers. With `context_overflow="window"` only the last part of a row that is too long is read."""
        if self.config.context_overflow == "window":
            input_ids, kwargs = windowed_inputs(input_ids, self.config.max_position_embeddings, kwargs)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore[reportArgumentType]


class MaskedMixerForMaskedLM(MaskedMixerPreTrainedModel, ZooForMaskedLM):
    """Bidirectional masked mixer with a head that fills in tokens or, with `lookahead=2`, predicts the next one."""

    backbone_class = MaskedMixerModel

    def __init__(self, config: MaskedMixerConfig) -> None:
        super().__init__(config)
        # Labels are shifted, as in a causal model: in packed rows set that of each document's first token to -100.
        if config.lookahead == 2:
            self.loss_type = MaskedMixerForCausalLM.loss_name

    def _get_name(self) -> str:
        """Return the name from which transformers' Trainer concludes whether labels are shifted."""
        return _NEXT_TOKEN if self.config.lookahead == 2 else type(self).__name__


class MaskedMixerForSequenceClassification(MaskedMixerPreTrainedModel, ZooForSequenceClassification):
    """A masked mixer with one score or one set of labels for each row."""

    backbone_class = MaskedMixerModel


class MaskedMixerForTokenClassification(MaskedMixerPreTrainedModel, ZooForTokenClassification):
    """A masked mixer with labels for each token."""

    backbone_class = MaskedMixerModel


enter_class_name("AutoModelForCausalLM", _NEXT_TOKEN)


def tokens_to_drop(tokens: Tensor, positions: int) -> Tensor:
    """Return how many first tokens of each row are dropped, from the numbers of tokens of the rows."""
    most, half = positions - 1, (positions - 1) // 2
    return ((tokens - most).clamp(min=0) + half - 1) // half * half


def windowed_inputs(input_ids: Tensor, positions: int, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the arguments of `prepare_inputs_for_generation` for rows that may exceed the N positions.

    Only the last tokens of a row are read, from the first position on. A row of n < N tokens is read whole (the output
    of position N - 1 has usually not been trained). A longer row is read without its first s tokens, where s is the
    smallest multiple of (N - 1) // 2 that leaves fewer than N. The context thus shrinks to about half when it is full,
    and grows token by token until it is full again, in each row by its own tokens. `generate` gives the same tokens
    with a cache, without one, and in one call over a long prompt.

    A cache that holds dropped tokens is emptied, and the remaining tokens are read again.

    Args:
        input_ids: (B, L) all tokens.
        positions: N.
        arguments: the other arguments.

    Raises:
        ValueError: if a row does not fit and the ids of some of its tokens are missing.
    """
    cache = arguments.get("cache", arguments.get("past_key_values"))
    mask = arguments.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    # After a prompt of embeddings there are only the ids of the new tokens.
    columns = max(input_ids.shape[1], past + 1) if mask is None else mask.shape[1]
    if columns < positions:
        return input_ids, arguments
    shape = (input_ids.shape[0], columns)
    real = torch.ones(shape, dtype=torch.bool, device=input_ids.device) if mask is None else mask != 0
    rank = real.cumsum(-1)
    drop = tokens_to_drop(rank[:, -1], positions)
    if not bool(drop.any()):
        return input_ids, arguments
    if columns != input_ids.shape[1] or arguments.get("inputs_embeds") is not None:
        raise ValueError(
            f"input_ids must hold all {columns} tokens of a row that exceeds the {positions} positions "
            f"(max_position_embeddings), as context_overflow='window' reads the last ones again, got "
            f"{input_ids.shape[1]}. Pass neither inputs_embeds nor prefill_chunk_size"
        )
    kept = real & (rank > drop[:, None])
    first = int(kept.any(0).int().argmax())
    changes: dict[str, Any] = {"position_ids": None}
    if cache is None:
        return input_ids[:, first:], arguments | changes | {"attention_mask": kept[:, first:].long()}
    counts = cache.layers[0].counts
    if counts is None or not torch.equal(counts, kept[:, :past].sum(-1).to(counts.device)):
        cache.reset()
        for layer in cache.layers:
            layer.skip(first)
        changes["next_sequence_length"] = columns - first
    return input_ids, arguments | changes | {"attention_mask": kept.long()}


def fill_context(
    embeddings: nn.Module, config: Any, input_ids: Tensor | None, arguments: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Return the arguments of a forward over rows padded to N - 1 tokens, whose last output is the last trained one.

    A masked mixer that was trained on rows padded on the left to the whole context, without a mask, needs the same
    padding at inference: its weights belong to absolute positions, and the padding token has states of its own. Longer
    rows are unchanged, as a row of N tokens is what the checkpoint saw in training.

    Args:
        embeddings: the model's.
        config: gives `max_position_embeddings` (N) and `pad_token_id`.
        input_ids: (B, L) tokens, or None.
        arguments: the other arguments of the forward. `position_ids` are ignored, as positions are column indices.

    Returns:
        The arguments, with (B, N - 1, D) or longer `inputs_embeds`, and the number of columns added before each row.

    Raises:
        ValueError: if there is padding not on the left, rows are packed, or a cache is given or asked for.
    """
    arguments = dict(arguments)
    mask = arguments.pop("attention_mask", None)
    arguments.pop("position_ids", None)
    if mask is not None and host_reads(mask) and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask must have padding on the left only with pad_mode='as_trained', got others")
    packed = [name for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q") if arguments.get(name) is not None]
    if packed:
        raise ValueError(f"{packed[0]} must be None with pad_mode='as_trained', which takes one document a row")
    for name in ("past_key_values", "cache", "cache_params"):
        if arguments.pop(name, None) is not None or arguments.get("use_cache"):
            raise ValueError(
                "use_cache must be False and past_key_values None with pad_mode='as_trained', which has no cache, as a "
                "new token moves all others"
            )
    states = arguments.pop("inputs_embeds", None)
    if (input_ids is None) == (states is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if states is None:
        states = embeddings(input_ids)
    added = max(config.max_position_embeddings - 1 - states.shape[1], 0)
    if added:
        pad = embeddings(torch.full((1, 1), config.pad_token_id, device=states.device))
        states = torch.cat([pad.to(states.dtype).expand(states.shape[0], added, -1), states], dim=1)
    return arguments | {"inputs_embeds": states, "use_cache": False}, added


def without_fill(output: Any, added: int) -> Any:
    """Remove the columns that were added before the rows from the output of a forward."""
    if not isinstance(output, BaseModelOutputWithPast):  # a tuple
        return tuple(_cut(value, added) for value in output)
    for name, value in list(output.items()):
        output[name] = _cut(value, added)
    return output


def _cut(value: Any, added: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut(part, added) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[:, :, added:, added:] if value.dim() == 4 else value[:, added:]


__all__ = [
    "MaskedMixerForCausalLM",
    "MaskedMixerForMaskedLM",
    "MaskedMixerForSequenceClassification",
    "MaskedMixerForTokenClassification",
    "MaskedMixerModel",
    "MaskedMixerPreTrainedModel",
]
