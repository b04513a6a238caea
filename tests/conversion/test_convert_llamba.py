"""Checkpoints of Llamba, made from the published names and shapes, against a forward in float64; Phi-Mamba refused."""

import json
from pathlib import Path
from typing import Any

import llamba
import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.formats.cartesia_llamba import LLAMBA
from ssm_zoo.conversion.rules import Mapper
from ssm_zoo.modeling import ZooHybridForCausalLM

LAYOUTS = {"plain": llamba.LLAMBA, "tied": llamba.TIED, "biases": llamba.BIASES}
DISCRETE = {"state_size": 6, "vocab_size": 40}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LAYOUTS[request.param]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_layout_computes_what_is_published_and_comes_back(layout: dict[str, Any], tmp_path: Path) -> None:
    weights = llamba.tensors(layout)
    report = convert(llamba.save(tmp_path / "theirs", layout, weights), tmp_path / "ours")
    assert report.keys_read == len(weights)
    assert (
        isinstance(report.logits, str)
        and "`mixer_types[0]` must be 'mamba2' or 'full_attention', got 'discrete_mamba2'" in report.logits
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.model_type == "zoo_hybrid"
    ids = torch.randint(59, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = model(ids).logits
    expected = llamba.logits(layout, weights, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)

    convert(tmp_path / "ours", tmp_path / "back", to="cartesia")
    again = weights_of(tmp_path / "back")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert layout["ssm_cfg"].items() <= written["ssm_cfg"].items() and layout["mlp_cfg"] == written["mlp_cfg"]
    same = ("model_type", "architectures", "d_model", "n_layer", "tie_embeddings", "lm_head_bias", "norm_epsilon")
    assert {key: written[key] for key in same} == {key: layout[key] for key in same}
    assert written["vocab_size"] == 64
    torch.testing.assert_close(llamba.logits(written, again, ids), expected, rtol=0, atol=0)


def test_a_model_of_ours_is_written_and_read_again(tmp_path: Path) -> None:
    model = make_model("discrete", **DISCRETE, conv_kernel=3, feature_map="identity", head_dim=8)
    for block in model.backbone.layers:
        block.mixer.dt_bias.data.zero_()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="cartesia")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    actual = llamba.logits(written, weights_of(tmp_path / "theirs"), ids)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "back")
    before, after = weights_of(tmp_path / "ours"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_of_8b_parameters_has_the_published_keys() -> None:
    """Of the sizes that the published code takes by default. The biases of the decays are ours alone."""
    given = {key: llamba.LLAMBA_8B[key] for key in ("model_type", "vocab_size", "d_model")}
    with torch.device("meta"):
        model = ZooHybridForCausalLM(LLAMBA.zoo_config(given))
    theirs = Mapper(LLAMBA.rules(model.config), model.state_dict()).expected()
    assert {key: tensor.shape for key, tensor in theirs.items()} == llamba.shapes(llamba.LLAMBA_8B)
    assert sum(torch.Size(tensor.shape).numel() for tensor in theirs.values()) == 8_841_204_736
    assert model.num_parameters() == 8_841_204_736 + 32 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": None}, "`d_model` must be an integer of at least 1, got None"),
        ({"lm_head_bias": True}, "`lm_head_bias` must be False, got True"),
        ({"norm_epsilon": 1e-6}, "`norm_epsilon` must be 1e-05, got 1e-06"),
        ({"lm_head_prenorm": "layer"}, "`lm_head_prenorm` must be 'rms', got 'layer'"),
        ({"mlp_cfg": {"gated": True}}, "`mlp_cfg.gated` is not a field of llamba: intermediate_size"),
        ({"ssm_cfg": {"rotary": True}}, "`ssm_cfg.rotary` is not a field of llamba: d_state"),
        ({"ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 2}}, "`ssm_cfg.n_qk_heads` must be 4, got 2"),
        ({"ssm_cfg": {"n_v_heads": 7, "n_qk_heads": 7}}, r"`ssm_cfg.n_v_heads` must divide .*24\), got 7"),
        (
            {"ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 4, "activation": "silu"}},
            "`ssm_cfg.activation` must be .*, got 'silu'",
        ),
        (
            {"ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 4, "conv_bias": False}},
            "`ssm_cfg.conv_bias` must be .*, got False",
        ),
        ({"ssm_cfg": [1]}, r"`ssm_cfg` must be an object, got \[1\]"),
    ],
)
def test_a_field_that_cannot_be_expressed_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused({**llamba.LLAMBA, **change}, message, tmp_path)


@pytest.mark.parametrize(
    ("block", "kind"),
    [(llamba.PHI_MAMBA["Block1"], "'modules.phi_block'"), ("phi", "'phi'")],
    ids=["published", "text"],
)
def test_phi_mamba_is_refused_by_its_block(block: Any, kind: str, tmp_path: Path) -> None:
    message = f"`Block1.BlockType` is {kind}, the block of Phi-Mamba: its mixer and MLP"
    refused({**llamba.PHI_MAMBA, "Block1": block}, message, tmp_path)


def refused(config: dict[str, Any], message: str, folder: Path) -> None:
    """Nothing is written, and no weights are looked at."""
    (folder / "theirs").mkdir()
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        convert(folder / "theirs", folder / "ours")
    assert [path.name for path in folder.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "weights that the target layout does not have must be zero: 2 are not: backbone.layers.0.mixer.dt_bias"),
        (
            {"mixer_types": ["discrete_mamba2", "mamba2"]},
            r"config.json: `mixer_types\[1\]` must be 'disc.*, got 'mamba2'",
        ),
        ({"mlp_types": ["none", "gated"]}, r"config.json: `mlp_types\[0\]` must be 'gated', got 'none'"),
        ({"feature_map": "softplus"}, "config.json: `discrete_mamba2.feature_map` must be 'identity', got 'softplus'"),
        (
            {"feature_map": "softplus", "normalize": True},
            "config.json: `discrete_mamba2.feature_map` must be .*, got 'softplus'",
        ),
        ({"ssm_rotary": True, "state_size": 6}, "config.json: `discrete_mamba2.rotary` must be False, got True"),
        ({"rms_norm_eps": 1e-6}, "config.json: `rms_norm_eps` must be 1e-05, got 1e-06"),
        (
            {"head_dim": 10},
            r"config.json: `head_dim` must make 4 heads as wide as a multiple of .*16.*, got 10",
        ),
    ],
)
def test_what_llamba_cannot_express_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {**DISCRETE, "feature_map": "identity", "head_dim": 8 if "ssm_rotary" not in change else 6}
    make_model("discrete", **(sizes | change)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"^{message}"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="cartesia")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
