"""Encoder-decoder models: an encoder of `zoo_hybrid`'s blocks, and a decoder of such blocks that also read the source.

The translation study of Pitorro et al., "How Effective are State Space Models for Machine Translation?" (arXiv
2407.05489; deep-spin/ssm-mt@ea386cc, `models/hybrids/mamba_encdec.py`) has a decoder of (Mamba, cross-attention, gated
MLP) over an encoder of Mamba layers, or over a Transformer. Here each of the two stacks may have any mixers.

Block of the decoder: `h = h + mixer(norm(h)); h = h + cross(norm(h), source); h = h + mlp(norm(h))`, with the norms,
MLPs and options of `modeling_hybrid.py`. Cross-attention has no positions.

Deviation from the official code: source and target share one embedding, for one vocabulary of both languages. There
each stack has its own, except in its Transformer.

Symbols: B batch, L tokens of the target, M tokens of the source, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput

from ..kernels.tracing import host_reads, tracing
from .assisted_decoding import AssistedDecoding
from .cache import CACHE_FIELD, one_cache
from .call_arguments import check_integer, check_keywords, check_labels, read_mask
from .configuration_encdec import ZooEncDecConfig
from .configuration_hybrid import ZooHybridConfig
from .cross_attention import CrossAttention, SourceLayout
from .heads import ZooGenerates, ZooHeadModel
from .layers import as_weight, make_norm, soft_capped
from .modeling_hybrid import HybridBlock, ZooHybridModel
from .pretrained import ZooPreTrainedModel
from .rollback import recorded
from .token_layout import Sequence

PACK = "pack with seq_idx and decoder_seq_idx, in which a target document has the number of its source document"


class DecoderBlock(HybridBlock):
    """A token mixer, cross-attention and an MLP, each with norms and added to the residual stream."""

    def __init__(self, config: ZooEncDecConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)

        def norm(present: bool) -> nn.Module:
            return make_norm(config.norm_type, config.hidden_size, config.rms_norm_eps) if present else nn.Identity()

        self.cross_attention_layernorm = norm(config.norm_placement != "after")
        self.cross_attention = CrossAttention(config, layer_idx)
        self.cross_output_layernorm = norm(config.norm_placement != "before")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        source_states: Tensor,
        source: SourceLayout,
        cross_cache: EncoderDecoderCache | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """(B, L, D) hidden states to (B, L, D), and the matrices of the mixer and of cross-attention if asked for.

        Args:
            hidden_states: of the target.
            sequence: where its tokens stand.
            source_states: (B, M, D) states of the source, 0 at padding.
            source: which of them a target token sees.
            cross_cache: the cache with the keys and values of the source, or None.
            past_key_values: the cache of the mixers, or None.
            output_attentions: whether to return the matrices.
        """
        matrix = None
        if self.mixer is None:
            recorded(self._skip, self.layer_idx, hidden_states, sequence, past_key_values, output_attentions)
        else:
            read = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
            mixed, matrix = self._mix(read, sequence, past_key_values, output_attentions)
            hidden_states = hidden_states + mixed
        read = self.cross_attention_layernorm(hidden_states)
        found, cross = self.cross_attention(read, source_states, source, sequence, cross_cache, output_attentions)
        hidden_states = hidden_states + self.dropout(self.cross_output_layernorm(found))
        if self.mlp is not None:
            norm = self.post_attention_layernorm
            hidden_states = hidden_states + self._transform(hidden_states if norm is None else norm(hidden_states))
        return hidden_states, (matrix, cross)


class ZooEncDecPreTrainedModel(ZooPreTrainedModel):
    """The family's configuration and blocks."""

    config: ZooEncDecConfig
    config_class = ZooEncDecConfig
    _no_split_modules = ["HybridBlock", "DecoderBlock"]
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def example_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = super().example_inputs(generator)
        return inputs | {"decoder_input_ids": super().example_inputs(generator)["input_ids"][:, 1:]}


