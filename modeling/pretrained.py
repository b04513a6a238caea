"""Base class of all models: saving and pushing with code, parameters in float32, untying under adapters."""

import copy
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from .mixer import ALL_OF_THEM, LOAD_IN_FLOAT32, under_fsdp, warn_of_dtype
from .saved_folder import push_folder, remove_stale_weights, write_default_card, written_weights

_EXAMPLE_TOKENS = 16

logger = logging.get_logger(__name__)


def is_bidirectional(config: PreTrainedConfig) -> bool:
    """Return whether tokens see later ones; such a model has no cache and cannot generate."""
    return getattr(config, "bidirectional", False)


class KeepsFloat32:
    """A model that keeps the `float32_parameters` of its mixers in float32 (`mixer.py`)."""

    def post_init(self) -> None:
        assert isinstance(self, nn.Module)
        # Only names in this model: transformers treats a missing name as an error.
        names = [name for name, _ in self.named_parameters()]
        self._keep_in_fp32_modules_strict = [
            kept
            for kept in names_in_float32(self)
            if not under_fsdp() and any(_has_suffix(name, kept) for name in names)
        ]
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        parameters = dict(self.named_parameters())
        cast = [n for n in kept_in_float32(self, parameters) if parameters[n].dtype in (torch.float16, torch.bfloat16)]
        if cast:
            remedy = "pass the dtype to from_pretrained or from_config instead to keep them in float32"
            warn_of_dtype(f"`{cast[0].rpartition('.')[2]}` and parameters like it", parameters[cast[0]].dtype, remedy)
        return result

    @property
    def _fsdp_use_orig_params(self) -> bool:
        """Whether FSDP keeps the parameters' names. torch sets this on every module that it shards: FSDP1 before it
        flattens the parameters, FSDP2 before the first forward, when it reads their dtypes."""
        return self.__dict__.get("_fsdp_use_orig_params", False)

    @_fsdp_use_orig_params.setter
    def _fsdp_use_orig_params(self, value: bool) -> None:
        self.__dict__["_fsdp_use_orig_params"] = value
        assert isinstance(self, nn.Module)
        _take_one_dtype(self)


def names_in_float32(model: nn.Module) -> list[str]:
    """Return the suffixes of the names of parameters in float32, which the modules declare."""
    kinds = {type(module) for module in model.modules()}
    return sorted({name for kind in kinds for name in getattr(kind, "float32_parameters", ())})


def kept_in_float32(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Return the names among `parameters` that are kept in float32."""
    kinds = names_in_float32(model)
    return [name for name in parameters if any(_has_suffix(name, kept) for kept in kinds)]


def _has_suffix(name: str, suffix: str) -> bool:
    """Return whether a parameter's name ends with these components, also in a layer with adapters."""
    return f".{name}".replace(".base_layer.", ".").endswith(f".{suffix}")


def _take_one_dtype(model: nn.Module) -> None:
    """Cast the parameters in float32 to the dtype that FSDP needs."""
    parameters = dict(model.named_parameters())
    kept = kept_in_float32(model, parameters)
    for name, parameter in parameters.items():
        if name not in kept:
            continue
        # FSDP2's parameters are DTensors by now. It casts frozen ones one by one, so their dtypes may differ.
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
    """Return the dtype of the first parameter not kept in float32 in this module, or in the nearest parent."""
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
    """Untie embeddings when peft adds adapters to a model, which sets `peft_config`."""

    @property
    def peft_config(self) -> Any:
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no peft adapters and so no `peft_config`") from None

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["peft_config"] = value
        untie_under_adapters(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]


def untie_under_adapters(model: Any) -> None:
    """Copy the weight of a tied head if the head or the embeddings have adapters."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return
    bases = [_base(layer) for layer in (head, embeddings)]
    adapted = bases[0] is not head or bases[1] is not embeddings
    if not adapted or bases[0].weight is not bases[1].weight:
        return
    bases[0].weight = copy.deepcopy(bases[0].weight)
    logger.warning_once(
        "adapters over tied embeddings: the head has its own copy of the weights from now on, so that merging an "
        "adapter into one of the two does not change the other"
    )


def _base(layer: nn.Module) -> nn.Module:
    """Return the layer that peft's layer wraps."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # pyright: ignore


class ZooPreTrainedModel(KeepsFloat32, UntiesUnderAdapters, PreTrainedModel):
    """Base class of all models: exported with code, some parameters in float32 (`mixer.py`)."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # A stateful model cannot be assisted. These are not: their caches can be cropped while they record the past.
    _is_stateful = not hasattr(Cache, "activate_past_recording")
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    auto_class: ClassVar[str] = ""
    """The Auto class of transformers that builds this class."""
    auto_classes: ClassVar[dict[str, str]] = {}
    """Auto class -> class name of the family, for transformers' registry and the exported `auto_map`."""
    publisher: ClassVar[Any] = None
    """The module `hub_code`, which writes code and pushes; None in exported code, which transformers copies."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.config_class is None:
            return
        if cls.config_class not in [getattr(base, "config_class", None) for base in cls.__mro__[1:]]:
            cls.auto_classes = {}  # shared by the classes of a family
        if cls.auto_class:
            cls.auto_classes.setdefault(cls.auto_class, cls.__name__)

    def post_init(self) -> None:
        # Only the blocks of this model, as accelerate raises an error for a missing one.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules or [] if name in present]
        super().post_init()

    def _initialize_weights(self, module: nn.Module, *custom_code: Any) -> None:
        """As in transformers, except that modules with `initialise` and without parameters of their own are not
        skipped. In custom code, transformers skips a module whose own parameters are all loaded, hence also these."""
        if hasattr(module, "initialise") and next(module.parameters(recurse=False), None) is None:
            custom_code = ()
        super()._initialize_weights(module, *custom_code)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initialise"):  # after its linear layers, which it may overwrite
            module.initialise()  # pyright: ignore[reportCallIssue]

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save weights, config, the code that loads them, its licence and a card: a folder that does not need ssm-zoo.

        Arguments as in transformers; with `push_to_hub=True` also those of :meth:`push_to_hub`. A model that was loaded
        with `trust_remote_code` saves its own code; a model with adapters saves only the adapters.
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
        """Return the class as written: FSDP2 replaces a model's class by a derived one."""
        return next(kind for kind in cls.__mro__ if not kind.__module__.startswith("torch."))

    def name_classes(self) -> None:
        """Set the configuration's `auto_map`: the class in the saved code for each Auto class."""
        modeling, configuration = self.own_class().__module__, type(self.config).__module__
        # A configuration from the Hub names its repository, but the code is saved here as well.
        self.config.auto_map = {
            "AutoConfig": f"{configuration.rpartition('.')[2]}.{type(self.config).__name__}",
            **{auto: f"{modeling.rpartition('.')[2]}.{name}" for auto, name in self.auto_classes.items()},
        }

    def save_code(self, folder: Path) -> None:
        """Complete a folder of weights and configurations: code, its licence, and a card."""
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

        Weights and code of an earlier upload are removed. Arguments as in transformers, and:

        Args:
            replace: also remove weights and adapters that were not uploaded in this way but would be loaded instead of
                the new ones; without it they are an error.

        Returns:
            URL of the commit.
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
        """Draw arguments of a forward, to compare the outputs of two loads of the model."""
        length = min(_EXAMPLE_TOKENS, getattr(self.config, "max_position_embeddings", _EXAMPLE_TOKENS))
        return {"input_ids": torch.randint(self.config.vocab_size, (1, length), generator=generator)}

    def _saves_adapters(self) -> bool:
        return bool(getattr(self, "_hf_peft_config_loaded", False))
