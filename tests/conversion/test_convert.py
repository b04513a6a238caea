"""Checkpoints of transformers to ours and back: the same weights, the same logits, and folders that load."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, draw_ids, make_model, perturb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GenerationConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.conversion import weight_files
from ssm_zoo.conversion.convert import convert

# Releases before that argument took the mean square over all groups at once, which the published models do not.
grouped = pytest.mark.skipif(
    "group_size" not in inspect.signature(MambaRMSNormGated.__init__).parameters,
    reason="this release of transformers does not know the groups of the gated norm",
)
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 3, "eos_token_id": 5}
SIZES["pad_token_id"] = 7
MAMBA2 = SIZES | {"state_size": 8, "num_heads": 8, "head_dim": 8}
BAMBA = SIZES | {"num_hidden_layers": 3, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
BAMBA |= {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 8}
JAMBA = SIZES | {"num_hidden_layers": 5, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
JAMBA |= {"num_experts": 1, "num_experts_per_tok": 1}
LLAMA = SIZES | {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
EVERYTHING = {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "layer_norm_epsilon": 1e-3}
EVERYTHING |= {"tie_word_embeddings": False, "residual_in_fp32": False, "time_step_max": 0.2}

CASES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "mamba": (MambaForCausalLM, MambaConfig(**SIZES)),
    "mamba-everything": (
        MambaForCausalLM,
        MambaConfig(**SIZES, **EVERYTHING, expand=1, state_size=5, time_step_rank=3),
    ),
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig(**SIZES)),
    "falcon-everything": (
        FalconMambaForCausalLM,
        FalconMambaConfig(**SIZES, **EVERYTHING, expand=3, state_size=5, mixer_rms_eps=0.1),
    ),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config(**MAMBA2, n_groups=1)),
    "mamba2-everything": (
        Mamba2ForCausalLM,
        Mamba2Config(**MAMBA2 | EVERYTHING, n_groups=4, time_step_limit=(0.05, 0.5), rescale_prenorm_residual=False),
    ),
    "mamba2-tied": (
        Mamba2ForCausalLM,
        Mamba2Config(**MAMBA2, n_groups=2, tie_word_embeddings=True, time_step_limit=(0.01, math.inf)),
    ),
    "bamba": (BambaForCausalLM, BambaConfig(**BAMBA)),
    "bamba-everything": (
        BambaForCausalLM,
        BambaConfig(
            **BAMBA | {"num_attention_heads": 2},
            head_dim=10,
            mamba_n_groups=2,
            mamba_d_conv=3,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
            time_step_limit=(0.05, 0.5),
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.8},
        ),
    ),
    "bamba-all-attention": (
        BambaForCausalLM,
        BambaConfig(**BAMBA | {"attn_layer_indices": [0, 1, 2]}, hidden_act="gelu"),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "llama-everything": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": [5, 6]},
            head_dim=10,
            hidden_act="gelu",
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            use_cache=False,
            rope_parameters=YARN,
        ),
    ),
    "jamba": (JambaForCausalLM, JambaConfig(**JAMBA)),
    "jamba-everything": (
        JambaForCausalLM,
        JambaConfig(
            **JAMBA | {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_period": 3},
            head_dim=10,
            mamba_d_conv=3,
            mamba_expand=3,
            mamba_dt_rank=7,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
        ),
    ),
    "jamba-no-attention": (JambaForCausalLM, JambaConfig(**JAMBA | {"attn_layer_period": 6, "attn_layer_offset": 5})),
    "jamba-one-attention": (JambaForCausalLM, JambaConfig(**JAMBA | {"attn_layer_period": 6, "attn_layer_offset": 0})),
}
NEEDS_GROUPS = {"mamba2-everything", "mamba2-tied", "bamba-everything"}
PARAMETERS = [pytest.param(name, marks=[grouped] if name in NEEDS_GROUPS else []) for name in CASES]


@pytest.fixture(scope="module", params=PARAMETERS)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers saved."""
    folder = tmp_path_factory.mktemp("transformers") / request.param
    torch.manual_seed(0)
    model_class, config = CASES[request.param]
    model: Any = model_class(config)
    perturb(model)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(draw_ids(2, 23), use_cache=False).logits


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_there_and_back(theirs: Path, tmp_path: Path) -> None:
    report = convert(theirs, tmp_path / "ours")
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5
    expected = logits(theirs)
    assert expected.std() > 0.2
    torch.testing.assert_close(logits(tmp_path / "ours"), expected, rtol=0, atol=1e-5)

    convert(tmp_path / "ours", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), expected, rtol=0, atol=0)
    before, after = weights(theirs), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    # What decides the computation comes back, and nothing of ours is left in it.
    given, written = (type(CASES[theirs.name][1]).from_pretrained(folder) for folder in (theirs, tmp_path / "back"))
    different = {key for key, value in given.to_dict().items() if written.to_dict().get(key) != value}
    assert different <= {"initializer_range", "transformers_version", "time_step_rank"}
    assert not {"auto_map", "mixer_types"} & written.to_dict().keys()
    assert names(tmp_path / "back") == names(theirs)


