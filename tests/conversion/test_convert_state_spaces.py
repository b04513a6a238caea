"""Checkpoints of state-spaces/mamba, made from the published names and shapes, against a forward in float64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import state_spaces
import torch
from families import make_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.export import verify_export
from ssm_zoo.harness.json_files import read_json_object

ALL_ATTENTION = {**state_spaces.WITH_ATTENTION, "attn_layer_idx": [0, 1, 2], "ssm_cfg": {}}
LAYOUTS = {
    "mamba1": (state_spaces.MAMBA1, "zoo_mamba"),
    "mamba1-bias": ({**state_spaces.MAMBA1, "ssm_cfg": {"d_state": 5, "bias": True, "conv_bias": False}}, "zoo_mamba"),
    "mamba2": (state_spaces.MAMBA2, "zoo_mamba2"),
    "groups": (state_spaces.GROUPS, "zoo_mamba2"),
    "attention": (state_spaces.WITH_ATTENTION, "zoo_hybrid"),
    "convolution": (state_spaces.WITH_CONVOLUTION, "zoo_hybrid"),
    "mlp": (state_spaces.WITH_MLP, "zoo_hybrid"),
    "both": (state_spaces.WITH_BOTH, "zoo_hybrid"),
    "all-attention": (ALL_ATTENTION, "zoo_hybrid"),
    "all-attention-mlp": ({**ALL_ATTENTION, "d_intermediate": 100, "ssm_cfg": {"d_state": 5}}, "zoo_hybrid"),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    return LAYOUTS[request.param]


def test_a_layout_computes_what_its_papers_say_and_comes_back(layout: Any, tmp_path: Path) -> None:
    config, model_type = layout
    weights = state_spaces.tensors(config)
    report = convert(state_spaces.save(tmp_path / "theirs", config, weights), tmp_path / "ours", verify=False)
    assert report.keys_read == len(weights) - config.get("tie_embeddings", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.model_type == model_type
    ids = torch.randint(59, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = model(ids).logits
    expected = state_spaces.logits(config, weights, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)

    convert(tmp_path / "ours", tmp_path / "back", to="state-spaces", verify=False)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    given = {key: value for key, value in config["ssm_cfg"].items() if key != "dt_limit"}
    if written["attn_layer_idx"] != list(range(config["n_layer"])):
        assert given.items() <= written["ssm_cfg"].items()
    assert written["attn_layer_idx"] == config.get("attn_layer_idx", [])
    torch.testing.assert_close(state_spaces.logits(written, again, ids), expected, rtol=0, atol=0)


def test_logits_are_compared_where_transformers_has_the_model(tmp_path: Path) -> None:
    ssm = {**state_spaces.GROUPS["ssm_cfg"], "ngroups": 1}  # early releases of transformers mix groups up
    source = state_spaces.save(tmp_path / "both", {**state_spaces.WITH_BOTH, "ssm_cfg": ssm})
    logits = convert(source, tmp_path / "ours").logits
    assert not isinstance(logits, str) and logits.difference < 1e-5 < 0.3 < logits.largest
    logits = convert(state_spaces.save(tmp_path / "none", state_spaces.WITH_ATTENTION), tmp_path / "other").logits
    assert isinstance(logits, str) and "`mlp_types[0]` must be 'gated', got 'none'" in logits


def test_what_was_converted_loads_without_the_package(tmp_path: Path) -> None:
    convert(state_spaces.save(tmp_path / "theirs", state_spaces.WITH_ATTENTION), tmp_path / "ours")
    assert verify_export(tmp_path / "ours")["bit_equal"]


def test_a_model_of_bytes_gets_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    report = convert(state_spaces.save(tmp_path / "theirs", {**state_spaces.MAMBA1, "vocab_size": 256}), tmp_path / "m")
    assert report.carried == ["a tokenizer of bytes, as the source has none"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "ssm \n\tÄ €\U0001f600" + "".join(map(chr, range(256)))
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(set(tokenizer.convert_ids_to_tokens(range(256)))) == len(tokenizer) == 256
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["eos_token_id"] is None  # byte 0 is a byte
    convert(tmp_path / "theirs", tmp_path / "s", to="state-spaces")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"config.json", "model.safetensors"}


def test_fields_of_transformers_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    """Those that transformers and its Hub mixin write into a config.json of any library."""
    beside = {"torch_dtype": "float16", "dtype": "float16", "transformers_version": "4.40.0", "_name_or_path": "x/y"}
    beside |= {"architectures": ["MambaLMHeadModel"], "_commit_hash": "0" * 40}
    weights = state_spaces.tensors(state_spaces.MAMBA2)
    convert(state_spaces.save(tmp_path / "theirs", {**state_spaces.MAMBA2, **beside}, weights), tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(found["backbone.embeddings.weight"], weights["lm_head.weight"])
    state_spaces.save(tmp_path / "more", {**state_spaces.MAMBA2, **beside, "residual_scale": 0.5}, weights)
    with pytest.raises(ValueError, match=r"`residual_scale` is not a field of state-spaces: .* Remove it if"):
        convert(tmp_path / "more", tmp_path / "other")


def step_limit(folder: Path) -> tuple[float, ...]:
    """The limit of a saved model's step sizes, in Mamba-2 or in the hybrid's Mamba-2 layers."""
    config = AutoConfig.from_pretrained(folder)
    settings = config.settings_of("mamba2") if config.model_type == "zoo_hybrid" else config
    return tuple(settings.time_step_limit)


@pytest.mark.parametrize(
    ("limit", "written"),
    [
        ((0.0, math.inf), None),
        ((0.01, math.inf), [0.01, 3.4028234663852886e38]),
        ((0.05, 0.9), [0.05, 0.9]),
    ],
)
@pytest.mark.parametrize("family", ["mamba2", "mamba2-full"])
def test_what_is_written_is_json(family: str, limit: tuple[float, float], written: Any, tmp_path: Path) -> None:
    """JSON has no infinity: a limit that limits nothing is the largest float32, or is not written."""
    changes = {"intermediate_size": 128} if family == "mamba2-full" else {}
    make_model(family, time_step_limit=limit, **changes).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="state-spaces", verify=False)
    config = read_json_object(tmp_path / "theirs" / "config.json")  # which refuses what is not JSON
    assert config["ssm_cfg"].get("dt_limit") == written
    convert(tmp_path / "theirs", tmp_path / "again", verify=False)
    assert step_limit(tmp_path / "again") == limit
    read_json_object(tmp_path / "again" / "config.json")


def test_an_infinity_that_others_wrote_is_read(tmp_path: Path) -> None:
    config = {**state_spaces.MAMBA2, "ssm_cfg": {**state_spaces.MAMBA2["ssm_cfg"], "dt_limit": [0.0, math.inf]}}
    state_spaces.save(tmp_path / "theirs", config)
    assert "Infinity" in (tmp_path / "theirs" / "config.json").read_text()
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert step_limit(tmp_path / "ours") == (0.0, math.inf)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        pytest.param(
            "MAMBA2", {"ssm_cfg": {"layer": "Mamba3"}}, "`ssm_cfg.layer` must be Mamba1 or Mamba2, got 'Mamba3'", id="3"
        ),
        pytest.param("MAMBA2", {"rms_norm": False}, "`rms_norm` must be True, got False", id="norm"),
        pytest.param("MAMBA2", {"d_state": 3}, "`d_state` is not a field of state-spaces: d_model", id="unknown"),
        pytest.param("MAMBA2", {"d_model": "24"}, "`d_model` must be an integer of at least 1, got '24'", id="text"),
        pytest.param(
            "MAMBA2", {"vocab_size": None}, "`vocab_size` must be an integer .*, got None", id="no-vocabulary"
        ),
        pytest.param("MAMBA1", {"d_intermediate": 8}, "`d_intermediate` must be .* with Mamba1, got 8", id="mlp"),
        pytest.param(
            "MAMBA1", {"attn_layer_idx": [1]}, r"`attn_layer_idx` must be .* with Mamba1, got \[1\]", id="attn"
        ),
        pytest.param("MAMBA1", {"ssm_cfg": {"headdim": 8}}, "`ssm_cfg.headdim` is not a field", id="mamba2-field"),
        pytest.param(
            "WITH_BOTH", {"attn_layer_idx": [3]}, r"`attn_layer_idx` must be .* below 3, got \[3\]", id="layer"
        ),
    ],
)
def test_a_field_that_cannot_be_expressed_is_named(
    base: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused({**getattr(state_spaces, base), **change}, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D_has_hdim": True}, "`ssm_cfg.D_has_hdim` must be .*, got True"),
        ({"d_ssm": 32}, "`ssm_cfg.d_ssm` must be 48, got 32"),
        ({"norm_before_gate": True}, "`ssm_cfg.norm_before_gate` must be .*, got True"),
        ({"rmsnorm": False}, "`ssm_cfg.rmsnorm` must be .*, got False"),
        ({"d_state": 0}, "`ssm_cfg.d_state` must be .*, got 0"),
        ({"mimo": True}, "`ssm_cfg.mimo` is not a field"),
        ({"dt_limit": [0.0]}, r"`ssm_cfg.dt_limit` must be a list of two numbers, got \[0.0\]"),
        ({"dt_limit": "0"}, "`ssm_cfg.dt_limit` must be a list of two numbers, got '0'"),
    ],
)
def test_a_field_of_the_mixer_that_cannot_be_expressed_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ssm = {**state_spaces.MAMBA2["ssm_cfg"], **change}
    refused({**state_spaces.MAMBA2, "ssm_cfg": ssm}, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_conv": 1}, "`attn_cfg.d_conv` must be 0 or an integer of at least 2, got 1"),
        ({"mlp_dim": 64}, "`attn_cfg.mlp_dim` must be .*, got 64"),
        ({"causal": False}, "`attn_cfg.causal` must be .*, got False"),
        ({"rotary_emb_interleaved": True}, "`attn_cfg.rotary_emb_interleaved` must be .*, got True"),
        ({"softmax_scale": 1.0}, "`attn_cfg.softmax_scale` must be .*, got 1.0"),
        ({"out_proj_bias": True}, "`attn_cfg.out_proj_bias` must be False, got True"),
        ({"num_heads": None}, "`attn_cfg.num_heads` must be .*, got None"),
    ],
)
def test_a_field_of_attention_that_cannot_be_expressed_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    attention = {**state_spaces.ATTENTION, **change}
    refused({**state_spaces.WITH_ATTENTION, "attn_cfg": attention}, message, tmp_path)


def refused(config: dict[str, Any], message: str, folder: Path) -> None:
    """Nothing is written, and no weights are looked at."""
    (folder / "theirs").mkdir()
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        convert(folder / "theirs", folder / "ours")
    assert [path.name for path in folder.iterdir()] == ["theirs"]
