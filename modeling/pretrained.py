"""What every model of the zoo is: saved and pushed with its code, some parameters in float32, untied under adapters."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .hub_code import remove_stale_weights, upload, write_code, write_default_card, written_weights
from .mixer import under_fsdp, warn_of_dtype

_EXAMPLE_TOKENS = 16

logger = logging.get_logger(__name__)


def is_bidirectional(config: PreTrainedConfig) -> bool:
    """Whether a token sees those after it, too: then there is no cache, and nothing to generate."""
    return getattr(config, "bidirectional", False)


class KeepsFloat32:
    """A model with mixers whose `float32_parameters` stay in float32 (`mixer.py`)."""

    def post_init(self) -> None:
        assert isinstance(self, nn.Module)
        # Those of this model: transformers takes a name that is not there for a mistake.
        self._keep_in_fp32_modules_strict = [
            kept
            for kept in self.names_in_float32()
            if not under_fsdp() and any(_is(name, kept) for name, _ in self.named_parameters())
        ]
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def names_in_float32(self) -> list[str]:
        """Names of the parameters that stay in float32, which the mixers know."""
        assert isinstance(self, nn.Module)
        kinds = {type(module) for module in self.modules()}
        return sorted({name for kind in kinds for name in getattr(kind, "float32_parameters", ())})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        kinds = self.names_in_float32()
        for name, parameter in self.named_parameters():
            found = [kept for kept in kinds if _is(name, kept)]
            if found and parameter.dtype in (torch.float16, torch.bfloat16):
                remedy = "they stay in float32 where the dtype is given to from_pretrained or from_config instead"
                warn_of_dtype(f"`{found[0]}` and parameters like it", parameter.dtype, remedy)
                break
        return result


def _is(name: str, kept: str) -> bool:
    """Whether a parameter has this name, below whatever modules."""
    return f".{name}".endswith(f".{kept}")


class UntiesUnderAdapters:
    """Notices when peft has put adapters into a model: it sets `peft_config` then."""

    @property
    def peft_config(self) -> Any:
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapters of peft, and so no `peft_config`") from None

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["peft_config"] = value
        untie_under_adapters(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]


def untie_under_adapters(model: Any) -> None:
    """Give the head weights of its own where an adapter lies over it or over the embeddings and they share them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return
    bases = [_base(layer) for layer in (head, embeddings)]
    adapted = bases[0] is not head or bases[1] is not embeddings
    if not adapted or bases[0].weight is not bases[1].weight:
        return
    bases[0].weight = copy.deepcopy(bases[0].weight)
    logger.warning_once(
        "adapters over tied embeddings: the head has a copy of their weights from now on, so that merging an adapter "
        "into one of the two leaves the other as it was"
    )


def _base(layer: nn.Module) -> nn.Module:
    """The layer under peft's."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # pyright: ignore


class ZooPreTrainedModel(KeepsFloat32, UntiesUnderAdapters, PreTrainedModel):
    """What every zoo model is: stateful, exported with its code, and with some parameters in float32
    (`mixer.py`)."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    auto_class: ClassVar[str] = ""
    """The Auto class of transformers that makes models of this kind: a head knows its own."""
    auto_classes: ClassVar[dict[str, str]] = {}
    """Of a family: Auto class to class name, for transformers' registry and the exported config's `auto_map`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.config_class is None:
            return
        if cls.config_class not in [getattr(base, "config_class", None) for base in cls.__mro__[1:]]:
            cls.auto_classes = {}  # what the classes of a family share
        if cls.auto_class:
            cls.auto_classes.setdefault(cls.auto_class, cls.__name__)

    def post_init(self) -> None:
        # The blocks of this model: accelerate refuses a name that it does not find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules or [] if name in present]
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initialise"):  # after its linear layers, which it may set again
            module.initialise()  # pyright: ignore[reportCallIssue]

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
                upload(folder, repo_id, token=kwargs.get("token"), **hub)

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
        if not self.is_remote_code():
            write_code(folder, [type(self).__module__, type(self.config).__module__])
        write_default_card(
            folder,
            model_type=self.config.model_type,
            class_name=type(self).__name__,
            auto_class=self.auto_class or "AutoModel",
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
            return upload(
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

    def example_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random arguments of a forward, to compare what two loads of the model compute."""
        length = min(_EXAMPLE_TOKENS, getattr(self.config, "max_position_embeddings", _EXAMPLE_TOKENS))
        return {"input_ids": torch.randint(self.config.vocab_size, (1, length), generator=generator)}

    def _saves_adapters(self) -> bool:
        return bool(getattr(self, "_hf_peft_config_loaded", False))