class ZooEncDecDecoder(ZooEncDecPreTrainedModel, ZooHybridModel):
    """The decoder's blocks and last norm; it reads embeddings."""

    auto_class = ""

    def make_embeddings(self, config: ZooHybridConfig) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None  # it has the encoder's

    def make_block(self, config: Any, layer_idx: int) -> nn.Module:
        return DecoderBlock(config, layer_idx)


class ZooEncDecEncoder(ZooHybridModel):
    """The encoder's embedding, blocks and last norm."""

    auto_class = ""

    def forward(self, *args: Any, logits_to_keep: int | None = None, **kwargs: Any) -> Any:
        """As in the base class. `generate` gives an assistant's encoder the decoder's `logits_to_keep`, too."""
        return super().forward(*args, **kwargs)


class ZooEncDecModel(ZooEncDecPreTrainedModel):
    """Encoder and decoder without a head."""

    auto_class = "AutoModel"

    def __init__(self, config: ZooEncDecConfig) -> None:
        super().__init__(config)
        encoder_config = config.encoder_config()
        encoder_config._attn_implementation = config._attn_implementation
        self.encoder = ZooEncDecEncoder(encoder_config)
        self.decoder = ZooEncDecDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        decoder_seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput | tuple:
        """Encode the source and run the decoder's blocks.

        Args:
            input_ids: (B, M) token ids of the source; or
            inputs_embeds: (B, M, D) embeddings; or
            encoder_outputs: what the encoder returned for it.
            attention_mask: (B, M), non-zero at the source's real tokens; padding may be anywhere.
            decoder_input_ids: (B, L) token ids of the target, each document from `decoder_start_token_id` on; or
            decoder_inputs_embeds: (B, L, D) embeddings.
            decoder_attention_mask: (B, past + L), non-zero at the target's real tokens. Without it, padding before the
                first token of a target is found by `pad_token_id`, since no target starts with it. Padding behind the
                last token needs no mask.
            past_key_values: `EncoderDecoderCache` to continue, of `DynamicCache(config=model.config)` and
                `DynamicCache()`.
            use_cache: return a cache. If not given, `config.use_cache` decides, except that there is none in training,
                for packed rows, and for targets that are padded in front without a mask.
            seq_idx: (B, M) number of the document of each token of a packed source, non-decreasing, negative at
                padding.
            decoder_seq_idx: the same for the target, (B, L). A document of the target reads the source document with
                its number.
            output_hidden_states: return the states of both stacks.
            output_attentions: return the mixing matrices of both stacks, and those of cross-attention, (B, H, L, M).
            return_dict: return a ModelOutput rather than a tuple.
            cache: transformers' newer name of `past_key_values`.
            **kwargs: accepted where they belong to the loss or repeat what is known (`ACCEPTED_KEYWORDS` in
                `call_arguments.py`).

        Raises:
            ValueError: if the arguments contradict each other.
            TypeError: for an unknown argument.
        """
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be left out: {PACK}")
        past = one_cache(past_key_values, cache, kwargs.pop("cache_params", None))
        check_keywords(type(self).__name__, kwargs, ZooEncDecModel.forward)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("pass exactly one of decoder_input_ids and decoder_inputs_embeds")
        if not (past is None or isinstance(past, EncoderDecoderCache)):
            raise ValueError(
                "past_key_values must be EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache()), got "
                f"{type(past).__name__}"
            )
        if (seq_idx is None) != (decoder_seq_idx is None):
            raise ValueError(f"seq_idx and decoder_seq_idx must both be given or both be left out: {PACK}")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        config = self.config
        options = {
            "output_hidden_states": config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
        }
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, seq_idx=seq_idx, return_dict=True, **options
            )
        elif input_ids is not None or inputs_embeds is not None:
            raise ValueError("pass exactly one of input_ids, inputs_embeds and encoder_outputs")
        elif not hasattr(encoder_outputs, "last_hidden_state"):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embeddings(decoder_input_ids)
        assert isinstance(decoder_inputs_embeds, Tensor)
        length = 0 if past is None else past.get_seq_length()
        padded = False
        if decoder_attention_mask is None and decoder_seq_idx is None and decoder_input_ids is not None and not length:
            decoder_attention_mask = self._leading_padding(decoder_input_ids, past)
            padded = decoder_attention_mask is not None and not tracing()
        if padded and (use_cache or past is not None):
            raise ValueError(
                f"decoder_attention_mask must be given for targets that are padded in front (pad_token_id "
                f"{self.config.pad_token_id}) if they are to be continued from a cache, got None"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or seq_idx is not None or padded)
        checkpointing = self.decoder.gradient_checkpointing and self.training
        if checkpointing:
            use_cache = False
        if use_cache and past is None:
            past = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())

        if decoder_seq_idx is not None:
            _check_shape("decoder_seq_idx", decoder_seq_idx, decoder_inputs_embeds)
            if decoder_attention_mask is not None:
                _check_shape("decoder_attention_mask", decoder_attention_mask, decoder_inputs_embeds)
                decoder_seq_idx = decoder_seq_idx.masked_fill(
                    decoder_attention_mask.to(decoder_seq_idx.device) == 0, -1
                )
        states, source = self._source(encoder_outputs.last_hidden_state, attention_mask, seq_idx, decoder_seq_idx)
        outputs = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            cache=None if past is None else past.self_attention_cache,
            use_cache=use_cache,
            seq_idx=decoder_seq_idx,
            return_dict=True,
            block_inputs=(states, source, None if checkpointing else past),
            **options,
        )
        pairs = None if outputs.attentions is None else tuple(zip(*outputs.attentions, strict=True))
        output = Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=None if pairs is None else pairs[0],
            cross_attentions=None if pairs is None else pairs[1],
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE_FIELD: past if use_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def _leading_padding(self, ids: Tensor, past: Cache | None) -> Tensor | None:
        """Return the (B, L) mask of targets that are padded in front, as a collator makes them; None for none.

        The first token of a target may have the id of padding: it is the last of those in front. A graph cannot read
        whether there is padding, and has a mask in any case, unless it has a cache.
        """
        pad = self.config.pad_token_id
        if pad is None or ids.shape[1] == 1 or ids.numel() == 0 or (tracing() and past is not None):
            return None
        front = (ids == pad).cumprod(1) != 0
        if pad == self.config.start_token_id:
            front = torch.cat([front[:, 1:], torch.zeros_like(front[:, :1])], dim=1)
        return (~front).long() if tracing() or bool(front.any()) else None

    def _source(
        self,
        states: Tensor,
        attention_mask: Tensor | None,
        seq_idx: Tensor | None,
        decoder_seq_idx: Tensor | None,
    ) -> tuple[Tensor, SourceLayout]:
        """Return the (B, M, D) states of the source with zeros at padding, and which of them the target sees."""
        real = None
        if attention_mask is not None:
            _check_shape("attention_mask", attention_mask, states)
            real = read_mask(attention_mask)
        real = None if real is None else real.to(states.device)
        documents = None if real is None else real.long() - 1
        targets = None
        if seq_idx is not None and decoder_seq_idx is not None:
            for name, given in (("seq_idx", seq_idx), ("decoder_seq_idx", decoder_seq_idx)):
                check_integer(name, given)
            _check_shape("seq_idx", seq_idx, states)
            documents, targets = seq_idx.long().to(states.device), decoder_seq_idx.long().to(states.device)
            documents = documents if real is None else documents.masked_fill(~real, -1)
        source = SourceLayout(documents, targets)
        if targets is not None and host_reads(targets):
            blind = source.mask()[1]
            alone = (blind & (targets >= 0)).nonzero() if blind is not None else []
            if len(alone):
                row, column = alone[0].tolist()
                raise ValueError(
                    f"decoder_seq_idx must have documents of seq_idx only, got {int(targets[row, column])} in row "
                    f"{row}, which seq_idx lacks there: {PACK}"
                )
        if documents is not None:
            states = states.masked_fill((documents < 0)[..., None], 0)
        return states, source


