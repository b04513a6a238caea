"""Masked mixers: initial weights, sizes, what is derived from what is given, and what configurations refuse."""

import math
from typing import Any

import pytest
import torch
from families import VOCAB
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from ssm_zoo.modeling import MaskedMixerConfig, MaskedMixerForCausalLM, ZooHybridConfig, preset

N = 12


def test_dense_mixers_start_as_convolutions_do() -> None:
    torch.manual_seed(0)
    model = MaskedMixerForCausalLM(
        MaskedMixerConfig(hidden_size=64, num_hidden_layers=1, kernel_size=4, vocab_size=300)
    )
    mixer, bound = model.backbone.layers[0].mixer, (512 * 4) ** -0.5
    assert not mixer.weight.triu(1).any()
    used = mixer.weight[:, torch.ones(512, 512).tril().bool()]
    for drawn, limit in ((used, bound), (mixer.bias, bound), (model.lm_head.weight, 64**-0.5)):
        assert 0.95 * limit < drawn.abs().max() <= limit
        assert drawn.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("mixing", ["toeplitz", "mixed_repeat"])
def test_other_mixers_start_as_kaiming_says(mixing: str) -> None:
    torch.manual_seed(0)
    config = MaskedMixerConfig(mixing=mixing, num_heads=4, hidden_size=64, num_hidden_layers=1, initializer_range=0.3)
    model = MaskedMixerForCausalLM(config)
    mixer = model.backbone.layers[0].mixer
    assert mixer.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.1)
    assert mixer.in_proj.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    assert not mixer.bias.any() and not mixer.in_proj.bias.any()
    assert mixing == "toeplitz" or (mixer.decay_value == 1).all()
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.3, rel=0.05)


# In millions, as counted in the specification of the author's models: V, D, blocks, N, one head and four.
TABLE = [
    (4096, 512, 8, 512, "23m", 23_109_632, "34m", 33_615_872),
    (4096, 1024, 8, 512, "78m", 77_672_448, "101m", 100_769_792),
    (8000, 512, 16, 512, "46m", 46_022_656, "67m", 67_035_136),
    (8000, 1024, 16, 512, "155m", 154_951_680, "201m", 201_146_368),
    (8000, 1024, 16, 1024, "168m", 167_542_784, "252m", 251_510_784),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row[:4])))
def test_presets_have_the_parameters_of_the_authors_models(row: tuple[Any, ...]) -> None:
    vocab, width, blocks, positions, *named = row
    for heads, name, published in ((1, *named[:2]), (4, *named[2:])):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset(f"masked-mixer-{name}"))
        mixing = heads * (positions**2 + positions) + (2 * (width**2 + width) if heads > 1 else 0)
        expected = 2 * vocab * width + blocks * (mixing + 8 * width**2 + 5 * width + 4 * width)
        assert model.num_parameters() == expected == published


@pytest.mark.parametrize(
    ("name", "positions", "of_a_head"), [("toeplitz-mixer-184m", 512, 1024), ("recurrent-mixer-184m", 1024, 2049)]
)
def test_presets_of_the_other_mixers(name: str, positions: int, of_a_head: int) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = 4 * of_a_head + 2 * (1024**2 + 1024) + 8 * 1024**2 + 9 * 1024
    assert model.num_parameters() == 2 * 8000 * 1024 + 16 * block
    assert (config.max_position_embeddings, config.mlp_first, config.hidden_act) == (positions, True, "silu")


