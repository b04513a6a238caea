"""Weights as people have them: which files are read, pickles of every layout, keys with prefixes, links, JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import state_spaces
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from ssm_zoo.conversion import weight_files
from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.parity import ParityReport
from ssm_zoo.conversion.weight_choice import ORDER, choose_weights

WEIGHTS, INDEX, PICKLE, PICKLE_INDEX = ORDER
CONFIG = {**state_spaces.MAMBA2, "vocab_size": 64}
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def saved_config(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    """Write config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_pickles(folder: Path, tensors: dict[str, Tensor], wrap: Callable[[Any], Any] = dict, **options: Any) -> None:
    """Write two pickles with an index."""
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": list(tensors)[i::2] for i in range(2)}
    for name, keys in halves.items():
        torch.save(wrap({key: tensors[key] for key in keys}), folder / name, **options)
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (folder / PICKLE_INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def converted(source: Path, **options: Any) -> tuple[dict[str, Tensor], ParityReport]:
    """Convert to state-spaces, whose keys and values are then the source's own."""
    folder = source.with_name(f"{source.name}-out")
    report = convert(source, folder, to="state-spaces", **options)
    return load_file(folder / WEIGHTS), report


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Pickles


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(dict, id="bare"),
        pytest.param(lambda t: {"state_dict": t, "epoch": 3, "lr_schedulers": [{"a": 1.5}]}, id="state_dict"),
        pytest.param(lambda t: {"model": t, "optimizer": {"state": {}, "param_groups": []}}, id="model"),
        pytest.param(lambda t: {"module": t}, id="module"),
        pytest.param(lambda t: {"model_state_dict": t}, id="model_state_dict"),
        pytest.param(lambda t: {"state_dict": {"model": t}}, id="two"),
    ],
)
@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_tensors_of_every_layout_of_a_pickle_are_read(shards: bool, wrap: Any, zipped: bool, tmp_path: Path) -> None:
    source, tensors = saved_config(tmp_path / "source"), state_spaces.tensors(CONFIG)
    if shards:
        save_pickles(source, tensors, wrap, _use_new_zipfile_serialization=zipped)
    else:
        torch.save(wrap(tensors), source / PICKLE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*, a pickle, .* Pass --allow-pickle"):
        converted(source)
    found, report = converted(source, allow_pickle=True, verify=False)
    assert_equal(found, tensors)
    wrappers = sum("the state dict is its entry" in note for note in report.notes)
    assert wrappers == (0 if wrap is dict else 2 if shards else 1)


def test_shards_of_pickles_give_transformers_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=8, n_groups=1))
    (tmp_path / "source").mkdir()
    model.config.save_pretrained(tmp_path / "source")
    save_pickles(tmp_path / "source", dict(model.state_dict()))
    report = convert(tmp_path / "source", tmp_path / "out", allow_pickle=True)
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "several state dicts: state_dict, model"),
        ({"ema": {"a": torch.ones(1)}}, "nothing but tensors by name; its entry 'ema' is dict"),
        ({"a": torch.ones(1), "epoch": 3}, "its entry 'epoch' is int beside 1 tensors"),
        ({"state_dict": {}}, "nothing but tensors by name"),
        ({}, "must be a dict of tensors by name, got an empty one"),
        (torch.ones(1), "must be a dict of tensors by name, got Tensor"),
        ({"a": torch.eye(2).to_sparse()}, "a must be a dense tensor, got one that is sparse"),
        (
            {"state_dict": {"a": torch.ones(1)}, "args": Path("a")},
            "an object of pathlib.PosixPath, which is not loaded",
        ),
    ],
    ids=["two", "unknown", "mixed", "nothing", "empty", "tensor", "sparse", "object"],
)
def test_a_pickle_without_one_state_dict_says_what_it_holds(content: Any, message: str, tmp_path: Path) -> None:
    source = saved_config(tmp_path / "source")
    torch.save(content, source / PICKLE)
    with pytest.raises(ValueError, match=rf"^pytorch_model\.bin.*{message}"):
        convert(source, tmp_path / "out", allow_pickle=True)


# Keys


