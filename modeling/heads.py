"""The heads that all families share: causal and masked language models, sequence and token classification.

Embeddings need no head: `AutoModel` returns the last hidden states, which sentence-transformers' `Pooling` reads.

Symbols: B batch, L new tokens, V vocabulary.
"""

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..kernels.tracing import tracing
from .assisted_decoding import READ, AssistedDecoding
from .cache import CACHE_FIELD, one_cache
from .call_arguments import check_labels
from .layers import as_weight
from .outputs import ROUTING_FIELDS, ZooCausalLMOutput, add_aux_loss, warn_of_missing_aux_loss
from .prefix import check_prefix_labels, generation_prefix
from .pretrained import ZooPreTrainedModel, is_bidirectional
from .token_layout import make_sequence

logger = logging.get_logger(__name__)

_TABLES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def enter_class_name(auto_class: str, name: str) -> None:
    """Register a class for an Auto class under its own name, as a model type may have several classes."""
    _TABLES[auto_class][name] = name


class ZooHeadModel(ZooPreTrainedModel):
    """Base class of heads, with the backbone under one name, so that a checkpoint of one head loads into another."""

    backbone_class: ClassVar[type[ZooPreTrainedModel]]
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


class ZooGenerates(GenerationMixin):
    """`generate` for models whose cache layers count columns themselves."""

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Return the 2-D mask: `generate` would make it 4-D for a static cache, but recurrent layers read it too."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Return False: caches count columns in Python integers, so that each token would be compiled again."""
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` has no effect: `generate` does not compile these models")
        return False


class ZooForCausalLM(ZooHeadModel, AssistedDecoding, ZooGenerates, GenerationMixin):
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

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, with the `prefix_mask` of the prompt only in the forward that reads the prefix, and in
        assisted decoding without what the cache already holds."""
        mask, read = kwargs.pop("prefix_mask", None), getattr(kwargs.get(CACHE_FIELD), READ, 0)
        if read and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = input_ids.shape[1] - read
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if mask is not None:
            new = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
            held = inputs.get(CACHE_FIELD)
            past = 0 if held is None else int(held.get_seq_length())
            inputs["prefix_mask"] = generation_prefix(mask.to(new.device), new.shape[1], past)
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        """As in transformers. Versions before 5.24 call the cache `cache_params` if the class has "mamba" in its name,
        whatever its forward calls it."""
        renames = CACHE_FIELD == "past_key_values" and "mamba" in type(self).__name__.lower()
        if renames and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # pyright: ignore[reportAttributeAccessIssue]
        if renames and "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")

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
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ZooCausalLMOutput | tuple:
        """Next-token logits, and the loss if `labels` are given. Arguments as in :meth:`ZooModel.forward`, and:

        Args:
            labels: (B, L) token ids, -100 where there is no loss; shifted inside. In packed rows set the label of
                each document's first token to -100, as transformers' padding-free collators do, and those of a prefix
                that is read in both directions.
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
            "prefix_mask": prefix_mask,
            **kwargs,
        }
        if labels is None:
            arguments = self.read_unrecorded(arguments, logits_to_keep)
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
            if prefix_mask is not None:
                if kwargs.get("shift_labels") is not None:
                    raise ValueError("shift_labels must be left out with prefix_mask: pass labels, -100 in the prefix")
                check_prefix_labels(labels, prefix_mask, kwargs.get("ignore_index", -100))
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
    """A linear `score` without bias on the hidden state of the last real token of each row, or packed document.

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
        """Label documents, B rows or the documents packed into them. Arguments as in :meth:`ZooModel.forward`, which
        `kwargs` go to, and:

        Args:
            attention_mask: (B, past + L), non-zero at real tokens; the last one among the L is read. Without a mask it
                is the last token other than `config.pad_token_id`, or the last column if that is not set.
            labels: (B) classes; (B) or (B, num_labels) numbers for regression; or (B, num_labels) of 0.0 and 1.0 for
                several labels at once. `config.problem_type` selects "single_label_classification", "regression" or
                "multi_label_classification"; if not set, `num_labels` and the dtype decide, as in transformers.
            use_cache: return a cache to continue; False by default.
            seq_idx, cu_seqlens: documents packed into rows. There is one set of logits and of labels for each document
                then, in the order of the rows and of the documents in a row. `position_ids` that restart, without a
                mask, also mark documents.

        Returns:
            `logits` (B or documents, num_labels) in the head's dtype, `loss`, the cache under transformers' name for
            it, `hidden_states`, `attentions`.

        Raises:
            ValueError: if the arguments contradict each other, the labels are not one for each row or document, or the
                family does not read packed documents.
        """
        if cu_seqlens is None and seq_idx is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        cache = one_cache(past_key_values, cache, kwargs.pop("cache_params", None))
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        may_restart = position_ids is not None and attention_mask is None and cache is None and not tracing()
        layout = None
        if seq_idx is not None or cu_seqlens is not None or may_restart:
            layout = make_sequence(
                hidden_states.shape[0],
                hidden_states.shape[1],
                hidden_states.device,
                attention_mask=attention_mask,
                position_ids=position_ids,
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens,
            )
        if layout is not None and layout.packed and layout.seq_idx is not None:
            pooled = hidden_states[last_of_documents(layout.seq_idx)]
        else:
            row = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            pooled = hidden_states[row, self._last_tokens(hidden_states, input_ids, attention_mask)]
        logits = self.score(as_weight(self.score, pooled))
        loss = None
        if labels is not None:
            # A loss would broadcast another number of labels, as of padding rows without a document.
            if labels.shape[:1] != logits.shape[:1]:
                raise ValueError(
                    f"`labels` must have one entry for each of the {logits.shape[0]} rows or packed documents, got "
                    f"shape {tuple(labels.shape)}."
                )
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


def last_of_documents(seq_idx: Tensor) -> Tensor:
    """Return (B, L) True at the last real token of every document.

    Args:
        seq_idx: (B, L) document index, non-decreasing in a row, negative at padding, which may be anywhere.
    """
    beyond = torch.iinfo(seq_idx.dtype).max
    documents = seq_idx.masked_fill(seq_idx < 0, beyond)
    # Indices do not decrease, so the smallest one from a column on is that of the next real token.
    following = documents.flip(1).cummin(1).values.flip(1)
    return (seq_idx >= 0) & (F.pad(following[:, 1:], (0, 1), value=beyond) != seq_idx)


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
