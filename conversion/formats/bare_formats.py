"""Which of the authors' mixers a checkpoint is: found by its keys, or refused by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..rules import LazyTensor
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings
from .format import config_errors
from .maskedmixers import read_autoencoder, read_language_mixer, read_retrieval, read_transfixer
from .structured_mixers import read_mlp_mixer
from .toeplitz_mixers import read_fast_toeplitz, read_optimised_toeplitz

# What is looked for in order: the first expression that matches a key's beginning says what it is.
_REFUSED = {
    r"decoder_wte\.|decoder_proj\.": "a memory mixer, whose decoder reads embeddings of earlier chunks",
    r"wte\.bias": "an AutoencodingMixer of token pairs, whose embedding is a linear layer",
    r"(encoder|decoder)\.layers\.": "an AutoencodingTransfixer, of which one half is a Llama",
    r"mixer_blocks\.\d+\.token_mixing_layer\.(mixer_heads\.\d+\.)?\d+\.": "an expanded Toeplitz mixer",
    r"mixer_blocks\.\d+\.token_mixing_layer\.(.*\.)?diag_weight": "a recurrent mixer with a diagonal of its own",
    r"blocks\.\d+\.mixer\.alpha_logits": "a mixer of exponential moving averages",
    r"encoderblocks\.\d+\.token_mixing_layer\.": "an autoencoder of Toeplitz or recurrent mixers",
}
_READ: dict[str, Callable[[MixerCheckpoint, Settings, Path], MixerReading]] = {
    r"model\.layers\.\d+\.mixer_layer\.": read_transfixer,
    r"encoderblocks\.\d+\.patch_layernorm\.": lambda checkpoint, settings, _: read_autoencoder(checkpoint, settings),
    r"retrieval_head\.": lambda checkpoint, settings, _: read_retrieval(checkpoint, settings),
    r"mixerblocks\.\d+\.patch_layernorm\.": lambda checkpoint, settings, _: read_language_mixer(checkpoint, settings),
    r"mixer_blocks\.\d+\.token_mixing_layer\.": lambda checkpoint, settings, _: read_mlp_mixer(checkpoint, settings),
    r"blocks\.\d+\.mixer_norm\.": lambda checkpoint, settings, _: read_optimised_toeplitz(checkpoint, settings),
    r"blocks\.\d+\.norm1\.": lambda checkpoint, settings, _: read_fast_toeplitz(checkpoint, settings),
}
_KNOWN = (
    "LanguageMixer, MultiHeadedMixer, AutoencodingMixer, RetrievalMixer, transfixer, Toeplitz and structured recurrent "
    "mixers"
)


def is_transfixer(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether what says that it is a Llama is one with a mixer."""
    return any(re.search(r"(^|\.)model\.layers\.\d+\.mixer_layer\.", key) for key in tensors)


def read_mixer(
    folder: Path, tensors: Mapping[str, LazyTensor], assignments: Sequence[str]
) -> tuple[MixerReading, dict[str, LazyTensor]]:
    """What a checkpoint without a configuration, or of a transfixer, is.

    Args:
        folder: where it is.
        tensors: its weights.
        assignments: what the user says of it, "name=value" each.

    Returns:
        That, and the tensors that it uses, a tied head and what no forward reads left out.

    Raises:
        ValueError: if it is none of the known ones, or one that our models cannot express; if a setting is wrong,
            missing or says nothing of it; if sizes cannot be.
    """
    settings = Settings(assignments)
    checkpoint = MixerCheckpoint(folder.name, tensors)
    for pattern, what in _REFUSED.items():
        found = next((key for key in checkpoint.tensors if re.match(pattern, key)), None)
        if found is not None:
            raise ValueError(f"{folder.name}: {found}: of {what}, which is not converted; accepted: {_KNOWN}")
    read = next(
        (read for start, read in _READ.items() if any(re.match(start, key) for key in checkpoint.tensors)), None
    )
    if read is None:
        raise ValueError(
            f"source: {folder} holds no config.json, and keys of none of these: {_KNOWN}; the first key is "
            f"{next(iter(checkpoint.tensors), 'none')}"
        )
    with config_errors(f"{folder.name}: sizes or settings"):
        reading = read(checkpoint, settings, folder)
    settings.finish(reading.name)
    return reading, checkpoint.tensors
