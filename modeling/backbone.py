"""What all families share below the head: embedding, loop over blocks, final norm, cache.

What is peculiar to a model (its mixer, its block, its initialisation) stands in its own `modeling_<m>.py`.

Symbols: B batch, L length, D width.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from .cache import CACHE_FIELD, check_layers, one_cache
from .layers import RMSNorm, normed
from .outputs import ZooModelOutput, routing_outputs
from .pretrained import ZooPreTrainedModel, is_bidirectional
from .token_layout import Sequence, check_keywords, make_sequence


class ZooModel(ZooPreTrainedModel):
    """Embedding, blocks and final norm. A family says in `make_block` what a block is.

    A block is called as `block(hidden_states, sequence, past_key_values=..., output_attentions=...)` and returns
    the (B, L, D) hidden states and its (B, H, L, past + L) mixing matrix, or None if that was not asked for; one that
    chooses tokens also its (B, L, 2) scores and (B, L) decisions.
    """

    auto_class = "AutoModel"

    def __init__(self, config: PreTrainedConfig) -> None:
        declared = {field.name for field in dataclasses.fields(type(config))}
        if is_bidirectional(config) and "bidirectional" not in declared:
            raise ValueError(f"bidirectional: {config.model_type} has no such option, got True; accepted: leave it out")
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.make_block(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = self.make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def make_block(self, config: PreTrainedConfig, layer_idx: int) -> nn.Module:
        """The block at `layer_idx`."""
        raise NotImplementedError

    def make_norm(self, config: PreTrainedConfig) -> nn.Module:
        """The final norm, `nn.Identity` where a family has none."""
        return RMSNorm(config.hidden_size, self.norm_eps(config))

    @staticmethod
    def norm_eps(config: PreTrainedConfig) -> float:
        """Epsilon of the norms."""
        raise NotImplementedError

    def split(self, hidden_states: Tensor) -> Tensor:
        """What the first block reads, of the (B, L, D) embeddings: these, unless a family has several streams."""
        return hidden_states

    def join(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) of what a block returns: the opposite."""
        return hidden_states

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        """Add to `sequence` what the family's layers share, rotary tables say."""

    def sequence_of(self, hidden_states: Tensor) -> Sequence:
        """The :class:`Sequence` of whole, unpadded rows of (B, L, D) hidden states, to run a mixer by itself."""
        batch, length = hidden_states.shape[:2]
        sequence = make_sequence(batch, length, hidden_states.device)
        self.prepare(sequence, hidden_states)
        return sequence

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ZooModelOutput | tuple:
        """Run the blocks.

        Args:
            input_ids: (B, L) token ids; or
            inputs_embeds: (B, L, D) embeddings.
            attention_mask: (B, past + L), non-zero at real tokens; padding may stand left, right or anywhere.
            position_ids: (B, L) positions, for layers that use them; where they restart, a new document starts.
            past_key_values: cache to continue.
            use_cache: return a cache; `config.use_cache` if not given, but not while training, of a packed row, or
                where the model is bidirectional.
            seq_idx: (B, L) document index of each token of a packed row, non-decreasing, negative at padding.
            cu_seqlens: (documents + 1) starts of the documents of a single packed row, then its length.
            output_hidden_states: return the embeddings and every block's output; the last one after the final
                norm.
            output_attentions: return every layer's (B, H, L, past + L) mixing matrix: the rows of the new tokens. Of a
                recurrent layer None if the cache holds tokens for which it was not asked.
            return_dict: return a ModelOutput rather than a tuple.
            cache: transformers' later name of `past_key_values`.
            **kwargs: `cu_seq_lens_q` of transformers' padding-free collators is read, and `cache_params`, the name of
                the cache in transformers' Mamba classes; the others that are accepted are the loss's, or say nothing
                new (`token_layout.py`).

        Raises:
            ValueError: if the arguments contradict each other.
            TypeError: if there is no such argument.
        """
        check_keywords(type(self).__name__, kwargs, ZooModel.forward)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = one_cache(past_key_values, cache, kwargs.get("cache_params"))
        if is_bidirectional(self.config) and (use_cache or past_key_values is not None):
            raise ValueError(
                "a bidirectional model has no state to go on from: use_cache must be False and past_key_values None, "
                f"got {use_cache} and {past_key_values}"
            )
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        if cu_seqlens is None and seq_idx is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")

        sequence = make_sequence(
            hidden_states.shape[0],
            hidden_states.shape[1],
            hidden_states.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
        )
        hidden_states = sequence.blank(hidden_states)
        self.prepare(sequence, hidden_states)
        if use_cache is None:  # a packed row is no prompt to go on from, unless the caller says so
            use_cache = config.use_cache and not (self.training or sequence.packed or is_bidirectional(config))
        if self.gradient_checkpointing and self.training:
            if sequence.past:
                raise ValueError(
                    f"gradient checkpointing cannot continue a cache, past_key_values holds {sequence.past} tokens"
                )
            use_cache, past_key_values = False, None
        if sequence.packed and (use_cache or past_key_values is not None):
            raise ValueError(
                "packed documents (seq_idx, cu_seqlens) leave no single state to go on from: use_cache must be "
                f"False and past_key_values None, got {use_cache} and {past_key_values}"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            check_layers(past_key_values, config.layer_types)

        all_hidden_states: list[Tensor] = [hidden_states] if output_hidden_states else []
        attentions: list[Any] = []
        choices: list[Any] = []
        hidden_states = self.split(hidden_states)
        for block in self.layers:
            hidden_states, attention, *choice = block(
                hidden_states, sequence, past_key_values=past_key_values, output_attentions=output_attentions
            )
            if choice:
                choices.append(choice)
            if output_attentions:
                attentions.append(attention)
            if output_hidden_states and len(all_hidden_states) < len(self.layers):
                all_hidden_states.append(self.join(hidden_states))
        hidden_states = normed(self.norm_f, self.join(hidden_states))
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        output = ZooModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE_FIELD: past_key_values if use_cache else None},
            **(routing_outputs(choices, sequence.real, config.attention_capacity) if choices else {}),
        )
        return output if return_dict else output.to_tuple()
