"""A checkpoint of the zoo as a folder that loads where only torch and transformers are, proven by loading it so.

What `save_pretrained` of a zoo model writes is such a folder already. Exporting gives an older checkpoint, or one
with weights and config alone, the code of the installed package, and checks the result.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from .. import modeling
from ..modeling.causal_lm import ZooPreTrainedModel
from . import isolated_load
from .load_model import load_model
from .output_folder import new_folder

__all__ = ["export", "verify_export"]

CARRIED = (
    "LICENSE*",
    "NOTICE*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
)
"""Files of a checkpoint that are the same in any format: its licence and its tokenizer."""

# What of the source is kept as it is. Weights, config, generation config and code are written anew.
_KEPT = ("README.md", "plots/*", *CARRIED)
_READ = ("*config.json", "*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def export(source: str | Path, folder: str | Path, *, revision: str | None = None, verify: bool = True) -> Path:
    """Write a checkpoint as a self-contained Hub folder: weights, config, code, licence, tokenizer, card, plots.

    The code is that of the installed package; code that the source brings is neither run nor copied. The folder
    appears whole or not at all.

    Args:
        source: a folder, or a Hub id.
        folder: a new or empty folder; its parents are made as needed.
        revision: branch, tag or commit, where the source is a Hub id.
        verify: prove the folder as :func:`verify_export` does before it appears.

    Returns:
        The folder.

    Raises:
        ValueError: if the source is no whole checkpoint of a zoo model, the folder is not empty, or the proof
            fails.
        OSError: if files cannot be read, the Hub not reached or a repository not found.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: {folder} exists and is not empty; accepted: a new or empty folder")
    read_from = _source_folder(source, revision)
    model = _load(read_from)
    with new_folder(folder) as made:
        copy_files(read_from, made, _KEPT)
        model.save_pretrained(made)
        if verify:
            _verify(made, model)
    return folder


def verify_export(folder: str | Path) -> dict[str, Any]:
    """Prove that a folder loads without this package and computes what this package computes from it.

    A process of its own, in which `ssm_zoo` cannot be imported and the Hub not be reached, loads the tokenizer, if
    there is one, and the model with `trust_remote_code=True`, on the CPU. Its first output for random inputs has to be
    the package's, bit for bit.

    Args:
        folder: what `save_pretrained` of a zoo model wrote.

    Returns:
        "auto_class" that loaded it, "dtype" and "shape" of the logits (of a model without a head, of the last
        hidden states), "bit_equal", which is True, and the "seconds" that the other process took.

    Raises:
        ValueError: if the folder is no checkpoint of a zoo model, does not load, or gives other logits.
    """
    folder = Path(folder)
    return _verify(folder, _load(folder))


def _verify(folder: Path, model: ZooPreTrainedModel) -> dict[str, Any]:
    """Prove that `folder` loads without this package and computes what `model` computes."""
    auto_class = _auto_class(type(model))
    generator = torch.Generator().manual_seed(0)
    inputs = model.example_inputs(generator)
    ours = isolated_load.first_output(model, inputs)
    if not ours.isfinite().all():
        raise ValueError(f"{folder.name}: the model's output for random {', '.join(inputs)} is not finite")
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "input.safetensors", Path(scratch) / "output.safetensors"
        save_file(inputs, given)
        arguments = [folder.resolve(), auto_class, torch.get_num_threads(), given, written]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", str(isolated_load.__file__), *map(str, arguments)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - started
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ValueError(f"{folder.name} does not load without ssm-zoo: {reason}")
        theirs = load_file(written)["output"]
    if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
        raise ValueError(
            f"{folder.name}: loaded without ssm-zoo the model gives other logits: {tuple(theirs.shape)} of "
            f"{theirs.dtype}, here {tuple(ours.shape)} of {ours.dtype}{_distance(theirs, ours)}"
        )
    return {
        "auto_class": auto_class,
        "dtype": str(ours.dtype).removeprefix("torch."),
        "shape": list(ours.shape),
        "bit_equal": True,
        "seconds": seconds,
    }


def _distance(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    if theirs.shape != ours.shape:
        return ""
    return f", at most {(theirs.double() - ours.double()).abs().max().item():.3g} apart"


def _source_folder(source: str | Path, revision: str | None) -> Path:
    """The folder to read from: the source itself, or what is needed of a Hub repository, downloaded.

    Raises:
        ValueError: if it is no checkpoint of a zoo model. Of a repository only the config is downloaded then.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision: got {revision!r}, but {source} is a folder; accepted: none")
        _model_class(path)
        return path
    source = hub_id(source)
    config_only = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json"]))
    _model_class(config_only)
    # A snapshot's folder has the name of its commit: all files come from one, even if the branch moves meanwhile.
    return Path(snapshot_download(source, revision=config_only.name, allow_patterns=[*_READ, *_KEPT]))


def hub_id(source: str | Path) -> str:
    """The source, which is no folder, as a Hub id.

    Raises:
        ValueError: if it cannot be one.
    """
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"source: got {str(source)!r}; accepted: an existing folder, or a Hub id OWNER/NAME")
    return source


def _load(folder: Path) -> ZooPreTrainedModel:
    """The model in `folder` by the package's own class, on the CPU, in the checkpoint's dtype.

    Raises:
        ValueError: if the folder is no checkpoint of a zoo model, or its weights are not the model's.
    """
    model_class = _model_class(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"source: {folder} holds an adapter; merge it into the model first (merge_and_unload)")
    model = load_model(folder, model_class, field="source", dtype="auto")
    assert isinstance(model, ZooPreTrainedModel)
    return model


def _model_class(folder: Path) -> type[ZooPreTrainedModel]:
    """The package's class for the checkpoint in `folder`, by its config's model type and architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"source: {folder} is no checkpoint: it holds no config.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    model_type = values.get("model_type") if isinstance(values, dict) else None
    classes = [kind for kind in vars(modeling).values() if isinstance(kind, type)]
    classes = [kind for kind in classes if issubclass(kind, ZooPreTrainedModel) and kind.auto_classes]
    accepted = sorted({_model_type(kind) for kind in classes})
    if model_type not in accepted:
        raise ValueError(f"config.json: model_type: got {model_type!r}; accepted: {', '.join(accepted)}")
    by_name = {kind.__name__: kind for kind in classes if _model_type(kind) == model_type}
    architecture = (values.get("architectures") or [next(iter(by_name))])[0]
    if architecture not in by_name:
        raise ValueError(f"config.json: architectures: got {architecture!r}; accepted: {', '.join(by_name)}")
    return by_name[architecture]


def _model_type(kind: type[ZooPreTrainedModel]) -> str:
    return str(kind.config_class.model_type)  # pyright: ignore[reportOptionalMemberAccess]


def _auto_class(kind: type[ZooPreTrainedModel]) -> str:
    """Name of the Auto class of transformers that loads the class."""
    return next(auto for auto, name in kind.auto_classes.items() if name == kind.__name__)


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> list[str]:
    """Copy the files that match a pattern, of a snapshot's links what they point to.

    Returns:
        Their paths in the folder.
    """
    copied = []
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                name = path.relative_to(source)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
                copied.append(name.as_posix())
    return copied
