"""The backbone that all families share: embedding, blocks, final norm and cache.

A family defines its mixer, block and initialisation in its own `modeling_<m>.py`.

Symbols: B batch, L length, D width.
"""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from .cache import CACHE_FIELD, check_layers, one_cache
from .call_arguments import check_keywords
from .layers import RMSNorm, normed
from .outputs import ZooModelOutput, routing_outputs
from .prefix import has_prefix, read_prefix
from .pretrained import ZooPreTrainedModel, is_bidirectional
from .token_layout import Sequence, make_sequence


class ZooModel(ZooPreTrainedModel):
    """Embedding, blocks and final norm. A family builds its blocks in `make_block`.

    A block is called as `block(hidden_states, sequence, past_key_values=..., output_attentions=...)` and returns
    the (B, L, D) hidden states and its (B, H, L, past + L) mixing matrix, or None if that was not asked for. A block
    that selects tokens also returns its (B, L, 2) scores and (B, L) decisions.
    """

    auto_class = "AutoModel"
    norm_eps: ClassVar[str] = "rms_norm_eps"
    """Field of the configuration with the epsilon of the final norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        declared = {field.name for field in dataclasses.fields(type(config))}
        for name, asked in (("bidirectional", is_bidirectional), ("prefix_bidirectional", has_prefix)):
            if asked(config) and name not in declared:
                raise ValueError(f"`{name}` must be left out, got True: {config.model_type} has no such option")
        super().__init__(config)
        self.embeddings = self.make_embeddings(config)
        self.layers = nn.ModuleList([self.make_block(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = self.make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def make_embeddings(self, config: PreTrainedConfig) -> nn.Embedding:
        """Build the embedding of the tokens."""
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def make_block(self, config: PreTrainedConfig, layer_idx: int) -> nn.Module:
        """Build the block at `layer_idx`."""
        raise NotImplementedError

    def make_norm(self, config: PreTrainedConfig) -> nn.Module:
        """Build the final norm: `nn.Identity` if the family has none."""
        return RMSNorm(config.hidden_size, getattr(config, self.norm_eps))

    def split(self, hidden_states: Tensor) -> Tensor:
        """Expand the embeddings into the block input (identity unless the family uses several streams)."""
        return hidden_states

    def join(self, hidden_states: Tensor) -> Tensor:
        """Combine the streams of a block's output into (B, L, D) hidden states: the inverse of `split`."""
        return hidden_states

    def add_positions(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """Add what a family has for absolute positions to the (B, L, D) embeddings."""
        return hidden_states

    def prepare(self, sequence: Sequence, hidden_states: Tensor) -> None:
        """Add to `sequence` what the layers of the family share, e.g. rotary tables."""

    def sequence_of(self, hidden_states: Tensor) -> Sequence:
        """Return the :class:`Sequence` of unpadded rows of (B, L, D) hidden states, e.g. to run one mixer alone."""
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
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ZooModelOutput | tuple:
        """Run the blocks.

        Args:
            input_ids: (B, L) token ids; or
            inputs_embeds: (B, L, D) embeddings.
            attention_mask: (B, past + L), non-zero at real tokens; padding may be on the left, right or anywhere.
            position_ids: (B, L) positions, for layers that use them; where they restart, a new document starts.
            past_key_values: cache to continue.
            use_cache: return a cache. If not given, `config.use_cache` decides, except that training, packed rows and
                bidirectional models return none.
            seq_idx: (B, L) document index of each token of a packed row, non-decreasing, negative at padding.
            cu_seqlens: (documents + 1) starts of the documents of a single packed row, then its length.
            output_hidden_states: return the first block's input and every block's output; the last one after the final
                norm.
            output_attentions: return every layer's (B, H, L, past + L) mixing matrix, with a row for each new token.
                For a recurrent layer it is None if the cache holds tokens that were read without this option.
            return_dict: return a ModelOutput rather than a tuple.
            cache: transformers' newer name of `past_key_values`.
            prefix_mask: (B, L), non-zero at the tokens of a prefix, the first ones of a document, which a model with
                `prefix_bidirectional` reads in both directions; only in the forward that begins the document.
            **kwargs: `cu_seq_lens_q` of transformers' padding-free collators and `cache_params`, the name of the cache
                in transformers' Mamba classes, are read. Other accepted keywords (`ACCEPTED_KEYWORDS` in
                `call_arguments.py`) belong to the loss or repeat what is known. `block_inputs`, further arguments of
                the blocks, are passed by families whose blocks read more than their input.

        Raises:
            ValueError: if the arguments contradict each other.
            TypeError: for an unknown argument.
        """
        block_inputs = kwargs.pop("block_inputs", ())
        check_keywords(type(self).__name__, kwargs, ZooModel.forward)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = one_cache(past_key_values, cache, kwargs.get("cache_params"))
        if is_bidirectional(self.config) and (use_cache or past_key_values is not None):
            raise ValueError(
                "a bidirectional model has no cache: use_cache must be False and past_key_values None, "
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
        sequence.prefix = read_prefix(prefix_mask, sequence, config)
        hidden_states = sequence.blank(hidden_states)
        self.prepare(sequence, hidden_states)
        hidden_states = self.add_positions(hidden_states, sequence)
        if use_cache is None:  # by default, a packed row is not a prompt to continue
            use_cache = config.use_cache and not (self.training or sequence.packed or is_bidirectional(config))
        if self.gradient_checkpointing and self.training:
            if sequence.past:
                raise ValueError(
                    "past_key_values must be empty or None with gradient checkpointing, got a cache that holds "
                    f"{sequence.past} tokens"
                )
            use_cache, past_key_values = False, None
        if sequence.packed and (use_cache or past_key_values is not None):
            raise ValueError(
                "packed documents (seq_idx, cu_seqlens) leave no single state to cache: use_cache must be False and "
                f"past_key_values None, got {use_cache} and {past_key_values}"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            check_layers(past_key_values, config.layer_types)

        all_hidden_states: list[Tensor] = [hidden_states] if output_hidden_states else []
        attentions: list[Any] = []
        choices: list[Any] = []
        capacities: list[float | None] = []
        hidden_states = self.split(hidden_states)
        for block in self.layers:
            mixer: Any = getattr(block, "mixer", None)
            if hasattr(mixer, "begin_pass"):
                mixer.begin_pass(sequence)
            hidden_states, attention, *choice = block(
                hidden_states,
                sequence,
                *block_inputs,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            if choice:
                choices.append(choice)
                capacities.append(mixer.wanted_rate)
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
            **(routing_outputs(choices, sequence.real, capacities) if choices else {}),
        )
        return output if return_dict else output.to_tuple()
