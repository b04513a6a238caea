"""Exact training checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-STAGE-STEP` with the tensors (state.safetensors: trained parameters, AdamW's
moments and step counts, torch's random number states) and the rest (state.json: hyper-parameters of the optimiser,
learning rates included, what the caller adds, and the SHA-256 of the tensor file). It is written under a temporary
name, forced to the disk and then renamed, so that a folder of its name is whole. An old one is removed only after
newer ones have been proven whole by their checksums.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..harness.checkpoint_manifest import newest_whole
from ..harness.fingerprint import sha256_of
from ..harness.run_folder import TEMPORARY, flush, json_text, read_json

_FORMAT = 1
_TENSORS, _STATE = "state.safetensors", "state.json"
# ".replaced": the older of two checkpoints of one step, until the newer one has taken its name.
_NAME = re.compile(r"checkpoint-(\d+)-(\d+)(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_latest` found.

    Attributes:
        path: the folder it was read from.
        stage: number of the stage, from 0.
        step: steps done in that stage.
        tensors: all saved tensors, on the CPU; keys "parameter.NAME", "optimizer.KEY.NAME", "rng.cpu", "rng.cuda".
        groups: the optimiser's groups: hyper-parameters, and under "params" the names of the parameters.
        extra: what the caller gave to `save_checkpoint`.
    """

    path: Path
    stage: int
    step: int
    tensors: dict[str, Tensor]
    groups: list[dict[str, Any]]
    extra: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The saved parameters by name."""
        return {
            key.removeprefix("parameter."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith("parameter.")
        }


def save_checkpoint(
    folder: str | Path,
    *,
    stage: int,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    named: Sequence[str],
    extra: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` that are proven whole.

    In a run of several processes, the first one calls this. One process at a time may save into a folder.

    Args:
        folder: where checkpoints go; made if missing.
        stage: number of the stage, 0 or more.
        step: steps done in it, 0 or more.
        parameters: what training changes, by name. A tied tensor stands here once (as in `named_parameters()`).
        optimizer: AdamW, or another one whose state is tensors alone.
        named: names of the optimiser's parameters, group after group.
        extra: anything else that the run needs to go on, of the kinds that JSON knows, with texts as keys.
        keep: checkpoints that stay, 1 or more.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if a name, number, or value cannot be saved, or the folder holds a whole checkpoint of a later
            step, which the run should have gone on from; nothing is written then.
    """
    for field, value, low in (("stage", stage, 0), ("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{field}: got {value!r}; accepted: a whole number of {low} or more")
    tensors = _parameter_tensors(parameters)
    groups = _groups(optimizer, parameters, named)
    tensors |= _moments(optimizer, named)
    tensors |= _random_states()
    state = {"format": _FORMAT, "stage": stage, "step": step, "groups": groups, "extra": dict(extra)}
    json_text(state, "extra")

    folder = Path(folder)
    for path in _checkpoints(folder):
        if _place(path) > (stage, step) and _whole_state(path) is not None:
            raise ValueError(f"step: got stage {stage}, step {step}, but {path} is later; resume from it instead")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        # A save that was killed. Only what this file makes has such a name here.
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    target = folder / f"checkpoint-{stage}-{step}"
    temporary = folder / f"{TEMPORARY}{target.name}"
    temporary.mkdir()
    try:
        save_file(tensors, temporary / _TENSORS, metadata={"format": "pt"})
        flush(temporary / _TENSORS)
        state["sha256"] = sha256_of(temporary / _TENSORS)
        (temporary / _STATE).write_text(json_text(state, "extra"), encoding="utf-8")
        flush(temporary / _STATE)
        flush(temporary)
        if target.exists():
            # A folder cannot replace another in one go. Until it has, the old one is found under its second name.
            replaced = target.with_name(f"{target.name}.replaced")
            if replaced.exists():
                _remove(replaced)
            os.replace(target, replaced)
        os.replace(temporary, target)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep, target)
    return target


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def load_latest(folder: str | Path, report: Callable[[str], object] = _warn) -> Checkpoint | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: where `save_checkpoint` wrote; may be missing.
        report: is given one line for every damaged checkpoint that is passed over; a warning by default.

    Returns:
        The checkpoint, its tensors on the CPU, or None if there are no checkpoints.

    Raises:
        ValueError: if there are checkpoints and none is whole, or one was written by a later version in another
            format.
    """
    return newest_whole(_checkpoints(Path(folder)), _read, report)


def _read(path: Path) -> Checkpoint | str:
    """What a checkpoint holds, or what is wrong with it."""
    state = _whole_state(path)
    if state is None:
        return "its files do not match their checksum"
    if state["format"] != _FORMAT:
        raise ValueError(f"{path}: format: got {state['format']!r}; accepted: {_FORMAT}")
    tensors = load_file(path / _TENSORS)
    return Checkpoint(path, state["stage"], state["step"], tensors, state["groups"], state["extra"])


def restore(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    *,
    parameters: Mapping[str, Tensor],
    named: Sequence[str] = (),
) -> None:
    """Put parameters, optimiser and torch's random numbers back to where they were when the checkpoint was saved.

    Training then goes on bit for bit as it would have, on the same hardware and number of processes. The random
    states are those of the process that saved; objectives that draw none in the others stay exact there too.

    Args:
        checkpoint: from `load_latest`.
        optimizer: an optimiser over the same parameters in the same groups; its hyper-parameters are overwritten.
            None: leave the optimiser out, as at the start of the next stage.
        parameters: the tensors that are written to, on any device; the same names as were saved.
        named: names of the optimiser's parameters, group after group.

    Raises:
        ValueError: if names, shapes, dtypes or groups differ from the saved ones; nothing is changed then.
    """
    saved = checkpoint.parameters
    if saved.keys() != parameters.keys():
        missing, unexpected = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
        raise ValueError(f"{checkpoint.path}: parameters: missing there: {missing}; only there: {unexpected}")
    for name, parameter in parameters.items():
        if (saved[name].shape, saved[name].dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{checkpoint.path}: {name}: {tuple(saved[name].shape)} of {saved[name].dtype} there, "
                f"{tuple(parameter.shape)} of {parameter.dtype} here"
            )
    state_dict = None if optimizer is None else _optimizer_state(checkpoint, optimizer, parameters, named)

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    if optimizer is not None and state_dict is not None:
        optimizer.load_state_dict(state_dict)
    torch.set_rng_state(checkpoint.tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"])


def _parameter_tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places: dict[tuple[int, int], str] = {}
    for name, tensor in parameters.items():
        first = places.setdefault((tensor.data_ptr(), tensor.numel()), name)
        if first != name and tensor.numel():
            raise ValueError(f"parameters: {first!r} and {name!r} share memory; give a tied tensor once")
    return {f"parameter.{name}": _on_cpu(tensor) for name, tensor in parameters.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], named: Sequence[str]
) -> list[dict[str, Any]]:
    """The optimiser's groups with names for parameters, after checking that the names belong to them."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    if len(named) != len(shapes) or len(set(named)) != len(named):
        distinct = len(set(named))
        raise ValueError(f"named: got {distinct} distinct names for {len(shapes)} parameters of the optimizer")
    for name, shape in zip(named, shapes, strict=True):
        if name not in parameters:
            raise ValueError(f"named: {name!r} is not among the parameters to save")
        if parameters[name].shape != shape:
            raise ValueError(
                f"named: {name!r} has shape {tuple(parameters[name].shape)}, but the parameter at its place in "
                f"the optimizer {tuple(shape)}"
            )
    names = iter(named)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        hyperparameters = {key: value for key, value in group.items() if key != "params"}
        for key, value in hyperparameters.items():
            json_text(value, f"optimizer.param_groups.{index}.{key}")
        groups.append({**hyperparameters, "params": [next(names) for _ in group["params"]]})
    return groups


