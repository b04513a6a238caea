"""Export of a zoo checkpoint to a folder that loads with torch and transformers alone, and the proof that it does.

`save_pretrained` of a zoo model already writes such a folder. Exporting adds the code of the installed package to an
older checkpoint, or to one that has only weights and a configuration, and checks the result.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import modeling
from ..harness.json_files import read_json_object
from ..harness.processes import run_child
from ..harness.whole_files import new_folder
from ..kernels.cpu_products import fast_products
from ..modeling.hub_code import code_of
from ..modeling.pretrained import ZooPreTrainedModel
from . import isolated_load
from .carried_files import CARD, LICENCES, SENTENCE_TRANSFORMERS, TOKENIZER, carry_files
from .embedder_modules import embedder_modules
from .hub_source import source_folder
from .load_model import load_model
from .remote_code import check_remote_code, reference_of
from .source_files import check_config

__all__ = ["export", "verify_export"]

# Files of the source that are copied. Weights, configurations and code are written by `save_pretrained`.
_KEPT = (TOKENIZER, LICENCES, CARD, SENTENCE_TRANSFORMERS)


def export(
    source: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint as a self-contained Hub folder: weights, config, code, licence, tokenizer, card, plots.

    An embedder or reranker of sentence-transformers keeps its modules, e.g. the pooling. The code of the model is that
    of the installed package; code of the source is neither run nor copied. The folder appears whole or not at all.

    Args:
        source: a folder, or a Hub id.
        folder: a new or empty folder; its parents are made as needed.
        revision: branch, tag or commit, if the source is a Hub id.
        verify: check the folder as :func:`verify_export` does before it appears.
        trust_remote_code: copy and run the code of a tokenizer that transformers does not have.

    Returns:
        The folder.

    Raises:
        ValueError: if the source is no whole checkpoint of a zoo model, its tokenizer needs code that is not trusted,
            a module of sentence-transformers has code of its own, the folder is not empty, or the check fails.
        OSError: if files cannot be read, the Hub cannot be reached, or a repository is not found.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be a new or empty folder, got {folder}, which exists and is not empty.")
    read_from, _ = source_folder(source, revision=revision, trust_remote_code=trust_remote_code, check=model_class_of)
    check_remote_code(read_from, trusted=trust_remote_code, auto_class=None)
    embedder_modules(read_from, "source")
    model = _load(read_from)
    with new_folder(folder) as made:
        carry_files(read_from, made, *_KEPT, trust_remote_code=trust_remote_code)
        model.save_pretrained(made)
        if verify:
            _verify(made, model, trust_remote_code)
    return folder


def verify_export(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Prove that a folder loads without this package and gives the same outputs as with it.

    A separate process, which cannot import `ssm_zoo` and cannot reach the Hub, loads the tokenizer, if there is one,
    and the model on the CPU, with the code in the folder. Its first output for random inputs must be equal to the
    package's bit for bit.

    Args:
        folder: a folder that `save_pretrained` of a zoo model wrote.
        trust_remote_code: run code that is not the installed package's: that of another version, or of a tokenizer.

    Returns:
        "auto_class" that loaded it, "dtype" and "shape" of the logits (or of the last hidden states, for a model
        without a head), "bit_equal", which is True, and the "seconds" that the other process took.

    Raises:
        ValueError: if the folder is no checkpoint of a zoo model, holds code that is not trusted, does not load, or
            gives other outputs.
    """
    folder = Path(folder)
    model = _load(folder)
    if not trust_remote_code:
        check_remote_code(folder, trusted=False, field="folder", auto_class=None)
        _check_code(folder, model)
    return _verify(folder, model, trust_remote_code)


