"""The registry of families: every `modeling_<family>.py` beside this file is one, and nothing else lists them.

A family describes itself: `config_class` is its configuration, `auto_classes` maps Auto classes of transformers to its
classes, and `presets` of the configuration are its published sizes. To train one from scratch:

    from ssm_zoo.modeling import preset

    model = AutoModelForCausalLM.from_config(preset("mamba-130m"))

Sources of the presets: Mamba and Mamba-2 have the sizes of the checkpoints `state-spaces/<name>` on the Hub, and
otherwise the defaults (the vocabulary of GPT-NeoX's tokenizer, 50277 padded to a multiple of 8 in Mamba and of 16 in
Mamba-2, and tied embeddings).

Taipan's sizes are inferred, since its paper (arXiv 2410.18572) gives only numbers of parameters. With Llama 3's
vocabulary, tied embeddings, Mamba-2 of the published shape and a block of selective attention after every six, widths
768, 1024 and 2048 come within 2 % of those numbers with 18 + 3, 36 + 6 and 30 + 5 blocks.

RetNet has the architectures of torchscale (microsoft/torchscale@4d1e0e8, `examples/fairseq/models/retnet.py`), which
leave the vocabulary to the user. The default here is the 32,000 tokens of flash-linear-attention's RetNet. The paper
(arXiv 2307.08621) describes other proportions: values and MLP are twice the model's width, and the MLP is plain.

Masked mixers have the sizes of their author's code (arXiv 2409.01482); our names count parameters. Vocabularies are
4096 for TinyStories and 8000 for FineWeb-Edu; the 23, 46, 78, 155 and 168 million sizes have one head, the others four.
The Toeplitz mixer (arXiv 2605.06683) has the sizes with the lowest loss in its author's logs, the recurrent mixer
(arXiv 2605.08696) those of the author's training script.

Names with "mt-" are the layouts of the translation study of Pitorro et al. (arXiv 2407.05489), with the sizes of its
code (deep-spin/ssm-mt@ea386cc, `models/`) and a vocabulary of 32,000 for both languages; the special ids are those of
the tokenizer. The study keeps Mamba-MHA with attention in the middle and in the last layer. For Mamba with a window its
code has the same choices of layers; here they are those of Mamba-MHA. The attention of both has no positions.
Encoder-decoders with Mamba share one embedding between source, target and head, where the code has one for each stack.
The Transformer under a Mamba decoder has rotary positions here; in the code it has none, and so does not know the order
of the source.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from .pretrained import ZooPreTrainedModel


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: class of the configuration.
        classes: name of an Auto class of transformers -> the class that it builds.
    """

    config: type[PreTrainedConfig]
    classes: dict[str, type[ZooPreTrainedModel]] = field(default_factory=dict)


def _find() -> dict[str, Family]:
    """Import the families and register their classes with transformers."""
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
"""Families by `model_type`."""

PRESETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    name: (family.config, sizes)
    for family in FAMILIES.values()
    for name, sizes in getattr(family.config, "presets", {}).items()
}
"""Name of a published size -> class of the configuration and its arguments."""


def preset(name: str, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a published size.

    Args:
        name: a key of PRESETS.
        **changes: arguments of the configuration that differ, e.g. `vocab_size`.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    kind, sizes = PRESETS[name]
    return kind(**(sizes | changes))