def _moments(optimizer: torch.optim.Optimizer, named: Sequence[str]) -> dict[str, Tensor]:
    tensors = {}
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(named, flat, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer: its state {key!r} of {name!r} is {value!r}; accepted: tensors")
            if key != "step" and value.is_floating_point() and value.dtype != parameter.dtype:
                # Optimizer.load_state_dict would round it to the parameter's dtype.
                raise ValueError(
                    f"optimizer: its state {key!r} of {name!r} is {value.dtype}; accepted: the parameter's own "
                    f"dtype, {parameter.dtype}"
                )
            tensors[f"optimizer.{key}.{name}"] = _on_cpu(value)
    return tensors


def _random_states() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _optimizer_state(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    named: Sequence[str],
) -> dict[str, Any]:
    """The saved optimiser in the form that `Optimizer.load_state_dict` takes, checked against `optimizer`."""
    here = _groups(optimizer, parameters, named)
    saved_names = [group["params"] for group in checkpoint.groups]
    if saved_names != [group["params"] for group in here]:
        raise ValueError(
            f"{checkpoint.path}: named: the optimizer's groups hold {saved_names} there, "
            f"{[group['params'] for group in here]} here"
        )
    order = {name: index for index, name in enumerate(named)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            state.setdefault(order[name], {})[kind] = tensor.clone()
    groups = []
    for saved, group in zip(checkpoint.groups, optimizer.param_groups, strict=True):
        # What JSON made a list may be a tuple; what this torch has and the one that saved had not, stays.
        merged = {**group, **saved, "params": [order[name] for name in saved["params"]]}
        for key, value in group.items():
            if isinstance(value, tuple):
                merged[key] = tuple(merged[key])
        groups.append(merged)
    return {"state": state, "param_groups": groups}


def _place(path: Path) -> tuple[int, int]:
    """Stage and step that the name of a checkpoint's folder gives; (-1, -1) for another name."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first, a replaced one after the one that replaced it."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (_place(path), not path.name.endswith(".replaced")), reverse=True)


def _whole_state(path: Path) -> dict[str, Any] | None:
    """What a checkpoint's state.json holds, or None if the tensors do not have the checksum that it gives."""
    state = read_json(path / _STATE)
    if not isinstance(state, dict) or not {"format", "stage", "step", "groups", "extra", "sha256"} <= state.keys():
        return None
    if not (path / _TENSORS).is_file() or sha256_of(path / _TENSORS) != state["sha256"]:
        return None
    return state


def _prune(folder: Path, keep: int, written: Path) -> None:
    """Remove all checkpoints but the newest `keep` steps that are proven whole; `written` has just been."""
    kept: set[tuple[int, int]] = set()
    for path in _checkpoints(folder):
        whole = len(kept) < keep and (path == written or _whole_state(path) is not None)
        if whole and _place(path) not in kept:
            kept.add(_place(path))
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint in a way that never shows half of it under its name."""
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
