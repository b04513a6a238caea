"""Checkpoints of masked, Toeplitz and recurrent mixers, made from the published names, against forwards in float64."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_mixers import (
    LLAMA_CONFIG,
    MASKED,
    D,
    Kind,
    N,
    V,
    heads,
    language_mixer,
    multi_head,
    outputs,
    retrieval,
    save,
    tensors,
)
from safetensors.torch import load_file, save_file
from structured_mixers import RMS, STRUCTURED, mlp_mixer, separate_heads, several
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.export import verify_export

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
KINDS = MASKED | STRUCTURED | RMS
WEIGHTS = "model.safetensors"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def load(folder: Path, kind: Kind) -> Any:
    classes = {"decoderblocks": AutoModel, "convr": AutoModelForMaskedLM}
    found = [cls for part, cls in classes.items() if any(part in key for key in kind.shapes)]
    return (found or [AutoModelForCausalLM])[0].from_pretrained(folder).eval()


def computed(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


def ids_of(length: int = N) -> Tensor:
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1))


def test_a_kind_computes_what_is_published(kind: Kind, tmp_path: Path) -> None:
    weights = tensors(kind)
    report = convert(save(tmp_path / "theirs", weights), tmp_path / "ours", settings=kind.settings)
    unused = [key for key in weights if key.startswith(kind.unused)] if kind.unused else []
    assert report.keys_read == len(weights) - len(unused)
    assert [f"left out: {len(unused)} tensors" in line for line in report.lines()].count(True) == bool(unused)
    model = load(tmp_path / "ours", kind)
    assert model.config.model_type == "masked_mixer"
    assert {name: getattr(model.config, name) for name in kind.config} == kind.config
    ids = ids_of()
    expected = outputs(kind, weights, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(computed(model, ids), expected.float(), rtol=1e-5, atol=1e-5)
    if not kind.config.get("bidirectional"):  # a shorter text is one that is filled up at its right
        torch.testing.assert_close(computed(model, ids[:, :6]), expected[:, :6].float(), rtol=1e-5, atol=1e-5)
    for key, tensor in load_file(tmp_path / "ours" / WEIGHTS).items():  # what no forward reads is cut off
        if tensor.dim() == 3:
            assert not tensor.triu(-1 if ".reverse." in key else 1).any(), key


WRITTEN = ["flat", "kernel-3", "tied", "heads", "heads-in-conv", "linear", "legacy", "expanded", "expanded-2"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_masked_mixer_comes_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, below the diagonals; a linear layer as a convolution, and what legacy heads compute as one head."""
    kind = MASKED[name]
    weights = tensors(kind)
    convert(save(tmp_path / "theirs", weights), tmp_path / "ours", verify=False)
    report = convert(tmp_path / "ours", tmp_path / "back", to="maskedmixers")
    assert report.lines()[0] == "zoo masked_mixer -> maskedmixers LanguageMixer or MultiHeadedMixer"
    assert [path.name for path in (tmp_path / "back").iterdir()] == [WEIGHTS]
    again = load_file(tmp_path / "back" / WEIGHTS)
    if name != "legacy":
        expected = {
            key: tensor if tensor.dim() < 3 else tensor.permute(2, 0, 1).tril().permute(1, 2, 0)
            for key, tensor in weights.items()
        }
        if name == "linear":
            expected = {k: t.tril()[..., None] if k.endswith("conv.weight") else t for k, t in expected.items()}
        if name == "tied":
            expected["lm_head.weight"] = expected["wte.weight"]
        if name == "heads":  # a layer that is not applied, here one that changes nothing
            expected |= {"wte_second.weight": torch.eye(D), "wte_second.bias": torch.zeros(D)}
        if name == "expanded":  # biases that change nothing
            expected |= {
                f"mixerblocks.{layer}.conv.{part}.bias": torch.zeros(N) for layer in range(2) for part in (0, 2)
            }
        if name == "expanded-2":  # without what no position reads
            expected = {key: t[:N, :N] if ".conv." in key and t.dim() > 1 else t for key, t in expected.items()}
            expected |= {key: t[:N] for key, t in expected.items() if key.endswith("conv.0.bias")}
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in expected)
    convert(tmp_path / "back", tmp_path / "ours-again", verify=False)
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "ours-again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if name == "legacy":  # one head with a projection that changes nothing
        assert again["mixerblocks.0.mixerhead.proj_head.0.weight"].equal(torch.eye(D))
        as_one = language_mixer(heads("mixerhead", 1, 1, False), multi_head("mixerhead", 1, False))
        expected = outputs(kind, weights, ids_of())
        torch.testing.assert_close(outputs(as_one, again, ids_of()), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_the_embedding_is_found_however_it_was_saved(tmp_path: Path) -> None:
    weights = tensors(MASKED["tied"])
    both = {**weights, "lm_head.weight": weights["wte.weight"].clone()}
    other = {("lm_head.weight" if key == "wte.weight" else key): tensor for key, tensor in weights.items()}
    written = []
    for name, saved in (("embedding", weights), ("both", both), ("head", other)):
        convert(save(tmp_path / f"{name}-theirs", saved), tmp_path / name, verify=False)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is True
        written.append(load_file(tmp_path / name / WEIGHTS))
    assert all(found.keys() == written[0].keys() for found in written)
    assert all(torch.equal(found[key], written[0][key]) for found in written for key in found)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_names_of_wrappers_are_taken_off(wrapper: str, tmp_path: Path) -> None:
    weights = tensors(MASKED["flat"])
    source = save(tmp_path / "theirs", {wrapper + key: tensor for key, tensor in weights.items()})
    assert convert(source, tmp_path / "ours").keys_read == len(weights)


def test_a_transfixer_is_read_with_its_configuration(tmp_path: Path) -> None:
    kind = MASKED["transfixer"]
    weights = tensors(kind)
    source = save(tmp_path / "theirs", weights)
    (source / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    convert(source, tmp_path / "ours")
    model = load(tmp_path / "ours", kind)
    expected = outputs(kind, weights, ids_of())
    torch.testing.assert_close(computed(model, ids_of()), expected.float(), rtol=1e-5, atol=1e-5)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.config.max_position_embeddings == N


def test_a_text_at_the_right_of_padding_is_read_as_it_was_trained(tmp_path: Path) -> None:
    kind, ids = MASKED["flat"], ids_of()
    weights = tensors(kind)
    settings = ("pad_mode=as_trained", "pad_token_id=1", "eos_token_id=1")
    convert(save(tmp_path / "theirs", weights), tmp_path / "ours", settings=settings)
    model = load(tmp_path / "ours", kind)
    assert (model.config.pad_mode, model.config.pad_token_id, model.config.eos_token_id) == ("as_trained", 1, 1)
    # A text ends at the last position but one, whose output is the last that was trained.
    filled = torch.cat([torch.ones(2, 3, dtype=torch.long), ids[:, :6], ids[:, 6:7]], dim=1)
    expected = outputs(kind, weights, filled).float()
    with torch.no_grad():
        text = model(ids[:, :6]).logits
        whole = model(filled, attention_mask=(torch.arange(N) >= 3).long().expand(2, N)).logits
    torch.testing.assert_close(text, expected[:, 3:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


def long_combined(constant: int) -> Kind:
    """A combined head of as many positions as its decay constant tells, 512 each: the row matrix is divided by it."""
    positions = 512 * constant
    base = STRUCTURED["combined"]
    shapes = {key: tuple(positions if size == N else size for size in shape) for key, shape in base.shapes.items()}
    mix = separate_heads([f"combined/{constant}"] * 2, constant, True)
    return replace(base, shapes=shapes, forward=mlp_mixer(several(2, 2, (2, 1)), mix, 2).forward)


def test_a_combined_head_divides_its_rows_and_not_the_exponent_of_their_decay(tmp_path: Path) -> None:
    kind = long_combined(2)
    weights = {key: tensor.clip(0.96) if "decay_value" in key else tensor for key, tensor in tensors(kind).items()}
    source = save(tmp_path / "theirs", weights)
    convert(source, tmp_path / "ours", verify=False)
    actual = computed(load(tmp_path / "ours", kind).double(), ids_of(1024))
    torch.testing.assert_close(actual, outputs(kind, weights, ids_of(1024)), rtol=1e-5, atol=1e-5)
    key = "mixer_blocks.1.token_mixing_layer.mixer_heads.0.decay_value"
    save_file({**weights, key: torch.tensor([[0.93], [0.93]])}, source / WEIGHTS)
    with pytest.raises(
        ValueError, match=rf"{re.escape(key)} to the power of 2 must be a decay .* 0.9, got 0.8649 from 0.93"
    ):
        convert(source, tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


def test_a_retrieval_mixer_scores_as_is_published(tmp_path: Path) -> None:
    kind = retrieval()
    weights = tensors(kind)
    convert(save(tmp_path / "theirs", weights), tmp_path / "ours")
    model: Any = AutoModel.from_pretrained(tmp_path / "ours").eval()
    rows = torch.randn(2, N, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = model(rows[:, 0], rows[:, 1:]).logits
    expected = outputs(kind, weights, rows)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    report = convert(tmp_path / "theirs", tmp_path / "half", dtype="float16", settings=("hidden_act=relu",))
    assert set(report.dtypes.values()) == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["hidden_act"] == "relu"


def test_what_the_keys_leave_open_is_said_in_the_report(tmp_path: Path) -> None:
    line = "mixing: assumed to be row_repeat, as in the authors' code; other kinds have the same keys"
    source = save(tmp_path / "theirs", tensors(STRUCTURED["row"]))
    assert line in convert(source, tmp_path / "ours").lines()
    assert line not in convert(source, tmp_path / "said", settings=("mixing=row_repeat",)).lines()


def test_weights_in_half_precision_stay_so(tmp_path: Path) -> None:
    for name in ("heads", "mixed", "010-mean"):
        weights = {key: tensor.half() for key, tensor in tensors(KINDS[name]).items()}
        source = save(tmp_path / name, weights)
        report = convert(source, tmp_path / f"{name}-ours", settings=KINDS[name].settings, verify=False)
        assert set(report.dtypes.values()) == {torch.float16}
        report = convert(source, tmp_path / f"{name}-again", settings=KINDS[name].settings, dtype="bfloat16")
        precise = {key for key, dtype in report.dtypes.items() if dtype == torch.float32}
        assert precise == {key for key in report.dtypes if key.endswith("decay_value")}


def test_a_converted_mixer_loads_without_the_package(tmp_path: Path) -> None:
    convert(save(tmp_path / "theirs", tensors(STRUCTURED["mixed"])), tmp_path / "ours")
    assert verify_export(tmp_path / "ours")["bit_equal"]


def test_the_command_takes_what_the_shapes_do_not_tell(tmp_path: Path) -> None:
    source = save(tmp_path / "theirs", tensors(STRUCTURED["column-heads"]))
    arguments = ["convert", str(source), str(tmp_path / "ours")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and done.stderr.startswith("ssm-zoo: --set mixing must be given")
    done = CliRunner().invoke(app, [*arguments, "--set", "mixing=column_repeat", "--set", "hidden_act=relu"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[1] == "recurrent MLPMixer -> zoo masked_mixer"
    assert "logits: not compared: transformers has no such model" in done.stdout
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["mixing"], config["hidden_act"]) == ("column_repeat", "relu")
    back = [str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "maskedmixers"]
    done = CliRunner().invoke(app, ["convert", *back])
    assert done.exit_code == 2 and "`mixing` must be 'dense', got 'column_repeat'" in done.stderr
