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

from .families import FAMILIES

PRESETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    name: (family.config, sizes)
    for family in FAMILIES.values()
    for name, sizes in getattr(family.config, "presets", {}).items()
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
