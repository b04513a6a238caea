"""Llamas to `zoo_hybrid` with full attention in every block, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from safetensors.torch import load_file, save_file
from teachers import LLAMA3_ROPE, make_qwen2, make_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.conversion.convert import convert

LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}


def logits(folder: Path, length: int = 40) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(draw_ids(2, length), use_cache=False).logits


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rope_parameters": LLAMA3_ROPE}, id="llama3"),
        pytest.param({"rope_parameters": LONGROPE, "max_position_embeddings": 64}, id="longrope with an open factor"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
            id="a share of the heads that Llama does not read",
        ),
        pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}, id="linear"),
        pytest.param({"num_key_value_heads": 6, "hidden_size": 24}, id="D is not heads times width"),
    ],
)
def test_a_llama_and_its_conversion_have_equal_logits_and_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    make_teacher(**changes).save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours", verify=False)
    expected = logits(tmp_path / "llama")
    torch.testing.assert_close(logits(tmp_path / "ours"), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "zoo_hybrid" and set(config["mixer_types"]) == {"full_attention"}
    convert(tmp_path / "ours", tmp_path / "back", verify=False)
    assert torch.equal(logits(tmp_path / "back"), expected)


def test_the_command_converts_a_llama_and_reports_parity(tmp_path: Path) -> None:
    make_teacher().save_pretrained(tmp_path / "llama")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "llama"), str(tmp_path / "ours")])
    assert done.exit_code == 0, done.stderr
    assert "transformers llama -> zoo zoo_hybrid" in done.stdout
    assert "LlamaForCausalLM and ZooHybridForCausalLM" in done.stdout
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert done.exit_code == 0, done.stderr
    assert "zoo zoo_hybrid -> transformers llama" in done.stdout
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llama", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_frequencies_that_earlier_releases_saved_are_left_out_and_reported(tmp_path: Path) -> None:
    make_teacher().save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    saved = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file(load_file(path) | saved, path, metadata={"format": "pt"})
    report = convert(tmp_path / "llama", tmp_path / "ours")
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5
    assert any("4 that no model reads are left out" in note for note in report.notes)
    assert "inv_freq" not in "".join(load_file(tmp_path / "ours" / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"head_dim": 5}, r"^config.json: .*even rotary dimension, but got `head_dim`=5", id="odd"),
        pytest.param({"num_key_value_heads": 4}, r"num_key_value_heads must divide num_attention_heads", id="groups"),
        pytest.param({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised", id="quantised"),
    ],
)
def test_a_llama_that_cannot_be_expressed_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_teacher().save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "llama", tmp_path / "ours")
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def test_what_llama_cannot_express_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its configuration wants the width to be a multiple of the heads, even where their own width is given."""
    sizes: dict[str, Any] = {"hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    make_model("full-discrete", mixer_types=["full_attention"] * 2, **sizes).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^config.json: .*hidden size \(20\) is not a multiple") as caught:
        convert(tmp_path / "ours", tmp_path / "theirs")
    assert "\n" not in str(caught.value) and not (tmp_path / "theirs").exists()


def test_attention_that_turns_a_part_of_each_head_is_not_written_as_a_llama(tmp_path: Path) -> None:
    rotary = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7}
    model = make_model("full-discrete", mixer_types=["full_attention"] * 2, rope_parameters=rotary)
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs")
    assert report.target == "transformers bamba"


def test_a_llama_in_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    make_teacher().bfloat16().save_pretrained(tmp_path / "llama")
    report = convert(tmp_path / "llama", tmp_path / "ours", verify=False)
    assert set(report.dtypes.values()) == {torch.bfloat16}
    convert(tmp_path / "ours", tmp_path / "back", verify=False)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_qwen2_has_equal_logits_and_comes_back(tied: bool, tmp_path: Path) -> None:
    make_qwen2(tie_word_embeddings=tied).save_pretrained(tmp_path / "qwen2")
    report = convert(tmp_path / "qwen2", tmp_path / "ours")
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5
    expected = logits(tmp_path / "qwen2")
    torch.testing.assert_close(logits(tmp_path / "ours"), expected, rtol=0, atol=1e-5)
    assert convert(tmp_path / "ours", tmp_path / "back").target == "transformers qwen2"
    assert torch.equal(logits(tmp_path / "back"), expected)


def test_a_qwen2_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = make_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    model.save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"`layer_types` must be \['full_attention'\], got .*sliding_attention"):
        convert(tmp_path / "qwen2", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
