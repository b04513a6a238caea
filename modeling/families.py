"""The families of the zoo: every `modeling_<family>.py` beside this file is one, and nothing else lists them.

What a family has, its classes say: `config_class` its configuration, `auto_classes` which of them each Auto class of
transformers makes, `presets` of the configuration its published sizes.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import PreTrainedConfig

from .pretrained import ZooPreTrainedModel


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        config: class of its configuration.
        classes: Auto class of transformers to the class that it makes.
    """

    config: type[PreTrainedConfig]
    classes: dict[str, type[ZooPreTrainedModel]] = field(default_factory=dict)


def _find() -> dict[str, Family]:
    """Import the files, and enter their classes into transformers' registry."""
    families: dict[str, Family] = {}
    for path in sorted(Path(__file__).parent.glob("modeling_*.py")):
        module = importlib.import_module(f".{path.stem}", __package__)
        for name in module.__all__:
            kind = getattr(module, name)
            autos = [auto for auto, made in getattr(kind, "auto_classes", {}).items() if made == name]
            if not autos:
                continue
            config = kind.config_class
            family = families.setdefault(config.model_type, Family(config))
            if not family.classes:
                transformers.AutoConfig.register(config.model_type, config)
            family.classes[autos[0]] = kind
            getattr(transformers, autos[0]).register(config, kind)
    return families


FAMILIES = _find()
"""By `model_type`."""
