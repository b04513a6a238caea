"""Malformed checkpoints and wrong arguments: one clear error each, and nothing is written."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import state_spaces
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JambaConfig, Mamba2Config, Mamba2ForCausalLM
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.conversion import convert as convert_module
from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.rules import Mapper, Rule
from ssm_zoo.conversion.weight_files import read_checkpoint, write_weights
from ssm_zoo.harness import whole_files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "backbone.layers.1.norm.weight"
EMBEDDING = "backbone.embeddings.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, message: str, **options: Any) -> None:
    """Converting `folder`/source to `folder`/out raises, and leaves everything as it was."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as caught:
        convert(folder / "source", folder / "out", **options)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir()} <= {"source", "out"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """transformers' Mamba-2."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4}
    Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=8, n_groups=1)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def shard(source: Path) -> None:
    """Make shards of the weights."""
    tensors = read_checkpoint(source).tensors
    write_weights(source, tensors, max_shard_size=3000)
    (source / WEIGHTS).unlink()


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        tensors = load_file(source / WEIGHTS)
        change(tensors)
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})

    return apply


def with_values(**change: Any) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        values = json.loads((source / "config.json").read_text()) | change
        (source / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "-"}))

    return apply


def with_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        shard(source)
        values = json.loads((source / INDEX).read_text())
        change(values["weight_map"])
        (source / INDEX).write_text(json.dumps(values))

    return apply


def with_index_text(text: str) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        shard(source)
        (source / INDEX).write_text(text)

    return apply


def truncate(source: Path) -> None:
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-8])


def missing_shard(source: Path) -> None:
    shard(source)
    next(source.glob("model-00002-*")).unlink()


MALFORMED = {
    "missing key": (
        with_tensors(lambda t: [t.pop(key) for key in (NORM, "backbone.norm_f.weight")]),
        f"source: the weights are not what config.json promises: 2 missing: {NORM}, backbone.norm_f.weight$",
    ),
    "extra key": (with_tensors(lambda t: t.update(a=torch.ones(1))), "promises: 1 left over: a$"),
    "wrong shape": (
        with_tensors(lambda t: t.update({NORM: torch.ones(17)})),
        rf"promises: 1 of another shape: {NORM} \[17\] instead of \[16\]$",
    ),
    "integer weights": (
        with_tensors(lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})),
        rf"1 of a dtype other than float16, bfloat16, float32, float64: {NORM} int8$",
    ),
    "all of it": (
        with_tensors(lambda t: [t.pop(NORM), t.update(a=torch.ones(1)), t.update({"lm_head.weight": torch.ones(2)})]),
        r"promises: 1 missing: .*; 1 left over: a; 1 of another shape: lm_head.weight \[2\] instead of \[61, 16\]$",
    ),
    "truncated": (truncate, r"^model.safetensors is damaged, or no safetensors file \("),
    "config of more layers": (with_values(num_hidden_layers=3), r"9 missing: backbone.layers.2.*, \.\.\.$"),
    "config of fewer layers": (with_values(num_hidden_layers=1), r"9 left over: backbone.layers.1.*, \.\.\.$"),
    "config of other groups": (with_values(n_groups=4), r"6 of another shape: .*conv1d"),
    "config without a head": (
        with_values(tie_word_embeddings=True),
        "says that the head is tied to the embedding .* lm_head.weight and backbone.embeddings.weight differ",
    ),
    "config of other sizes": (with_values(num_heads=5), r"^config.json: .*num_heads \* head_dim \(40\)"),
    "another activation": (with_values(hidden_act="gelu"), "`hidden_act` must be 'silu', got 'gelu'"),
    "fla's mamba2": (with_values(norm_eps=1e-3), "`norm_eps` must be 1e-05, got 0.001"),
    "fla's norm": (with_values(norm_before_gate=True), "`norm_before_gate` must be False, got True"),
    "another model": (
        with_values(model_type="bloom"),
        "`model_type` must be one of mamba, falcon_mamba, mam.*, got 'bloom'",
    ),
    "no model": (
        with_values(model_type="-"),
        "`model_type` must be .* missing beside .* of state-spaces or .* of torchscale, got None",
    ),
    "config is a list": (lambda s: (s / "config.json").write_text("[]"), "config.json .*must be an object, got a list"),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{"), "config.json .*must be JSON"),
    "no config": (lambda s: (s / "config.json").unlink(), "must hold a config.json, or have the keys of"),
    "no weights": (
        lambda s: (s / WEIGHTS).unlink(),
        "holds no weights: none of model.safetensors, .*, pytorch_model.bin.index.json is there",
    ),
    "missing shard": (missing_shard, r"index.json names \d shards, of which 1 are not in .*: model-00002-of-"),
    "shard elsewhere": (
        with_index(lambda m: m.update({NORM: "../source/config.json"})),
        rf"`weight_map.{NORM}` must be the name of a file in the same folder, got '../source/config.json'",
    ),
    "key in another shard": (
        with_index(lambda m: m.update({NORM: next(name for name in m.values() if name != m[NORM])})),
        f"index.json does not fit its shards for 1 keys: {NORM} is in .*, `weight_map` names",
    ),
    "key of no shard": (
        with_index(lambda m: m.update(a=m[NORM])),
        "index.json does not fit its shards for 1 keys: a is in no shard",
    ),
    "key not in the index": (with_index(lambda m: m.pop(NORM)), f"1 keys: {NORM} is in .*, `weight_map` names none"),
    "index is no index": (
        with_index_text('{"weight_map": 3}'),
        "index.json: `weight_map` must be an object, got an integer",
    ),
    "not finite": (
        with_tensors(lambda t: t[NORM].fill_(torch.nan)),
        f"the weights to write: 16 of the weights are not finite, first: {NORM}",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_refused(case: str, source: Path) -> None:
    change, message = MALFORMED[case]
    change(source)
    refused(source.parent, message)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not-verified"])
@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        pytest.param(math.nan, None, "$", id="nan"),
        pytest.param(1e5, "float16", ".* float16 is too narrow: choose another --dtype", id="overflow"),
    ],
)
def test_a_weight_that_is_not_finite_is_found_where_no_random_token_looks_it_up(
    value: float, dtype: str | None, remedy: str, verify: bool, source: Path
) -> None:
    drawn = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    row = next(token for token in range(61) if token not in drawn)
    with_tensors(lambda t: t[EMBEDDING][row, 3].fill_(value))(source)
    refused(source.parent, f"1 of the weights are not finite, first: {EMBEDDING}.{remedy}", dtype=dtype, verify=verify)
    if dtype is not None:
        convert(source, source.parent / "out", dtype="bfloat16", verify=verify)


# Pickles


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def as_pickle(folder: Path, content: Any) -> None:
    state_spaces.save(folder / "source", state_spaces.MAMBA2)
    (folder / "source" / WEIGHTS).unlink()
    torch.save(content, folder / "source" / "pytorch_model.bin")


def test_a_pickle_is_read_if_allowed(tmp_path: Path) -> None:
    weights = state_spaces.tensors(state_spaces.MAMBA2)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]  # the official library saves them as one
    as_pickle(tmp_path, weights)
    refused(tmp_path, "has its weights in pytorch_model.bin, a pickle, .* Pass --allow-pickle")
    convert(tmp_path / "source", tmp_path / "out", allow_pickle=True)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(written["backbone.embeddings.weight"], weights["lm_head.weight"])
    convert(tmp_path / "source", tmp_path / "again", to="state-spaces", allow_pickle=True)
    written = load_file(tmp_path / "again" / WEIGHTS)
    assert written.keys() == weights.keys() and all(torch.equal(written[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"a": _Code()}, "pytorch_model.bin holds more than tensors: an object of getattr", id="code"),
        pytest.param([torch.ones(1)], "pytorch_model.bin must be a dict of tensors by name, got list", id="list"),
        pytest.param({"a": 1}, "must hold nothing but tensors by name; its entry 'a' is int", id="number"),
        pytest.param({"a": torch.ones(1)}, "the weights are not what config.json promises", id="keys"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_pickle(tmp_path, content)
    refused(tmp_path, message, allow_pickle=True)


@pytest.mark.parametrize("kept", [0, 100, 5000], ids=["empty", "head", "truncated"])
def test_a_damaged_pickle_is_refused(kept: int, tmp_path: Path) -> None:
    as_pickle(tmp_path, state_spaces.tensors(state_spaces.MAMBA2))
    path = tmp_path / "source" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, "pytorch_model.bin is damaged, or not a file of torch.save", allow_pickle=True)


def test_a_bare_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_pickle(tmp_path, {})
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(pickle.dumps(_Code()))
    refused(tmp_path, "pytorch_model.bin is damaged, or not a file of torch.save", allow_pickle=True)


# Of ours

ATTENTION = "full_attention"
JAMBA = {"mixer_rms_eps": 1e-5}


@pytest.mark.parametrize(
    ("family", "change", "to", "message"),
    [
        (
            "all-four",
            {},
            "transformers",
            r"`mixer_types\[0\]` must be 'mamba2' or 'full_attention', got 'discrete_mamba2' \(bamba",
        ),
        ("all-four", {}, "state-spaces", r"`mixer_types\[0\]` must be .*, got 'discrete_mamba2' \(state-spaces"),
        ("mamba2-full", {}, "state-spaces", "`intermediate_size` must be a multiple of 128, .* got 24"),
        (
            "mamba2-full",
            {"mlp_types": ["gated", "none"]},
            "transformers",
            r"`mlp_types\[1\]` must be 'gated', got 'none'",
        ),
        (
            "mamba2-full",
            {"mlp_types": ["gated", "none"]},
            "state-spaces",
            r"`mlp_types\[1\]` must be 'gated', got 'none'",
        ),
        ("mamba2-full", {"hidden_act": "gelu"}, "transformers", "`hidden_act` must be 'silu', got 'gelu'"),
        (
            "mamba2-full",
            {"intermediate_size": 128, "hidden_act": "gelu"},
            "state-spaces",
            "`hidden_act` must be .*, got 'gelu'",
        ),
        (
            "mamba2-full",
            {"intermediate_size": 128, "mlp_bias": True},
            "state-spaces",
            "`mlp_bias` must be .*, got True",
        ),
        (
            "mamba2-full",
            {"rms_norm_eps": 1e-6, "intermediate_size": 128},
            "state-spaces",
            "`rms_norm_eps` must be .*, got 1e-06",
        ),
        ("convolved-attention", {}, "transformers", "`full_attention.conv_kernel` must be 0, got 3"),
        ("jamba", {}, "transformers", "`mamba.mixer_rms_eps` must be 1e-05, got 0.001"),
        (
            "jamba",
            JAMBA | {"mixer_rms_weight": False},
            "transformers",
            "`mamba.mixer_rms_weight` must be True",
        ),
        (
            "jamba",
            JAMBA | {"rope_parameters": None},
            "transformers",
            "`rope_parameters.partial_rotary_factor` must be .*, got 1.0",
        ),
        ("jamba", JAMBA | {"attention_bias": True}, "transformers", "`attention_bias` must be False, got True"),
        ("jamba", JAMBA | {"mlp_bias": True}, "transformers", "`mlp_bias` must be False, got True"),
        ("jamba", JAMBA | {"hidden_act": "gelu"}, "transformers", "`hidden_act` must be 'silu', got 'gelu'"),
        ("jamba", JAMBA | {"mlp_types": ["none", "gated"]}, "transformers", r"`mlp_types\[0\]` must be .*, got 'none'"),
        (
            "jamba",
            JAMBA | {"mixer_types": ["mamba", "mamba2"]},
            "transformers",
            r"`mixer_types\[1\]` must be 'mamba' or 'full_attention', got 'mamba2' \(jamba",
        ),
        (
            "jamba",
            JAMBA | {"num_hidden_layers": 5, "mixer_types": [ATTENTION, ATTENTION, "mamba", ATTENTION, "mamba"]},
            "transformers",
            r"`mixer_types` must have 'full_attention' in no layer, one, or every n-th .* got it in layers \[0, 1, 3\]",
        ),
        (
            "jamba",
            JAMBA | {"num_hidden_layers": 4, "mixer_types": ["mamba", "mamba", ATTENTION, ATTENTION]},
            "transformers",
            r"`mixer_types` must have 'full_attention' in .* for jamba, got it in layers \[2, 3\]",
        ),
        (
            "mamba",
            {"mixer_rms_eps": 1e-3, "mixer_rms_weight": True},
            "transformers",
            "`mixer_rms_weight` must be False, got True",
        ),
        (
            "mamba2",
            {"layer_norm_epsilon": 1e-6},
            "state-spaces",
            "`layer_norm_epsilon` must be 1e-05, got 1e-06",
        ),
    ],
)
def test_what_the_other_side_cannot_express_is_named(
    family: str, change: dict[str, Any], to: str, message: str, tmp_path: Path
) -> None:
    make_model(family, **change).save_pretrained(tmp_path / "source")
    refused(tmp_path, f"^config.json: {message}", to=to)


def test_experts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    JambaConfig(num_hidden_layers=2, num_experts=4).save_pretrained(tmp_path / "source")
    refused(tmp_path, "^config.json: `num_experts` must be 1, got 4")


def test_another_head_is_refused(tmp_path: Path) -> None:
    make_model("mamba2").save_pretrained(tmp_path / "source")
    with_values(architectures=["ZooMamba2ForMaskedLM"])(tmp_path / "source")
    refused(tmp_path, "`architectures` must be \\['ZooMamba2ForCausalLM'\\], .*, got \\['ZooMamba2ForMaskedLM'\\]")


# Arguments and the folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "^--to must be one of zoo, transformers, state-spaces, .*, got 'gguf'"),
        ({"dtype": "int8"}, "^--dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_a_wrong_argument_is_refused(options: dict[str, Any], message: str, source: Path) -> None:
    refused(source.parent, message, **options)


def test_a_folder_that_holds_something_is_kept(source: Path) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(source.parent, "out exists and is not empty. .* pass --overwrite")
    refused(source.parent, "is not replaced: it holds no config.json", overwrite=True)
    (out / "config.json").write_text("{}")
    refused(source.parent, r"is not replaced: it also holds notes\.txt, which would be deleted", overwrite=True)
    (out / "notes.txt").unlink()
    (source / WEIGHTS).rename(source / "gone")
    refused(source.parent, "holds no weights", overwrite=True)
    (source / "gone").rename(source / WEIGHTS)
    convert(source, out, overwrite=True)
    assert "modeling_mamba2.py" in contents(out)
    (source.parent / "config.json").write_text("{}")
    for folder, message in ((source, "is or holds the source"), (source.parent, "is not replaced: it also holds out/")):
        with pytest.raises(ValueError, match=message):
            convert(source, folder, overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("where", ["write_weights", "logits_of_tensors", "os.replace"])
def test_an_interruption_leaves_nothing_behind(
    where: str, overwrite: bool, error: type[BaseException], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        convert(source, source.parent / "out", to="state-spaces", verify=False)
    before = contents(source.parent)
    replace = convert_module.os.replace
    # Where folders cannot be exchanged in one step, there is a moment between two renames.
    monkeypatch.setattr(whole_files, "exchange", lambda first, second: False)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if where == "os.replace" and (overwrite and Path(arguments[0]).name != Path(arguments[1]).name):
            return replace(*arguments)
        if where == "os.replace":
            monkeypatch.setattr(convert_module.os, "replace", replace)
        raise error

    monkeypatch.setattr(*(convert_module.os, "replace") if "." in where else (convert_module, where), interrupted)
    with pytest.raises(error):
        convert(source, source.parent / "out", overwrite=overwrite)
    assert contents(source.parent) == before
    assert {path.name for path in source.parent.iterdir()} == ({"source", "out"} if overwrite else {"source"})


def test_logits_that_differ_are_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = convert_module.logits_of_folder
    monkeypatch.setattr(convert_module, "logits_of_folder", lambda *arguments: logits(*arguments) + 0.01)
    refused(source.parent, r"logits of random tokens are up to 0.01 apart, of at most .*\. Nothing is written\.")
    convert(source, source.parent / "out", verify=False)


def test_the_command_says_it_in_one_line(source: Path) -> None:
    truncate(source)
    done = CliRunner().invoke(app, ["convert", str(source), str(source.parent / "out")])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("ssm-zoo: model.safetensors is damaged, or no safetensors file")
    assert done.stderr.count("\n") == 1


# Rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("x.{rest}", "a.{rest}")], "1 keys of the model without a rule: b.0.c$"),
        ([Rule("x.{rest}", "a.{rest}"), Rule("{rest}", "{rest}")], "1 keys of the model with several rules: a.d$"),
        ([Rule("{rest}", "{rest}"), Rule("y", "e")], "1 rules that match no key: y$"),
        ([Rule("{rest}", "{rest}"), Rule("y", "b.{layer}.c", layers=[1])], "1 rules that match no key: y$"),
        ([Rule("{rest}", "{rest}"), Rule(None, "e")], "1 rules that match no key: e$"),
        ([Rule("{rest}", ("{rest}", "f.{rest}"))], "2 rules for keys that the model lacks: f.a.d, f.b.0.c$"),
    ],
)
def test_rules_that_do_not_fit_a_model_are_an_error(rules: list[Rule], message: str) -> None:
    with pytest.raises(ValueError, match=f"^rules: .*{message}"):
        Mapper(rules, {"a.d": torch.ones(1), "b.0.c": torch.ones(1)})


@pytest.mark.parametrize("name", ["prefix-mamba2", "prefix-retnet"])
def test_a_model_that_reads_prefixes_in_both_directions_is_not_converted(tmp_path: Path, name: str) -> None:
    """The second would lose it: it has no other weights than a causal RetNet."""
    make_model(name).save_pretrained(tmp_path / "source")
    refused(tmp_path, "`prefix_bidirectional` must be False, got True", to="fla")
