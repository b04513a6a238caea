"""Checkpoints of state-spaces/mamba, made from the published names and shapes, against a forward in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import state_spaces
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.export import verify_export

LAYOUTS = {
    "mamba1": (state_spaces.MAMBA1, "zoo_mamba"),
    "mamba1-bias": ({**state_spaces.MAMBA1, "ssm_cfg": {"d_state": 5, "bias": True, "conv_bias": False}}, "zoo_mamba"),
    "mamba2": (state_spaces.MAMBA2, "zoo_mamba2"),
    "groups": (state_spaces.GROUPS, "zoo_mamba2"),
    "attention": (state_spaces.WITH_ATTENTION, "zoo_hybrid"),
    "mlp": (state_spaces.WITH_MLP, "zoo_hybrid"),
    "both": (state_spaces.WITH_BOTH, "zoo_hybrid"),
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
    assert report.carried == ["a tokenizer of bytes, which the source lacks"]
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


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        pytest.param(
            "MAMBA2", {"ssm_cfg": {"layer": "Mamba3"}}, "`ssm_cfg.layer` must be Mamba1 or Mamba2, got 'Mamba3'", id="3"
        ),
        pytest.param("MAMBA2", {"rms_norm": False}, "`rms_norm` must be True, got False", id="norm"),
        pytest.param("MAMBA2", {"d_state": 3}, "`d_state` is not a field of state-spaces: d_model", id="unknown"),
        pytest.param("MAMBA2", {"d_model": "24"}, "`d_model` must be an integer of at least 1, got '24'", id="text"),
        pytest.param("MAMBA2", {"vocab_size": None}, "`vocab_size` must be an integer of at least 1, got None", id="no-vocabulary"),
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
        ({"d_conv": 4}, "`attn_cfg.d_conv` must be 0, got 4"),
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
