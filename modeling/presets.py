"""The sizes of published models, by their names: to train one from scratch.

    from ssm_zoo.modeling import preset

    model = AutoModelForCausalLM.from_config(preset("mamba-130m"))

Sizes of Mamba and Mamba-2 are those of the checkpoints `state-spaces/<name>` on the Hub. All else has its default: the
vocabulary of GPT-NeoX's tokenizer (50277 padded to a multiple of 8 in Mamba, of 16 in Mamba-2), tied embeddings.

Taipan's are inferred: its paper (arXiv 2410.18572) names them by their parameters alone. With Llama 3's vocabulary,
tied embeddings, Mamba-2 of the published shape and a block of selective attention after every six, widths 768, 1024
and 2048 come within 2 % of those names as 18 + 3, 36 + 6 and 30 + 5 blocks.

Masked mixers are those of their author's code (arXiv 2409.01482), by our names, which count parameters: of 4096 words
for TinyStories, of 8000 for FineWeb-Edu; 23, 78, 46, 155 and 168 million have one head, the others four. The Toeplitz
mixer (arXiv 2605.06683) has the sizes with the lowest loss in its author's logs, the recurrent one (arXiv 2605.08696)
those of the author's training script.
"""

from typing import Any

from transformers import PreTrainedConfig

from .configuration_mamba import ZooMambaConfig
from .configuration_mamba2 import ZooMamba2Config
from .configuration_masked_mixer import MaskedMixerConfig
from .configuration_taipan import TaipanConfig


def _mixer(vocab: int, width: int, layers: int, positions: int, heads: int, mixing: str = "dense") -> tuple[Any, ...]:
    sizes = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers}
    return MaskedMixerConfig, sizes | {"max_position_embeddings": positions, "num_heads": heads, "mixing": mixing}


PRESETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mamba-130m": (ZooMambaConfig, {"hidden_size": 768, "num_hidden_layers": 24}),
    "mamba-370m": (ZooMambaConfig, {"hidden_size": 1024, "num_hidden_layers": 48}),
    "mamba-790m": (ZooMambaConfig, {"hidden_size": 1536, "num_hidden_layers": 48}),
    "mamba-1.4b": (ZooMambaConfig, {"hidden_size": 2048, "num_hidden_layers": 48}),
    "mamba-2.8b": (ZooMambaConfig, {"hidden_size": 2560, "num_hidden_layers": 64}),
    "mamba2-130m": (ZooMamba2Config, {"hidden_size": 768, "num_hidden_layers": 24}),
    "mamba2-370m": (ZooMamba2Config, {"hidden_size": 1024, "num_hidden_layers": 48}),
    "mamba2-780m": (ZooMamba2Config, {"hidden_size": 1536, "num_hidden_layers": 48}),
    "mamba2-1.3b": (ZooMamba2Config, {"hidden_size": 2048, "num_hidden_layers": 48}),
    "mamba2-2.7b": (ZooMamba2Config, {"hidden_size": 2560, "num_hidden_layers": 64}),
    "taipan-190m": (TaipanConfig, {"hidden_size": 768, "num_hidden_layers": 21}),
    "taipan-450m": (TaipanConfig, {"hidden_size": 1024, "num_hidden_layers": 42}),
    "taipan-1.3b": (TaipanConfig, {"hidden_size": 2048, "num_hidden_layers": 35}),
    "masked-mixer-23m": _mixer(4096, 512, 8, 512, 1),
    "masked-mixer-34m": _mixer(4096, 512, 8, 512, 4),
    "masked-mixer-46m": _mixer(8000, 512, 16, 512, 1),
    "masked-mixer-67m": _mixer(8000, 512, 16, 512, 4),
    "masked-mixer-78m": _mixer(4096, 1024, 8, 512, 1),
    "masked-mixer-101m": _mixer(4096, 1024, 8, 512, 4),
    "masked-mixer-155m": _mixer(8000, 1024, 16, 512, 1),
    "masked-mixer-168m": _mixer(8000, 1024, 16, 1024, 1),
    "masked-mixer-201m": _mixer(8000, 1024, 16, 512, 4),
    "masked-mixer-252m": _mixer(8000, 1024, 16, 1024, 4),
    "toeplitz-mixer-184m": _mixer(8000, 1024, 16, 512, 4, "toeplitz"),
    "recurrent-mixer-184m": _mixer(8000, 1024, 16, 1024, 4, "mixed_repeat"),
}
"""Name to configuration class and its arguments."""


def preset(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a published size.

    Args:
        name: a key of PRESETS.
        **changes: arguments of the configuration that differ, `vocab_size` say.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    kind, sizes = PRESETS[name]
    return kind(**(sizes | changes))
