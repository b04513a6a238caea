"""Which position mixer a configuration names, and its initialisation."""

import math
from typing import Any

import torch
from transformers import initialization as init

from .configuration_masked_mixer import REPEATS, MaskedMixerConfig
from .history_mixing import DenseMixer, HistoryMixer, PositionMixer, ToeplitzMixer
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


def init_position_mixer(mixer: PositionMixer) -> None:
    """The authors' initialisation of the mixing; projections have theirs.

    | parameter | value |
    |---|---|
    | weight and bias of a dense mixer | U(+-1 / sqrt(N k)), as of a convolution over N channels; 0 where hidden |
    | weight of others | N(0, 2 / N), bias 0 |
    | decay_value | 1 |
    """
    stages = [(mixer.weight, mixer.bias)]
    if isinstance(mixer, HistoryMixer) and mixer.inner_weight is not None and mixer.inner_bias is not None:
        stages.append((mixer.inner_weight, mixer.inner_bias))
    for weight, bias in stages:
        if isinstance(mixer, DenseMixer):
            bound = (mixer.positions * mixer.taps) ** -0.5
            init.copy_(weight, torch.empty_like(weight).uniform_(-bound, bound).tril(-mixer.diagonal))
            init.uniform_(bias, -bound, bound)
        else:
            init.normal_(weight, std=math.sqrt(2 / mixer.positions))
            init.zeros_(bias)
    decay_value = getattr(mixer, "decay_value", None)
    if decay_value is not None:
        init.ones_(decay_value)
