"""The heads that all families share: causal and masked language models, sequence and token classification.

Embeddings need no head: `AutoModel` returns the last hidden states, which sentence-transformers' `Pooling` reads.

Symbols: B batch, L new tokens, V vocabulary.
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..kernels.tracing import tracing
from .backbone import ZooModel
from .cache import CACHE_FIELD, one_cache
from .layers import as_weight
from .outputs import ROUTING_FIELDS, ZooCausalLMOutput, add_aux_loss, warn_of_missing_aux_loss
from .pretrained import ZooPreTrainedModel, is_bidirectional
from .rollback import RECORDED, recording_layers, stop_recording
from .token_layout import check_labels

logger = logging.get_logger(__name__)

_OF_TOKENS = ("output_hidden_states", "output_attentions")
_READ = "_columns_read"
"""Attribute of a cache during assisted decoding: columns of the prompt that it holds already."""

_TABLES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def enter_class_name(auto_class: str, name: str) -> None:
    """Register a class for an Auto class under its own name, as a model type may have several classes."""
    _TABLES[auto_class][name] = name


class ZooHeadModel(ZooPreTrainedModel):
    """Base class of heads, with the backbone under one name, so that a checkpoint of one head loads into another."""

    backbone_class: ClassVar[type[ZooModel]]
    loss_name: ClassVar[str]
    """transformers' name of the loss, which it would otherwise guess from the name of the class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.auto_class and cls.config_class is not None:
            enter_class_name(cls.auto_class, cls.__name__)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.loss_type = self.loss_name
        self.backbone = self.backbone_class(config)

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Return the () loss of (B, ...) logits and labels; 0 for an empty batch, whose mean would be NaN.

        `kwargs` are passed to transformers' loss.
        """
        if labels.shape[0] == 0:
            return logits.sum().float()
        return self.loss_function(logits=logits, labels=labels, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


class ZooForCausalLM(ZooHeadModel, GenerationMixin):
    """A language-modelling head over a family's backbone."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    auto_class = "AutoModelForCausalLM"
    loss_name = "ForCausalLM"

    def __init__(self, config: PreTrainedConfig) -> None:
        if is_bidirectional(config):
            raise ValueError(
                "`bidirectional` must be False for a causal language model, got True: tokens would see what they "
                "predict. Load an encoder with AutoModel, AutoModelForMaskedLM or a classification head"
            )
        super().__init__(config)
        self.lm_head = self.make_head(config)
        self.post_init()

    def make_head(self, config: PreTrainedConfig) -> nn.Linear:
        """Build the linear layer from hidden states to logits."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def scale_logits(self, logits: Tensor) -> Tensor:
        """Return the logits for what the head has computed: the same in most families."""
        return logits

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Return the 2-D mask: `generate` would make it 4-D for a static cache, but recurrent layers read it too."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        """As in transformers. Versions before 5.24 call the cache `cache_params` if the class has "mamba" in its name,
        whatever its forward calls it."""
        renames = CACHE_FIELD == "past_key_values" and "mamba" in type(self).__name__.lower()
        if renames and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # pyright: ignore[reportAttributeAccessIssue]
        if renames and "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Return False: caches count columns in Python integers, so that each token would be compiled again."""
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` has no effect: `generate` does not compile these models")
        return False

    # generate inspects the signature
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, but in assisted decoding without what the cache already holds."""
        read = getattr(kwargs.get(CACHE_FIELD), _READ, 0)
        if read and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = input_ids.shape[1] - read
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _assisted_decoding(self, input_ids: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """As in transformers, which here would read a prompt in one piece, whatever `prefill_chunk_size` is, and with a
        cache that holds its first tokens would read these again. A cache of the caller's is left not recording."""
        cache, settings, mask = kwargs.get(CACHE_FIELD), kwargs["generation_config"], kwargs.get("attention_mask")
        if cache is None:
            raise ValueError(
                "use_cache must be True for assisted decoding, which takes rejected tokens back, got False"
            )
        columns = getattr(settings, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        # Shorter ids than the mask are the new ones alone.
        if kwargs.get("inputs_embeds") is None and columns == input_ids.shape[1]:
            read, positions = int(cache.get_seq_length()), kwargs.get("position_ids")
            if read >= columns:
                raise ValueError(f"input_ids must go on after the {read} tokens that the cache holds, got {columns}")
            for part in input_ids[:, read:-1].split(settings.prefill_chunk_size or columns, dim=1):
                if settings.prefill_chunk_size is None or not part.shape[1]:
                    break
                end = read + part.shape[1]
                self.backbone(
                    part,
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=None if positions is None else positions[:, read:end],
                    cache=cache,
                    use_cache=True,
                )
                read = end
            setattr(cache, _READ, read)
        try:
            return super()._assisted_decoding(input_ids, *rest, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            vars(cache).pop(_READ, None)
            stop_recording(cache)

    def _read_unrecorded(self, arguments: dict[str, Any], logits_to_keep: int | Tensor) -> dict[str, Any]:
        """Read the first columns of a long prompt without recording them: no draft is part of them.

        Args:
            arguments: of the backbone.
            logits_to_keep: as in :meth:`forward`; assisted decoding keeps those of the draft.

        Returns:
            The arguments for the other columns: the same if nothing was read.
        """
        layers = recording_layers(arguments["cache"])
        asked = [getattr(self.config, name) if arguments[name] is None else arguments[name] for name in _OF_TOKENS]
        if not layers or any(asked) or not isinstance(logits_to_keep, int) or not logits_to_keep:
            return arguments
        given = [name for name in ("input_ids", "inputs_embeds", "position_ids") if arguments[name] is not None]
        columns = min(arguments[name].shape[1] for name in given) - max(logits_to_keep, RECORDED)
        if columns < RECORDED:
            return arguments
        first = arguments | {name: arguments[name][:, :columns] for name in given}
        if arguments["attention_mask"] is not None:
            past = arguments["cache"].get_seq_length()
            first["attention_mask"] = arguments["attention_mask"][:, : past + columns]
        for layer in layers:
            layer.record_past = False
        self.backbone(**first)
        for layer in layers:
            layer.record_past = True
        return arguments | {name: arguments[name][:, columns:] for name in given}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ZooCausalLMOutput | tuple:
        """Next-token logits, and the loss if `labels` are given. Arguments as in :meth:`ZooModel.forward`, and:

        Args:
            labels: (B, L) token ids, -100 where there is no loss; shifted inside. In packed rows set the label of
                each document's first token to -100, as transformers' padding-free collators do.
            logits_to_keep: compute the logits of that many last positions only (0: all), or of the given
                positions.
            **kwargs: `num_items_in_batch` is passed to the loss.

        Returns:
            `logits` (B, L or fewer, V) in the head's dtype (of its inputs if it is quantised); `loss`, the cache under
            transformers' name for it, `hidden_states`, `attentions`. A model that selects tokens also returns
            `aux_loss`, `router_logits` and `selection_rate` (:class:`ZooModelOutput`); in training the loss includes
            the weighted `aux_loss`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": one_cache(past_key_values, cache, kwargs.pop("cache_params", None)),
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "seq_idx": seq_idx,
            "cu_seqlens": cu_seqlens,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "return_dict": True,
            **kwargs,
        }
        if labels is None:
            arguments = self._read_unrecorded(arguments, logits_to_keep)
        outputs = self.backbone(**arguments)
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep != 0:  # a slice by a variable 0 has an unknown length in a traced graph
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = self.scale_logits(self.lm_head(as_weight(self.lm_head, hidden_states)))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                loss = add_aux_loss(loss, outputs, self.config, labels[:, 1:], kwargs.get("num_items_in_batch"))
        elif self.training and kwargs.get("num_items_in_batch") is not None:
            warn_of_missing_aux_loss(outputs, self.config)
        output = ZooCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE_FIELD, *ROUTING_FIELDS)},
        )
        return output if return_dict else output.to_tuple()


class ZooForSequenceClassification(ZooHeadModel):
    """A linear `score` without bias on the hidden state of each row's last real token.

    Parameter, labels and losses are those of transformers' classification heads on causal models. Those find the last
    token from the ids, and skip a real end-of-text token if padding has the same id; here the mask decides.
    """

    auto_class = "AutoModelForSequenceClassification"
    loss_name = "ForSequenceClassification"
    # For the Trainer: the loss is a mean over the rows of this call and does not use `num_items_in_batch`.
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0), bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Label rows. Arguments as in :meth:`ZooModel.forward`, which `kwargs` go to, and:

        Args:
            attention_mask: (B, past + L), non-zero at real tokens; the last one among the L is read. Without a mask it
                is the last token other than `config.pad_token_id`, or the last column if that is not set.
            labels: (B) classes; (B) or (B, num_labels) numbers for regression; or (B, num_labels) of 0.0 and 1.0 for
                several labels at once. `config.problem_type` selects "single_label_classification", "regression" or
                "multi_label_classification"; if not set, `num_labels` and the dtype decide, as in transformers.
            use_cache: return a cache to continue; False by default.

        Returns:
            `logits` (B, num_labels) in the head's dtype, `loss`, the cache under transformers' name for it,
            `hidden_states`, `attentions`.

        Raises:
            ValueError: if the arguments contradict each other, or rows hold more than one document.
        """
        packed = seq_idx is not None or cu_seqlens is not None or kwargs.get("cu_seq_lens_q") is not None
        if not packed and position_ids is not None and attention_mask is None and not tracing():
            packed = bool((position_ids.diff(dim=1) != 1).any())
        if packed:
            raise ValueError(
                "seq_idx and cu_seqlens must be None and position_ids must not restart, as a row must be one document "
                "to get one set of logits. Pad the documents instead"
            )
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache, kwargs.pop("cache_params", None)),
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        row = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        pooled = hidden_states[row, self._last_tokens(hidden_states, input_ids, attention_mask)]
        logits = self.score(as_weight(self.score, pooled))
        loss = None
        if labels is not None:
            loss = self.loss(logits, labels, pooled_logits=logits.float(), config=self.config)
            if self.training:
                loss = add_aux_loss(loss, outputs, self.config, labels)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _last_tokens(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return the (B or 1) column of each row's last real token; 0 in a row of padding."""
        column = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        if attention_mask is not None:
            real = attention_mask[:, -len(column) :] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            return column[-1:]
        return (column * real.to(column.device)).amax(-1)


class _ZooTokenHead(ZooHeadModel):
    """A linear layer on every token's hidden state, with a loss at every token; `output_class` holds the results."""

    output_class: type[TokenClassifierOutput] | type[MaskedLMOutput]

    def head(self) -> nn.Linear:
        """Return the linear layer."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | MaskedLMOutput | tuple:
        """Logits of every token. Arguments as in :meth:`ZooModel.forward`, which `kwargs` go to, and:

        Args:
            labels: (B, L) classes or token ids, -100 where there is no loss.
            **kwargs: `num_items_in_batch` is passed to the loss.

        Returns:
            `logits` (B, L, num_labels or V) in the head's dtype, `loss`, `hidden_states`, `attentions`.
        """
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **{"use_cache": False, **kwargs},
        )
        head = self.head()
        logits = head(as_weight(head, outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            sizes = {"config": self.config, "vocab_size": self.config.vocab_size}  # each is read by one of the losses
            loss = self.loss(logits, labels, **sizes, **kwargs)
            if self.training:
                loss = add_aux_loss(loss, outputs, self.config, labels, kwargs.get("num_items_in_batch"))
        elif self.training and kwargs.get("num_items_in_batch") is not None:
            warn_of_missing_aux_loss(outputs, self.config)
        output = self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class ZooForTokenClassification(_ZooTokenHead):
    """A linear `score` with bias on every token."""

    output_class = TokenClassifierOutput
    auto_class = "AutoModelForTokenClassification"
    loss_name = "ForTokenClassification"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    def head(self) -> nn.Linear:
        return self.score


class ZooForMaskedLM(_ZooTokenHead):
    """A masked-language-modelling head over a bidirectional backbone, to pretrain encoders."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    output_class = MaskedLMOutput
    auto_class = "AutoModelForMaskedLM"
    loss_name = "ForMaskedLM"

    def __init__(self, config: PreTrainedConfig) -> None:
        if not is_bidirectional(config):
            raise ValueError(
                "`bidirectional` must be True for a masked language model, got False: a token that does not see later "
                "ones cannot fill a gap. Load a causal model with AutoModelForCausalLM"
            )
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def head(self) -> nn.Linear:
        return self.lm_head
