"""The shell that all families share: embedding, loop over blocks, final norm, head, loss, cache and saving.

What is peculiar to a model (its mixer, its block, its initialisation) stands in its own `modeling_<m>.py`.

Symbols: B batch, L length, D width, V vocabulary.
"""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from ..kernels.rms_norm import add_rms_norm, rms_norm
from .adapter_ties import UntiesUnderAdapters
from .cache import CACHE_FIELD, check_layers, one_cache
from .class_names import enter_class_name
from .input_checks import check_keywords, check_labels
from .layers import as_weight
from .mixer_parameters import KeepsFloat32
from .outputs import (
    ROUTING_FIELDS,
    ZooCausalLMOutput,
    ZooModelOutput,
    add_aux_loss,
    routing_outputs,
    tell_of_lost_aux_loss,
)
from .saved_folder import push_folder, remove_stale_weights, write_default_card, written_weights
from .token_layout import Sequence, make_sequence

_EXAMPLE_TOKENS = 16

logger = logging.get_logger(__name__)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(..., D) normed; with `residual` the norm of `residual + hidden_states`, and that sum."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.eps)
        return add_rms_norm(hidden_states, residual, self.weight, self.eps)


def normed(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """The (..., D) hidden states through a norm, in the dtype of its weight."""
    return norm(as_weight(norm, hidden_states))


def is_bidirectional(config: PreTrainedConfig) -> bool:
    """Whether a token sees those after it, too: then there is no cache, and nothing to generate."""
    return getattr(config, "bidirectional", False)


class ZooPreTrainedModel(KeepsFloat32, UntiesUnderAdapters, PreTrainedModel):
    """What every zoo model is: stateful, exported with its code, and with some parameters in float32
    (`mixer_parameters.py`)."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    auto_classes: ClassVar[dict[str, str]] = {}
    """Auto class of transformers to class name, for its registry and the exported config's `auto_map`."""
    publisher: ClassVar[Any] = None
    """The module `hub_code`, which writes code and pushes. None in exported code, which transformers copies."""

    def post_init(self) -> None:
        # The blocks of this model: accelerate refuses a name that it does not find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules or [] if name in present]
        super().post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save weights, config, the code that loads them, its licence and a card: a folder that needs no ssm-zoo.

        Arguments as in transformers; with `push_to_hub=True` those of :meth:`push_to_hub` too. A model that was
        itself loaded with `trust_remote_code` saves its own code; one that carries adapters saves the adapters
        alone.
        """
        adapters = self._saves_adapters()
        if not adapters:
            self.name_classes()
        push = kwargs.pop("push_to_hub", False)
        options = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags", "replace")
        hub = {key: kwargs.pop(key) for key in options if key in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        folder = Path(save_directory)
        before = written_weights(folder)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            remove_stale_weights(folder, before)
            if not adapters:
                self.save_code(folder)
            if push:
                self._upload(folder, repo_id, token=kwargs.get("token"), **hub)

    def name_classes(self) -> None:
        """Say in the configuration's `auto_map` which class of the saved code each Auto class takes."""
        modeling, configuration = type(self).__module__, type(self.config).__module__
        # A configuration from the Hub names the repository that it came from; the code is saved here too.
        self.config.auto_map = {
            "AutoConfig": f"{configuration.rpartition('.')[2]}.{type(self.config).__name__}",
            **{auto: f"{modeling.rpartition('.')[2]}.{name}" for auto, name in self.auto_classes.items()},
        }

    def save_code(self, folder: Path) -> None:
        """Write what a folder with weights and configurations lacks: the code that loads them, its licence, a card."""
        if self.publisher is not None:
            self.publisher.write_code(folder, self)
        write_default_card(
            folder,
            model_type=self.config.model_type,
            class_name=type(self).__name__,
            auto_class=self._auto_class_name(),
            parameters=self.num_parameters(),
        )

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
        replace: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes. A card that the repository already has is kept.

        Weights and code that an earlier upload left are removed. Arguments as in transformers, and:

        Args:
            replace: also remove weights and adapters that no upload of this kind wrote, but that loading the
                repository would take; otherwise they are an error.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self._upload(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
                replace=replace,
            )

    def _upload(self, folder: Path, repo_id: str, **options: Any) -> str:
        return (push_folder if self.publisher is None else self.publisher.upload)(folder, repo_id, **options)

    def example_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random arguments of a forward, to compare what two loads of the model compute."""
        length = min(_EXAMPLE_TOKENS, getattr(self.config, "max_position_embeddings", _EXAMPLE_TOKENS))
        return {"input_ids": torch.randint(self.config.vocab_size, (1, length), generator=generator)}

    @classmethod
    def _auto_class_name(cls) -> str:
        """The Auto class that loads this model; of a subclass, that of the class it is made of."""
        autos = {name: auto for auto, name in cls.auto_classes.items()}
        return next((autos[kind.__name__] for kind in cls.__mro__ if kind.__name__ in autos), "AutoModel")

    def _saves_adapters(self) -> bool:
        return bool(getattr(self, "_hf_peft_config_loaded", False))


class ZooModel(ZooPreTrainedModel):
    """Embedding, blocks and final norm. A family says in `make_block` what a block is.

    A block is called as `block(hidden_states, sequence, past_key_values=..., output_attentions=...)` and returns
    the (B, L, D) hidden states and its (B, H, L, past + L) mixing matrix, or None if that was not asked for; one that
    chooses tokens also its (B, L, 2) scores and (B, L) decisions.
    """

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
                new (`input_checks.py`).

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


class ZooHeadModel(ZooPreTrainedModel):
    """A family's `backbone_class`, where every head finds it: a checkpoint of one head loads into another."""

    backbone_class: ClassVar[type[ZooModel]]
    loss_name: ClassVar[str]
    """transformers' name of the loss, which it would guess from the name of the class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        auto_class = cls._auto_class_name()
        if auto_class != "AutoModel":
            enter_class_name(auto_class, cls.__name__)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.loss_type = self.loss_name
        self.backbone = self.backbone_class(config)

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """() loss of the logits; 0 of an empty batch, of which a mean would be NaN.

        Args:
            logits: (B, ...).
            labels: (B, ...).
            **kwargs: what transformers' loss takes.
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
    loss_name = "ForCausalLM"

    def __init__(self, config: PreTrainedConfig) -> None:
        if is_bidirectional(config):
            raise ValueError(
                "bidirectional: a causal language model needs False, got True: its tokens would see what they predict. "
                "Load an encoder with AutoModel, AutoModelForMaskedLM or a classification head"
            )
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The 2-D mask itself: `generate` would make it 4-D for a static cache, and recurrent layers read it too."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Never: caches count their columns in Python numbers, and compiled decoding would run anew for every token."""
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` has no effect: generate runs these models without compiling them")
        return False

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
            **kwargs: `num_items_in_batch` goes to the loss.

        Returns:
            `logits` (B, L or fewer, V) in the head's dtype or, of a quantised one, that of its inputs; `loss`, the
            cache under transformers' name for it, `hidden_states`, `attentions`; of a model that chooses tokens also
            `aux_loss`, `router_logits` and `selection_rate` (:class:`ZooModelOutput`), and while training the weighted
            `aux_loss` in the loss.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache, kwargs.pop("cache_params", None)),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep != 0:  # a slice by a variable 0 would leave a traced graph unsure of the length
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = self.lm_head(as_weight(self.lm_head, hidden_states))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                loss = add_aux_loss(loss, outputs, self.config, labels[:, 1:], kwargs.get("num_items_in_batch"))
        elif self.training and kwargs.get("num_items_in_batch") is not None:
            tell_of_lost_aux_loss(outputs, self.config)
        output = ZooCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE_FIELD, *ROUTING_FIELDS)},
        )
        return output if return_dict else output.to_tuple()
