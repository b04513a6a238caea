"""Calls of everything that the kernel package exports, for the package and for ssm_zoo alike.

As a program it loads a package where ssm_zoo cannot be imported, with Hugging Face's `kernels` if that is installed:

    python kernel_package_calls.py FOLDER CALLS INPUTS OUTPUTS

CALLS is a JSON file, INPUTS and OUTPUTS are safetensors files.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_by_path(variant: Path) -> Any:
    """Import the module of a build folder under the name in its metadata, as `kernels` does."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row_distances(ops: Any, queries: Tensor, keys: Tensor, **factors: Any) -> Any:
    return ops.row_distances(ops.SSDFactors(**factors), queries, keys, 0.7)


def _bounded_attention_step(ops: Any, q: Tensor, k: Tensor, v: Tensor, **memory: Tensor) -> Any:
    return ops.bounded_attention_step(q, k, v, ops.BoundedMemory(**memory), window=2, slots=[1, 1], chunk_size=2)


def _int8_rows(ops: Any, x: Tensor) -> Any:
    integers, scales = ops.quantise_rows(x)
    return integers, scales, ops.dequantise_rows(integers, scales, torch.float32)


def _by_triton(ops: Any, x: Tensor, weight: Tensor, z: Tensor) -> Any:
    return ops.rms_norm(x, weight, 1e-5, z=z, implementation="triton")


# Calls that are more than the function with the tensors by name.
SPECIAL = {
    "row_distances": _row_distances,
    "bounded_attention_step": _bounded_attention_step,
    "int8_rows": _int8_rows,
    "rms_norm by Triton": _by_triton,
    "row_distances_reference": lambda ops, x: ops.row_distances_reference(x.exp(), x.square()),
    "RMSNorm": lambda ops, x: ops.RMSNorm(x.shape[-1])(x),
    "RMSNormGated": lambda ops, x: ops.RMSNormGated(x.shape[-1], group_size=2)(x, x.exp()),
    "LayerNormGated": lambda ops, x: ops.LayerNormGated(x.shape[-1])(x, x.exp()),
}


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, tuple):
        return [each for part in result for each in _tensors(part)]
    return [result] if isinstance(result, Tensor) else []


def run(ops: Any, calls: dict[str, dict[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the results of all calls, with the tensors that a call writes to.

    Args:
        ops: what holds the exported names.
        calls: label -> "function", and "options" besides tensors.
        inputs: "label|argument" -> tensor.
    """
    found: dict[str, Tensor] = {}
    for label, call in calls.items():
        start = f"{label}|"
        tensors = {key.removeprefix(start): each.clone() for key, each in inputs.items() if key.startswith(start)}
        special = SPECIAL.get(call["function"])
        if special is None:
            result = getattr(ops, call["function"])(**tensors, **call["options"])
        else:
            result = special(ops, **tensors, **call["options"])
        found |= {f"{label}|{index}": part for index, part in enumerate(_tensors(result))}
        found |= {f"{label}|{name} afterwards": each for name, each in tensors.items()}
    return {name: each.detach().contiguous().clone() for name, each in found.items()}


def main(folder: str, calls: str, inputs: str, outputs: str) -> None:
    """Load the package without ssm_zoo, and write the results."""
    sys.modules["ssm_zoo"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    if importlib.util.find_spec("kernels") is not None:
        from kernels import get_local_kernel

        ops = get_local_kernel(Path(folder))
    else:
        ops = load_by_path(Path(folder) / "build" / "torch-cpu")
    missing = [name for name in ops.__all__ if not hasattr(ops, name)]
    assert not missing, missing
    save_file(run(ops, json.loads(Path(calls).read_text(encoding="utf-8")), load_file(inputs)), outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
