"""Which position mixer a configuration names, and its initialisation."""

import math
from typing import Any

import torch
from transformers import initialization as init

from .configuration_masked_mixer import REPEATS, MaskedMixerConfig
from .history_mixing import DenseMixer, PositionMixer, ToeplitzMixer
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
    return kind(*sizes, diagonal=diagonal, **options)


def init_position_mixer(mixer: PositionMixer) -> None:
    """The authors' initialisation of the mixing; projections have theirs.

    | parameter | value |
    |---|---|
    | weight and bias of a dense mixer | U(+-1 / sqrt(N k)), as of a convolution over N channels; 0 where hidden |
    | weight of others | N(0, 2 / N), bias 0 |
    | decay_value | 1 |
    """
    if isinstance(mixer, DenseMixer):
        bound = (mixer.positions * mixer.taps) ** -0.5
        drawn = torch.empty_like(mixer.weight).uniform_(-bound, bound)
        init.copy_(mixer.weight, drawn.tril(-mixer.diagonal))
        init.uniform_(mixer.bias, -bound, bound)
        return
    init.normal_(mixer.weight, std=math.sqrt(2 / mixer.positions))
    init.zeros_(mixer.bias)
    decay_value = getattr(mixer, "decay_value", None)
    if decay_value is not None:
        init.ones_(decay_value)