def test_what_is_not_given_is_the_authors() -> None:
    dense, toeplitz = MaskedMixerConfig(), MaskedMixerConfig(mixing="toeplitz", num_heads=4)
    hybrid = MaskedMixerConfig(attention="series")
    assert (dense.intermediate_size, dense.hidden_act, dense.mlp_first, dense.use_projections) == (
        2048,
        "gelu",
        False,
        False,
    )
    assert (toeplitz.hidden_act, toeplitz.mlp_first, toeplitz.use_projections) == ("silu", True, True)
    assert (dense.norm_type, dense.final_norm, dense.mlp_type, dense.mlp_bias) == ("layer_norm", False, "plain", True)
    assert (hybrid.norm_type, hybrid.final_norm, hybrid.mlp_type, hybrid.mlp_bias) == ("rms_norm", True, "gated", False)
    assert (hybrid.head_dim, hybrid.num_key_value_heads, hybrid.hidden_act, hybrid.mlp_first) == (128, 4, "silu", False)
    assert set(dense.layer_types) == {"zoo_history"} and set(hybrid.layer_types) == {"zoo_attention_history"}
    assert set(MaskedMixerConfig(mixing="row_repeat").layer_types) == {"zoo_state"}


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    "width": ({"hidden_size": -16}, "hidden_size must be at least 1, got -16"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    "positions": ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    "mixing": ({"mixing": "fourier"}, "mixing must be one of dense, toeplitz, row_repeat, .*, got 'fourier'"),
    "no heads": ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    "heads": ({"num_heads": 3}, r"num_heads must divide hidden_size \(16\), got 3"),
    "odd heads": (
        {"mixing": "mixed_repeat", "num_heads": 1},
        "num_heads must be even for mixing='mixed_repeat', .* got 1",
    ),
    "expanded repeats": (
        {"expanded": True, "mixing": "row_repeat"},
        "expanded needs mixing='dense' or 'toeplitz', .*, got mixing='row_repeat'",
    ),
    "expanded taps": ({"expanded": True, "kernel_size": 2}, "expanded needs .* kernel_size=1 .* kernel_size=2 and"),
    "expanded encoder": (
        {"expanded": True, "bidirectional": True},
        "expanded needs .* bidirectional=False, got .* bidirectional=True",
    ),
    "no kernel": ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
    "wide kernel": ({"num_heads": 4, "kernel_size": 5}, "kernel_size must be at most the 4 channels of a head, got 5"),
    "mlp width": ({"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
    "activation": ({"hidden_act": "swash"}, "hidden_act must be an activation of transformers, got 'swash'"),
    "mlp": ({"mlp_type": "double"}, "mlp_type must be one of plain, gated, got 'double'"),
    "norm": ({"norm_type": "batch"}, "norm_type must be one of layer_norm, rms_norm, got 'batch'"),
    "epsilon": ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
    "range": ({"initializer_range": math.inf}, "initializer_range must be positive, got inf"),
    "attention": ({"attention": "both"}, "attention must be one of none, series, parallel, got 'both'"),
    "attention heads": (
        {"attention": "series", "num_attention_heads": 3},
        r"num_attention_heads must divide hidden_size \(16\) if head_dim is not given, got 3",
    ),
    "no attention heads": (
        {"attention": "series", "num_attention_heads": 0, "head_dim": 4},
        "num_attention_heads must be at least 1, got 0",
    ),
    "groups": (
        {"attention": "series", "num_key_value_heads": 3},
        r"num_key_value_heads must divide num_attention_heads \(4\), got 3",
    ),
    "odd head": ({"attention": "parallel", "head_dim": 3}, "head_dim must be even, for the rotary embedding, got 3"),
    "mlp before attention": ({"attention": "parallel", "mlp_first": True}, "mlp_first must be False with attention"),
    "encoder of repeats": (
        {"bidirectional": True, "mixing": "row_repeat"},
        "bidirectional needs mixing='dense' or 'toeplitz' .* got mixing='row_repeat'",
    ),
    "encoder with attention": (
        {"bidirectional": True, "attention": "series"},
        "bidirectional needs .* attention='none', got .* attention='series'",
    ),
    "lookahead": ({"lookahead": 3}, "lookahead must be 1 or 2, got 3"),
    "padding": ({"pad_mode": "left"}, "pad_mode must be one of shift, as_trained, got 'left'"),
    "padding without a token": (
        {"pad_mode": "as_trained"},
        "pad_token_id must be given with pad_mode='as_trained', which pads rows with it, got None",
    ),
    "padding token": ({"pad_token_id": 99}, "pad_token_id must be None or from 0 to 60, got 99"),
    "overflow": ({"context_overflow": "drop"}, "context_overflow must be one of error, window, got 'drop'"),
    "window with attention": (
        {"context_overflow": "window", "attention": "series"},
        "context_overflow='window' needs attention='none' .* got attention='series'",
    ),
    "window of filled rows": (
        {"context_overflow": "window", "pad_mode": "as_trained", "pad_token_id": 0},
        "context_overflow='window' needs .* pad_mode='shift', got .*pad_mode='as_trained'",
    ),
    "window of nothing": (
        {"context_overflow": "window", "max_position_embeddings": 2},
        "max_position_embeddings must be at least 3, got 2",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_configuration_is_refused_by_name(case: str) -> None:
    changes, message = MALFORMED[case]
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": N}
    MaskedMixerConfig(**sizes)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        MaskedMixerConfig(**(sizes | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixing": "spiral"}, "mixing must be one of dense, .*, got 'spiral'"),
        ({"mixing_heads": 3}, r"masked_mixing: num_heads must divide hidden_size \(16\), got 3"),
        ({"mixing_kernel": 17}, "masked_mixing: kernel_size must be at most the 16 channels of a head, got 17"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    ],
)
def test_the_hybrid_refuses_the_same(change: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mixer_types": ["masked_mixing"]}
    ZooHybridConfig(**sizes)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        ZooHybridConfig(**(sizes | change))