def moved(tensors: dict[str, Tensor], body: str, head: str = "") -> dict[str, Tensor]:
    """The keys with `body` instead of `backbone.`, and `head` before that of the head."""
    return {
        head + key if key == HEAD else body + key.removeprefix("backbone."): tensor for key, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("body", "head", "note"),
    [
        ("module.backbone.", "module.", "'module.' was removed"),
        ("_orig_mod.backbone.", "_orig_mod.", "'_orig_mod.' was removed"),
        ("module._orig_mod.backbone.", "module._orig_mod.", "'module.' was removed"),
        ("model.", "", "'model.' at the beginning became 'backbone.'"),
        ("model.backbone.", "", "'model.' was removed"),
        ("model.backbone.", "model.", "'model.' was removed"),
        ("net.inner.backbone.", "net.inner.", "'net.inner.' was removed"),
        ("", "", "'backbone.' was added to every key but lm_head.weight"),
        ("transformer.", "", "'transformer.' at the beginning became 'backbone.'"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes_of_keys_are_put_right_and_said(body: str, head: str, note: str, tied: bool, tmp_path: Path) -> None:
    config = {**CONFIG, "tie_embeddings": tied}
    tensors = state_spaces.tensors(config)
    source = state_spaces.save(tmp_path / "source", config, moved(tensors, body, head))
    found, report = converted(source, verify=False)
    assert_equal(found, tensors)
    assert any(note in line for line in report.notes), report.notes


def test_names_that_wrappers_put_into_keys_are_removed(tmp_path: Path) -> None:
    tensors = state_spaces.tensors(CONFIG)
    wrapped = {key.replace(".mixer.", "._fsdp_wrapped_module.mixer._orig_mod."): t for key, t in tensors.items()}
    found, report = converted(state_spaces.save(tmp_path / "source", CONFIG, wrapped))
    assert_equal(found, tensors)
    assert "keys: '_orig_mod.', '_fsdp_wrapped_module.' was removed everywhere" in report.notes


@pytest.mark.parametrize("body", ["backbone.", ""])
def test_a_tied_checkpoint_with_the_head_alone_has_it_for_the_embedding(body: str, tmp_path: Path) -> None:
    tensors = state_spaces.tensors(CONFIG)
    saved = moved({key: tensor for key, tensor in tensors.items() if key != EMBEDDING}, body)
    found, report = converted(state_spaces.save(tmp_path / "source", CONFIG, saved))
    assert_equal(found, tensors)
    assert any("the tied head lm_head.weight is used instead" in note for note in report.notes)


def test_a_prefix_beside_other_tensors_is_removed_if_asked(tmp_path: Path) -> None:
    tensors = state_spaces.tensors(CONFIG)
    prefixed = {f"student.{key}": tensor for key, tensor in tensors.items()}
    source = state_spaces.save(tmp_path / "source", CONFIG, prefixed)
    assert_equal(converted(source, prefix="student.")[0], tensors)
    with pytest.raises(ValueError, match=r"--strip-prefix must be the beginning of a key, got 'teacher\.'"):
        convert(source, tmp_path / "no", prefix="teacher.")
    save_file(prefixed | {"teacher.weight": torch.ones(1)}, source / WEIGHTS)
    with pytest.raises(ValueError, match=r"No key is as expected: .* pass --strip-prefix PREFIX"):
        convert(source, tmp_path / "no")
    with pytest.raises(ValueError, match=r"1 left over: teacher\.weight"):
        convert(source, tmp_path / "no", prefix="student.")
    save_file(prefixed | {EMBEDDING: torch.ones(1)}, source / WEIGHTS)
    with pytest.raises(ValueError, match="the name of another tensor"):
        convert(source, tmp_path / "no", prefix="student.")


def test_an_error_about_keys_says_which_prefix_was_removed_before(tmp_path: Path) -> None:
    tensors = moved(state_spaces.tensors(CONFIG), "module.backbone.", "module.")
    del tensors["module.backbone.norm_f.weight"]
    source = state_spaces.save(tmp_path / "source", CONFIG, tensors)
    with pytest.raises(
        ValueError, match=r"1 missing: backbone.norm_f.weight\. The keys were changed before: keys: 'module\.' was rem"
    ):
        convert(source, tmp_path / "out")


def test_a_head_that_is_missing_is_explained(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_embeddings": False}
    tensors = state_spaces.tensors(config)
    del tensors[HEAD]
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight\. If the head is tied to the embedding, set"):
        convert(state_spaces.save(tmp_path / "source", config, tensors), tmp_path / "out")


# Which files


@pytest.fixture
def four_sets(tmp_path: Path) -> Path:
    """A model of transformers four times, in each layout that there is, each with a final norm of its own number."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=8, n_groups=1, tie_word_embeddings=True))
    folder = tmp_path / "source"
    folder.mkdir()
    model.config.save_pretrained(folder)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != HEAD}

    def numbered(number: int) -> dict[str, Tensor]:
        return tensors | {"backbone.norm_f.weight": torch.full((16,), 1.0 + number)}

    save_file(numbered(0), folder / WEIGHTS, metadata={"format": "pt"})
    save_file(numbered(1), folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    torch.save(numbered(2), folder / PICKLE)
    save_pickles(folder, numbered(3))
    return folder


def test_of_several_sets_of_weights_the_one_that_transformers_loads_is_converted(four_sets: Path) -> None:
    for number, name in enumerate(ORDER):
        out = four_sets.with_name(f"out{number}")
        report = convert(four_sets, out, allow_pickle=True)
        found = load_file(out / WEIGHTS)["backbone.norm_f.weight"]
        theirs = Mamba2ForCausalLM.from_pretrained(four_sets)
        assert torch.equal(found, theirs.backbone.norm_f.weight) and found[0] == 1.0 + number
        said = [line for line in report.notes if line.startswith(f"weights: {name}, the file that transformers loads")]
        assert len(said) == 1
        (four_sets / name).unlink()


def test_the_file_that_the_configuration_names_comes_first(four_sets: Path) -> None:
    values = json.loads((four_sets / "config.json").read_text()) | {"transformers_weights": INDEX}
    (four_sets / "config.json").write_text(json.dumps(values))
    convert(four_sets, four_sets.with_name("out"))
    assert load_file(four_sets.with_name("out") / WEIGHTS)["backbone.norm_f.weight"][0] == 2.0
    for name in ("../model.safetensors", "pytorch_model.bin", "none.safetensors"):
        (four_sets / "config.json").write_text(json.dumps(values | {"transformers_weights": name}))
        with pytest.raises(ValueError, match=r"^config\.json: `transformers_weights`"):
            choose_weights(four_sets)


def test_a_reading_that_is_not_that_of_transformers_is_found(four_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_zoo.conversion.weight_choice.ORDER", (INDEX, WEIGHTS))
    with pytest.raises(ValueError, match=r"from_pretrained loads other values for backbone\.norm_f\.weight"):
        convert(four_sets, four_sets.with_name("out"))
    assert not four_sets.with_name("out").exists()


def test_weights_of_another_library_are_named_and_adapters_refused(four_sets: Path) -> None:
    for name in (INDEX, PICKLE, PICKLE_INDEX):
        (four_sets / name).unlink()
    for path in [*four_sets.glob("model-*"), *four_sets.glob("pytorch_model-*")]:
        path.unlink()
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "training_args.bin", "optimizer.pt"):
        (four_sets / name).write_bytes(b"")
    report = convert(four_sets, four_sets.with_name("out"))
    assert report.notes == [
        "weights: model.safetensors, the file that transformers loads; not read: adapter_model.safetensors, "
        "consolidated.safetensors"
    ]
    (four_sets / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\)"):
        convert(four_sets, four_sets.with_name("other"))
    (four_sets / "adapter_config.json").unlink()
    (four_sets / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"holds no weights: .* is there, only adapter_model\.safetensors, consol"):
        convert(four_sets, four_sets.with_name("other"))


# Malformed files


def with_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index of shards, and leave it alone with them."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_without_metadata_is_read_and_the_report_says_that_transformers_does_not(four_sets: Path) -> None:
    with_index(four_sets, lambda index: index.pop("metadata"))
    report = convert(four_sets, four_sets.with_name("out"))
    assert any("`metadata` is missing; transformers does not read such an index" in note for note in report.notes)
    with pytest.raises(KeyError):
        Mamba2ForCausalLM.from_pretrained(four_sets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "`weight_map` is missing"),
        (lambda index: index.update(weight_map={}), "`weight_map` must name at least one key"),
        (lambda index: index.update(weight_map=["a"]), "`weight_map` must be an object, got a list"),
        (lambda index: index["weight_map"].update(a=3), r"`weight_map\.a` must be a string, got an integer"),
        (
            lambda index: index["weight_map"].update(a="../outside.safetensors"),
            "must be the name of a file in the same",
        ),
        (lambda index: index["weight_map"].update(a="/etc/passwd"), "must be the name of a file in the same folder"),
        (lambda index: index["weight_map"].update(a=".."), "must be the name of a file in the same folder"),
        (lambda index: index["weight_map"].update(a="x.safetensors"), "of which 1 are not in .*: x.safetensors"),
    ],
)
def test_a_malformed_index_is_refused_by_its_field(change: Any, message: str, four_sets: Path) -> None:
    with_index(four_sets, change)
    with pytest.raises(ValueError, match=rf"^model\.safetensors\.index\.json.*{message}"):
        convert(four_sets, four_sets.with_name("out"))


@pytest.mark.parametrize("name", [WEIGHTS, "model-00001-of-00001.safetensors"])
def test_links_out_of_the_folder_are_refused(name: str, four_sets: Path) -> None:
    outside = four_sets.with_name("outside.safetensors")
    (four_sets / name).rename(outside)
    (four_sets / name).symlink_to(outside)
    if name != WEIGHTS:
        (four_sets / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{name} is a link to a file outside of"):
        convert(four_sets, four_sets.with_name("out"))
    outside.rename(four_sets / "inside.safetensors")
    (four_sets / name).unlink()
    (four_sets / name).symlink_to("inside.safetensors")
    convert(four_sets, four_sets.with_name("out"), verify=False)


def test_keys_that_a_file_has_twice_are_refused(four_sets: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    whole = (four_sets / WEIGHTS).read_bytes()
    (four_sets / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"^model\.safetensors: its header has the key 'a' twice"):
        convert(four_sets, four_sets.with_name("out"))
    (four_sets / WEIGHTS).write_bytes(whole)
    config = (four_sets / "config.json").read_text()
    (four_sets / "config.json").write_text(config.replace("{", '{"head_dim": 8,', 1))
    with pytest.raises(ValueError, match=r"config\.json .*has the key 'head_dim' twice"):
        convert(four_sets, four_sets.with_name("out"))
    (four_sets / "config.json").write_text(config)
    (four_sets / WEIGHTS).unlink()
    (four_sets / INDEX).write_text((four_sets / INDEX).read_text().replace("{", '{"metadata": {},', 1))
    with pytest.raises(ValueError, match=r"^model\.safetensors\.index\.json has the key 'metadata' twice"):
        convert(four_sets, four_sets.with_name("out"))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    source, tensors = saved_config(tmp_path / "source"), state_spaces.tensors(CONFIG)
    save_pickles(source, tensors)
    second = source / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(second) | {EMBEDDING: torch.ones(1)}, second)
    with pytest.raises(ValueError, match=r"backbone\.embedding\.weight is in two shards"):
        convert(source, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, {}])
def test_quantised_weights_are_refused_with_their_method(value: Any, four_sets: Path) -> None:
    values = json.loads((four_sets / "config.json").read_text()) | {"quantization_config": value}
    (four_sets / "config.json").write_text(json.dumps(values))
    method = value.get("quant_method", "method not named")
    with pytest.raises(ValueError, match=rf"^config\.json: `quantization_config` .* quantised \({method}\)"):
        convert(four_sets, four_sets.with_name("out"))


def test_weights_of_several_dtypes_keep_them(four_sets: Path) -> None:
    tensors = load_file(four_sets / WEIGHTS)
    for key, dtype in zip(
        sorted(tensors), [torch.float16, torch.bfloat16, torch.float64, torch.float32] * 9, strict=False
    ):
        tensors[key] = tensors[key].to(dtype)
    save_file(tensors, four_sets / WEIGHTS, metadata={"format": "pt"})
    report = convert(four_sets, four_sets.with_name("out"))
    assert {key: report.dtypes[key] for key in tensors} == {key: tensor.dtype for key, tensor in tensors.items()}
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5


def test_no_file_of_weights_is_opened_before_the_configuration_is_understood(
    four_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "safe_open", lambda *_, **__: pytest.fail("opened"))
    (four_sets / "config.json").write_text('{"model_type": "mamba3"}')
    with pytest.raises(ValueError, match="`model_type` must be one of"):
        convert(four_sets, four_sets.with_name("out"))
