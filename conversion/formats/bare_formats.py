"""Recognition of position mixers by their keys, with a reader for each known kind and an error for the others."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..rules import LazyTensor
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings
from .format import config_errors
from .maskedmixers import read_autoencoder, read_language_mixer, read_retrieval, read_transfixer
from .structured_mixers import read_mlp_mixer
from .toeplitz_mixers import read_fast_toeplitz, read_optimised_toeplitz

# Both tables are searched in order: the first expression that matches the beginning of a key decides.
_REFUSED = {
    r"decoder_wte\.|decoder_proj\.": "a memory mixer, whose decoder reads embeddings of earlier chunks",
    r"wte\.bias": "an AutoencodingMixer of token pairs, whose embedding is a linear layer",
    r"(encoder|decoder)\.layers\.": "an AutoencodingTransfixer, of which one half is a Llama",
    r"mixer_blocks\.\d+\.token_mixing_layer\.(mixer_heads\.\d+\.)?\d+\.": "an expanded Toeplitz mixer",
    r"mixer_blocks\.\d+\.token_mixing_layer\.(.*\.)?diag_weight": "a recurrent mixer with a diagonal of its own",
    r"blocks\.\d+\.mixer\.alpha_logits": "a mixer of exponential moving averages",
    r"encoderblocks\.\d+\.token_mixing_layer\.": "an autoencoder of Toeplitz or recurrent mixers",
}
_READ: dict[str, Callable[[MixerCheckpoint, Settings], MixerReading]] = {
    r"model\.layers\.\d+\.mixer_layer\.": read_transfixer,
    r"encoderblocks\.\d+\.patch_layernorm\.": read_autoencoder,
    r"retrieval_head\.": read_retrieval,
    r"mixerblocks\.\d+\.patch_layernorm\.": read_language_mixer,
    r"mixer_blocks\.\d+\.token_mixing_layer\.": read_mlp_mixer,
    r"blocks\.\d+\.mixer_norm\.": read_optimised_toeplitz,
    r"blocks\.\d+\.norm1\.": read_fast_toeplitz,
}
_KNOWN = (
    "LanguageMixer, MultiHeadedMixer, AutoencodingMixer, RetrievalMixer, transfixer, Toeplitz and structured recurrent "
    "mixers"
)


def is_transfixer(tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether a checkpoint whose config.json names a Llama is a transfixer."""
    return any(re.search(r"(^|\.)model\.layers\.\d+\.mixer_layer\.", key) for key in tensors)


def read_mixer(
    folder: Path, tensors: Mapping[str, LazyTensor], assignments: Sequence[str]
) -> tuple[MixerReading, dict[str, LazyTensor]]:
    """Read a checkpoint without a configuration, or one of a transfixer.

    Args:
        folder: folder of the checkpoint.
        tensors: its weights.
        assignments: the user's settings, "name=value" each.

    Returns:
        The reading, and the tensors that it uses, without a tied head and without those that no forward pass reads.

    Raises:
        ValueError: if the mixer is unknown, or our models cannot express it; if a setting is wrong, missing or not one
            of this mixer; or if the sizes contradict each other.
    """
    settings = Settings(assignments)
    checkpoint = MixerCheckpoint(folder, tensors)
    for pattern, what in _REFUSED.items():
        found = next((key for key in checkpoint.tensors if re.match(pattern, key)), None)
        if found is not None:
            raise ValueError(f"{folder.name}: {found} is a key of {what}. Only {_KNOWN} can be converted.")
    read = next(
        (read for start, read in _READ.items() if any(re.match(start, key) for key in checkpoint.tensors)), None
    )
    if read is None:
        raise ValueError(
            f"source: {folder} must hold a config.json, or have the keys of one of {_KNOWN}. Its first key is "
            f"{next(iter(checkpoint.tensors), 'none')}."
        )
    with config_errors(f"{folder.name}: sizes or settings"):
        reading = read(checkpoint, settings)
    settings.finish(reading.name)
    return reading, checkpoint.tensors
