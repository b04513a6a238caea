"""The models of the zoo by name, in the manner of timm: sizes, sources and the classes that load them.

    from ssm_zoo.conversion.catalogue import list_models

    for model in list_models("mamba2-*"):
        print(model.name, model.parameters)

Everything is read from the registries: presets, checkpoint formats and the families registered with transformers.
`import ssm_zoo` cannot offer the function itself: `ssm_zoo` is a namespace without a module of its own.
"""

import fnmatch
import functools
from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto import modeling_auto

from .. import modeling
from ..modeling.families import PRESETS, preset
from .formats import FORMATS

__all__ = ["ModelInfo", "list_models", "matches"]


@dataclass(frozen=True)
class ModelInfo:
    """One row of the list.

    Attributes:
        name: name of the preset, or `model_type` of a family without presets.
        model_type: model type of its configuration.
        parameters: number of parameters; None for a family, which has no fixed size.
        sources: libraries whose checkpoints can be converted to the family.
        loaded_by: classes of transformers that build or load the family.
    """

    name: str
    model_type: str
    parameters: int | None
    sources: tuple[str, ...]
    loaded_by: tuple[str, ...]


def list_models(pattern: str = "*") -> list[ModelInfo]:
    """Return the presets and the families without presets whose names match a pattern, see :func:`matches`.

    Parameters are counted on the meta device, so that nothing is allocated.
    """
    families = {kind.model_type: kind for kind in vars(modeling).values() if _is_family(kind)}
    with_preset = {kind.model_type for kind, _ in PRESETS.values()}
    found = [_info(name, preset(name), counted=True) for name in PRESETS if matches(name, pattern)]
    return found + [
        _info(name, kind(), counted=False)
        for name, kind in families.items()
        if name not in with_preset and matches(name, pattern)
    ]


def matches(name: str, pattern: str) -> bool:
    """Return whether a name contains a word in any case, or matches a shell pattern, which has one of `*?[`."""
    return fnmatch.fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern.lower() in name.lower()


def _is_family(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedConfig)


def _info(name: str, config: PreTrainedConfig, *, counted: bool) -> ModelInfo:
    formats = [each for each in FORMATS if each.zoo_class.config_class is type(config)]
    sources = tuple(dict.fromkeys(each.library for each in formats))
    parameters = _parameters(config) if counted else None
    return ModelInfo(name, config.model_type, parameters, sources, _loaded_by(type(config)))


@functools.cache
def _loaded_by(kind: type[PreTrainedConfig]) -> tuple[str, ...]:
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModel")]
    mappings = {name: getattr(getattr(modeling_auto, name), "_model_mapping", None) for name in names}
    return tuple(name for name, mapping in mappings.items() if mapping is not None and kind in mapping)


def _parameters(config: PreTrainedConfig) -> int:
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=False).num_parameters()
    raise AssertionError(f"{config.model_type} is not registered")
