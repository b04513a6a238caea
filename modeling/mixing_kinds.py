"""Which position mixer a configuration names."""

from typing import Any

from .configuration_masked_mixer import REPEATS, MaskedMixerConfig
from .position_mixers import DenseMixer, PositionMixer, ToeplitzMixer
from .repeat_mixing import RepeatMixer


def make_position_mixer(config: MaskedMixerConfig, layer_idx: int, diagonal: int = 0) -> PositionMixer:
    """The mixer that a configuration names; of tokens from `diagonal` before a position on."""
    sizes = (layer_idx, config.hidden_size, config.max_position_embeddings)
    options: dict[str, Any] = {
        "heads": config.num_heads,
        "taps": config.kernel_size,
        "projections": bool(config.use_projections),
    }
    if config.mixing in REPEATS:
        return RepeatMixer(*sizes, kind=config.mixing, decay=config.use_decay, **options)
    kind = DenseMixer if config.mixing == "dense" else ToeplitzMixer
    return kind(*sizes, diagonal=diagonal, inner=str(config.hidden_act) if config.expanded else None, **options)
