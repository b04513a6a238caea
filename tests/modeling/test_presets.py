"""The published sizes: parameters and states as counted in their checkpoints."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssm_zoo.modeling import ZooMamba2Config, ZooMambaConfig, preset
from ssm_zoo.modeling.families import PRESETS

# Parameters (the tied head not counted twice) and MiB of float32 state a sequence.
PUBLISHED = {
    "mamba-130m": (129_135_360, 2.25),
    "mamba-370m": (371_516_416, 6.0),
    "mamba-790m": (793_204_224, 9.0),
    "mamba-1.4b": (1_372_178_432, 12.0),
    "mamba-2.8b": (2_768_345_600, 20.0),
    "mamba2-130m": (128_989_632, 18.0),
    "mamba2-370m": (368_346_624, 48.0),
    "mamba2-780m": (780_161_280, 72.0),
    "mamba2-1.3b": (1_343_757_312, 96.0),
    "mamba2-2.7b": (2_702_599_680, 160.0),
}


def test_there_are_no_others() -> None:
    inferred = {"taipan-190m", "taipan-450m", "taipan-1.3b"}  # test_taipan.py
    mixers = {name for name in PRESETS if "mixer" in name}  # test_masked_mixer.py
    assert len(mixers) == 12 and PRESETS.keys() == PUBLISHED.keys() | inferred | mixers


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, mebibytes = PUBLISHED[name]
    assert model.num_parameters() == parameters
    state = config.num_hidden_layers * config.intermediate_size * config.state_size * 4
    assert state / 2**20 == mebibytes


def test_changes() -> None:
    config = preset("mamba-370m", vocab_size=100, num_labels=5)
    assert isinstance(config, ZooMambaConfig) and (config.vocab_size, config.num_labels) == (100, 5)
    assert (config.hidden_size, config.num_hidden_layers, config.time_step_rank) == (1024, 48, 64)
    config = preset("mamba2-370m", hidden_size=128)
    assert isinstance(config, ZooMamba2Config) and (config.num_heads, config.num_hidden_layers) == (4, 48)
    assert preset("mamba2-370m").hidden_size == 1024


def test_another_name_raises() -> None:
    with pytest.raises(ValueError, match=r"name must be one of mamba-130m, .*, taipan-1.3b, got 'mamba-7b'"):
        preset("mamba-7b")