@pytest.mark.parametrize("to", ["zoo", "transformers", "state-spaces"])
def test_dtype(to: str, tmp_path: Path) -> None:
    """All weights get it, but for those that our models keep in float32."""
    make_model("mamba2").save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", to=to, dtype="bfloat16")
    for key, tensor in weights(tmp_path / "out").items():
        precise = key.endswith((".A_log", ".D", ".dt_bias"))
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16) == report.dtypes[key], key
    if to != "state-spaces":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_that_is_not_asked_for_stays(tmp_path: Path) -> None:
    make_model("mamba2").half().save_pretrained(tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "out")
    before, after = weights(tmp_path / "half"), weights(tmp_path / "out")
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: t.dtype for key, t in before.items()}
    assert torch.float16 in {tensor.dtype for tensor in after.values()}


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    make_model("mamba2-full", n_groups=1).save_pretrained(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "shards", max_shard_size=4000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    torch.testing.assert_close(logits(tmp_path / "shards"), logits(tmp_path / "whole"), rtol=0, atol=1e-5)
    convert(tmp_path / "shards", tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 1
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("mamba2").save_pretrained(tmp_path / "source")
    read: list[str] = []

    class Watched:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file: Any = safe_open(*arguments, **options)
            self.keys, self.get_slice = self.file.keys, self.file.get_slice

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    written: list[int] = []
    save = weight_files.save_file
    monkeypatch.setattr(weight_files, "safe_open", Watched)
    monkeypatch.setattr(
        weight_files, "save_file", lambda shard, *rest, **more: (written.append(len(read)), save(shard, *rest, **more))
    )
    convert(tmp_path / "source", tmp_path / "out", max_shard_size=4000, verify=False)
    assert len(written) > 2
    held = [end - start for start, end in zip([0, *written], written, strict=False)]
    shards = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert sorted(held) == sorted(list(shards).count(name) for name in set(shards))


def test_what_belongs_to_a_model_is_carried_over(tmp_path: Path) -> None:
    model = make_model("mamba2-full", n_groups=1)
    model.save_pretrained(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours", "a template")
    GenerationConfig(max_new_tokens=9).save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs")
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(report.carried) == expected  # and not the licence of the code that is not there
    assert names(tmp_path / "theirs") == expected | {"config.json", "model.safetensors"}
    assert GenerationConfig.from_pretrained(tmp_path / "theirs").max_new_tokens == 9
    ids = AutoTokenizer.from_pretrained(tmp_path / "ours")("a b").input_ids
    (tmp_path / "theirs" / "LICENSE").write_text("Mine\n")
    convert(tmp_path / "theirs", tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("a b").input_ids == ids
    assert (tmp_path / "back" / "LICENSE").read_text() == "Mine\n"


def test_former_names(tmp_path: Path) -> None:
    """The embedding as transformers once called it, and the inner width as FalconMamba-7B gives it."""
    torch.manual_seed(0)
    model = FalconMambaForCausalLM(FalconMambaConfig(**SIZES, expand=3))
    model.save_pretrained(tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(values | {"expand": 16, "intermediate_size": 96}))
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "old", tmp_path / "ours")
    assert not isinstance(report.logits, str)
    with torch.no_grad():
        expected = model.eval()(draw_ids(2, 23), use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "ours"), expected, rtol=0, atol=1e-5)


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    make_model("mamba2").save_pretrained(tmp_path / "model")
    arguments = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "transformers"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    parameters = sum(tensor.numel() for tensor in weights(tmp_path / "model").values())
    first, *lines = done.stdout.splitlines()
    assert first == str(tmp_path / "out")
    count = len(weights(tmp_path / "out"))
    assert lines[:3] == [
        "zoo zoo_mamba2 -> transformers mamba2",
        f"keys: {count} read, {count} written; none missing, none left over",
        "shapes: all as both configurations promise",
    ]
    assert lines[3] == f"parameters: {parameters:,}"
    assert lines[4] == f"dtypes: {count} float32"
    assert lines[5].startswith("other files: generation_config.json")
    assert "apart at most, of at most" in lines[6] and "Mamba2ForCausalLM and ZooMamba2ForCausalLM" in lines[6]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--overwrite", "--no-verify"]).exit_code == 0
    assert (
        "logits: not compared: not asked for"
        in CliRunner().invoke(app, [*arguments, "--overwrite", "--no-verify"]).stdout
    )