def _check_code(folder: Path, model: ZooPreTrainedModel) -> None:
    """Raise a ValueError if the code that loads a folder is not the installed package's."""
    ours = code_of(model)
    auto_map = read_json_object(folder / "config.json", allow_infinity=True).get("auto_map")
    keys = auto_map if isinstance(auto_map, dict) else ()
    named = {f"{str(reference_of(auto_map, key)).partition('.')[0]}.py" for key in keys}
    there = {path.name: path for path in folder.glob("*.py")}
    foreign = sorted(
        name
        for name in named | there.keys()
        if name not in ours or name not in there or there[name].read_text(encoding="utf-8") != ours[name]
    )
    if foreign:
        raise ValueError(
            f"folder: {folder} holds or names code that is not of this version of ssm-zoo: {', '.join(foreign[:3])}. "
            "Export it again, or read the code and pass trust_remote_code=True to run it."
        )


def _verify(folder: Path, model: ZooPreTrainedModel, trust_tokenizer: bool) -> dict[str, Any]:
    """Prove that `folder` loads without this package and gives the outputs of `model`."""
    auto_class = _auto_class(type(model))
    generator = torch.Generator().manual_seed(0)
    inputs = model.example_inputs(generator)
    with fast_products(False):  # as in the other process
        ours = isolated_load.first_output(model, inputs)
    if not ours.isfinite().all():
        raise ValueError(f"{folder.name}: the model's output for random {', '.join(inputs)} is not finite.")
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "input.safetensors", Path(scratch) / "output.safetensors"
        save_file(inputs, given)
        trusted = "trusted" if trust_tokenizer else "untrusted"
        arguments = [folder.resolve(), auto_class, trusted, torch.get_num_threads(), given, written]
        started = time.monotonic()
        done = run_child(
            [sys.executable, "-P", str(isolated_load.__file__), *map(str, arguments)],
            {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
        )
        seconds = time.monotonic() - started
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ValueError(f"{folder.name} does not load without ssm-zoo: {reason}")
        theirs = load_file(written)["output"]
    if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
        raise ValueError(
            f"{folder.name}: without ssm-zoo, the model gives other logits: {tuple(theirs.shape)} of "
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


def _load(folder: Path) -> ZooPreTrainedModel:
    """Load the model in `folder` with the package's own class, on the CPU, in the checkpoint's dtype.

    Raises:
        ValueError: if the folder is no checkpoint of a zoo model, or its weights do not fit the model.
    """
    model_class = model_class_of(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"source: {folder} holds an adapter. Merge it into the model first (merge_and_unload).")
    model = load_model(folder, model_class, field="source", dtype="auto")
    assert isinstance(model, ZooPreTrainedModel)
    return model


def model_class_of(folder: Path) -> type[ZooPreTrainedModel]:
    """Return the package's class for the checkpoint in `folder`, by model type and architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"source: {folder} is no checkpoint, since it holds no config.json.")
    values = read_json_object(path, allow_infinity=True)
    check_config(values, str(path))
    model_type = values.get("model_type")
    classes = [kind for kind in vars(modeling).values() if isinstance(kind, type)]
    classes = [kind for kind in classes if issubclass(kind, ZooPreTrainedModel) and kind.auto_classes]
    accepted = sorted({_model_type(kind) for kind in classes})
    if model_type not in accepted:
        raise ValueError(f"config.json: `model_type` must be one of {', '.join(accepted)}, got {model_type!r}.")
    by_name = {kind.__name__: kind for kind in classes if _model_type(kind) == model_type}
    architecture = (values.get("architectures") or [next(iter(by_name))])[0]
    if architecture not in by_name:
        raise ValueError(f"config.json: `architectures` must be one of {', '.join(by_name)}, got {architecture!r}.")
    return by_name[architecture]


def _model_type(kind: type[ZooPreTrainedModel]) -> str:
    return str(kind.config_class.model_type)  # pyright: ignore[reportOptionalMemberAccess]


def _auto_class(kind: type[ZooPreTrainedModel]) -> str:
    """Return the name of the Auto class of transformers that loads a class."""
    return next(auto for auto, name in kind.auto_classes.items() if name == kind.__name__)
