"""Configurations and models of every family, by name; importing this registers them with transformers' Auto classes."""

from typing import TYPE_CHECKING

from . import hub_code
from .families import FAMILIES, preset
from .pretrained import ZooPreTrainedModel

ZooPreTrainedModel.publisher = hub_code

if TYPE_CHECKING:  # for type checkers; at run time the names come from the families found in the folder
    # ruff: noqa: F403
    from .configuration_encdec import *
    from .configuration_hybrid import *
    from .configuration_mamba import *
    from .configuration_mamba2 import *
    from .configuration_masked_mixer import *
    from .configuration_retnet import *
    from .configuration_retrieval_mixer import *
    from .configuration_taipan import *
    from .modeling_encdec import *
    from .modeling_hybrid import *
    from .modeling_mamba import *
    from .modeling_mamba2 import *
    from .modeling_masked_mixer import *
    from .modeling_retnet import *
    from .modeling_retrieval_mixer import *
    from .modeling_taipan import *

_FOUND = {kind.__name__: kind for each in FAMILIES.values() for kind in (each.config, *each.classes.values())}
globals().update(_FOUND)

__all__ = ["FAMILIES", "preset", *_FOUND]  # pyright: ignore[reportUnsupportedDunderAll]
