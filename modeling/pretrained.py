"""What every model of the zoo is: saved and pushed with its code, some parameters in float32, untied under adapters."""

import copy
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .mixer import ALL_OF_THEM, LOAD_IN_FLOAT32, under_fsdp, warn_of_dtype
from .saved_folder import push_folder, remove_stale_weights, write_default_card, written_weights

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
        names = [name for name, _ in self.named_parameters()]
        self._keep_in_fp32_modules_strict = [
            kept for kept in names_in_float32(self) if not under_fsdp() and any(_is(name, kept) for name in names)
        ]
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        parameters = dict(self.named_parameters())
        cast = [n for n in kept_in_float32(self, parameters) if parameters[n].dtype in (torch.float16, torch.bfloat16)]
        if cast:
            remedy = "they stay in float32 where the dtype is given to from_pretrained or from_config instead"
            warn_of_dtype(f"`{cast[0].rpartition('.')[2]}` and parameters like it", parameters[cast[0]].dtype, remedy)
        return result

    @property
    def _fsdp_use_orig_params(self) -> bool:
        """Whether FSDP keeps the parameters' names. torch sets it on every module of a model that it shards: FSDP1
        before it flattens the parameters, FSDP2 before the first forward, where it looks at their dtypes."""
        return self.__dict__.get("_fsdp_use_orig_params", False)

    @_fsdp_use_orig_params.setter
    def _fsdp_use_orig_params(self, value: bool) -> None:
        self.__dict__["_fsdp_use_orig_params"] = value
        assert isinstance(self, nn.Module)
        _take_one_dtype(self)


def names_in_float32(model: nn.Module) -> list[str]:
    """Ends of the names of the parameters that stay in float32, which the mixers know."""
    kinds = {type(module) for module in model.modules()}
    return sorted({name for kind in kinds for name in getattr(kind, "float32_parameters", ())})


def kept_in_float32(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Those of a model's parameters, by their names."""
    kinds = names_in_float32(model)
    return [name for name in parameters if any(_is(name, kept) for kept in kinds)]


def _is(name: str, kept: str) -> bool:
    """Whether a parameter has this name, below whatever modules and in a layer with adapters too."""
    return f".{name}".replace(".base_layer.", ".").endswith(f".{kept}")


def _take_one_dtype(model: nn.Module) -> None:
    """Give the parameters that are kept in float32 the dtype that FSDP needs of them."""
    parameters = dict(model.named_parameters())
    kept = kept_in_float32(model, parameters)
    for name, parameter in parameters.items():
        if name not in kept:
            continue
        # FSDP2's parameters are DTensors by now; it casts frozen ones one by one, which may differ.
        flattened = not hasattr(parameter, "placements")
        if not (flattened or parameter.requires_grad):
            continue
        owner, _, own_name = name.rpartition(".")
        dtype = _dtype_beside(owner, parameters, kept, trained_only=not flattened)
        if dtype not in (torch.float16, torch.bfloat16) or dtype == parameter.dtype:
            continue
        warn_of_dtype(ALL_OF_THEM, dtype, LOAD_IN_FLOAT32)
        if flattened:
            parameter.data = parameter.data.to(dtype)
        else:
            cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=True)
            setattr(model.get_submodule(owner), own_name, cast)


def _dtype_beside(
    module: str, parameters: dict[str, nn.Parameter], kept: Collection[str], *, trained_only: bool
) -> torch.dtype | None:
    """Dtype of the first parameter in this module that is not kept in float32, or else in the nearest around it."""
    others = [
        (name, parameter)
        for name, parameter in parameters.items()
        if name not in kept and parameter.is_floating_point() and (parameter.requires_grad or not trained_only)
    ]
    while module:
        beside = next((parameter.dtype for name, parameter in others if name.startswith(f"{module}.")), None)
        if beside is not None:
            return beside
        module = module.rpartition(".")[0]
    return others[0][1].dtype if others else None


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
    publisher: ClassVar[Any] = None
    """The module `hub_code`, which writes code and pushes. None in exported code, which transformers copies."""

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
                self._upload(folder, repo_id, token=kwargs.get("token"), **hub)

    @classmethod
    def own_class(cls) -> type:
        """Return the class that somebody wrote: FSDP2 gives a model a class of its own, made of that one."""
        return next(kind for kind in cls.__mro__ if not kind.__module__.startswith("torch."))

    def name_classes(self) -> None:
        """Say in the configuration's `auto_map` which class of the saved code each Auto class takes."""
        modeling, configuration = self.own_class().__module__, type(self.config).__module__
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
            class_name=self.own_class().__name__,
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

    def _saves_adapters(self) -> bool:
        return bool(getattr(self, "_hf_peft_config_loaded", False))
