"""One file for each checkpoint layout of another library, and the registry of them all."""

from typing import Any

from . import state_spaces
from .cartesia_llamba import LLAMBA
from .fla_retnet import FLA_RETNET
from .format import Format
from .maskedmixers import MASKED_MIXER
from .torchscale_retnet import TORCHSCALE_RETNET
from .transformers_bamba import BAMBA
from .transformers_gemma import GEMMA2, GEMMA3
from .transformers_gpt import GPT2, GPT_NEOX, PHI
from .transformers_jamba import JAMBA
from .transformers_llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3
from .transformers_mamba import FALCON_MAMBA, MAMBA, MAMBA2

FORMATS = (
    MAMBA,
    FALCON_MAMBA,
    MAMBA2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    SMOLLM3,
    PHI3,
    GPT2,
    GPT_NEOX,
    PHI,
    GEMMA2,
    GEMMA3,
    BAMBA,
    JAMBA,
    LLAMBA,
    state_spaces.MAMBA1,
    state_spaces.MAMBA2,
    state_spaces.MAMBA2_HYBRID,
    MASKED_MIXER,
    TORCHSCALE_RETNET,
    FLA_RETNET,
)
"""Every format. If several formats of a library can write a model, the first one is used."""

TEACHERS = {str(form.model_type): form for form in FORMATS if form.is_teacher}
"""The formats of models that students are distilled from, by transformers' model type."""


def detect(values: dict[str, Any]) -> Format | None:
    """Return the format of a checkpoint with these values in config.json; None if there is none."""
    return next((form for form in FORMATS if form.reads(values)), None)