def _check_shape(name: str, given: Tensor, states: Tensor) -> None:
    """Raise ValueError unless an argument has an entry for each token of (B, L, D) states."""
    if given.shape != states.shape[:2]:
        raise ValueError(f"{name} must be one for each token, {tuple(states.shape[:2])}, got {tuple(given.shape)}")


class ZooEncDecForConditionalGeneration(
    ZooEncDecPreTrainedModel, ZooHeadModel, AssistedDecoding, ZooGenerates, GenerationMixin
):
    """Encoder and decoder with a language-modelling head, e.g. for translation."""

    _tied_weights_keys = {"lm_head.weight": "backbone.encoder.embeddings.weight"}
    auto_class = "AutoModelForSeq2SeqLM"
    loss_name = "ForCausalLM"
    backbone_class = ZooEncDecModel

    def __init__(self, config: ZooEncDecConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        """As in transformers, except that the cache of cross-attention holds keys and values in every layer."""
        given = model_kwargs.get(CACHE_FIELD)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # pyright: ignore[reportAttributeAccessIssue]
        made = model_kwargs.get(CACHE_FIELD)
        if made is not given and isinstance(made, EncoderDecoderCache):
            model_kwargs[CACHE_FIELD] = EncoderDecoderCache(made.self_attention_cache, DynamicCache())

    def generate(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers, whose `Seq2SeqTrainer` passes the labels as well; they have no effect."""
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Return the (B, L) ids that the decoder reads to predict (B, L) labels: each document one token later.

        The token before the first label is `decoder_start_token_id`; what is before that, and labels of -100, become
        `pad_token_id`.

        Args:
            labels: token ids, -100 where there is no loss; padding may be on either side.
            seq_idx: (B, L) number of the document of each label in packed rows.

        Raises:
            ValueError: if the configuration lacks one of the two tokens, or the shapes differ.
        """
        if seq_idx is not None and seq_idx.shape != labels.shape:
            raise ValueError(
                f"decoder_seq_idx must be {tuple(labels.shape)}, as the labels, got {tuple(seq_idx.shape)}"
            )
        start, pad = self.config.start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError(
                "decoder_start_token_id or bos_token_id must be set to make the decoder's inputs, got None"
            )
        if pad is None and bool((labels == -100).any()):
            raise ValueError("pad_token_id must be set to make the decoder's inputs from labels of -100, got None")
        ids = torch.full_like(labels, start if pad is None else pad)
        ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, ids.new_tensor(0 if pad is None else pad))
        if labels.numel() == 0:
            return ids
        if seq_idx is not None:
            first = torch.ones_like(labels, dtype=torch.bool)
            first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
            return ids.masked_fill(first, start)
        first = (labels != -100).int().argmax(1, keepdim=True)
        return ids.scatter(1, first, start)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        decoder_seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple:
        """Logits of the target, and the loss if `labels` are given.

        Arguments as in :meth:`ZooEncDecModel.forward`, and:

        Args:
            labels: (B, L) token ids that the decoder is to predict, -100 where there is no loss. They are not shifted;
                `decoder_input_ids` are made of them if not given.
            logits_to_keep: compute the logits of that many last positions only (0: all), or of the given positions.
            **kwargs: `num_items_in_batch` is passed to the loss.

        Returns:
            `logits` (B, L or fewer, V) in the head's dtype, `loss`, the cache under transformers' name for it,
            `decoder_hidden_states`, `decoder_attentions`, `cross_attentions`, `encoder_last_hidden_state`,
            `encoder_hidden_states`, `encoder_attentions`.
        """
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels must be left out: labels are not shifted in an encoder-decoder model")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, decoder_seq_idx)
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=one_cache(past_key_values, cache, kwargs.pop("cache_params", None)),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            decoder_seq_idx=decoder_seq_idx,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep != 0:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = self.lm_head(as_weight(self.lm_head, hidden_states))
        if self.config.final_logit_softcapping is not None:
            logits = soft_capped(logits, self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            labels = labels.contiguous()
            loss = self.loss(logits, labels, vocab_size=self.config.vocab_size, shift_labels=labels, **kwargs)
        parts = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = Seq2SeqLMOutput(loss=loss, logits=logits, **parts)
        return output if return_dict else output.to_tuple()


__all__ = ["ZooEncDecForConditionalGeneration", "ZooEncDecModel", "ZooEncDecPreTrainedModel"]
