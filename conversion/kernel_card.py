"""The card of the kernel repository that :mod:`kernel_package` writes."""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence

__all__ = ["kernel_card"]


def kernel_card(name: str, version: int, exports: Mapping[str, Sequence[str]], repo_id: str | None) -> str:
    """Return the text of README.md.

    Args:
        name: name of the kernel.
        version: major version.
        exports: public names of the package by the file of kernels/ that they are imported from.
        repo_id: repository on the Hub; a placeholder is shown if there is none.
    """
    layers = importlib.import_module("..kernels.hub_layers", __package__)
    rows = [
        (each, _summary(each, getattr(importlib.import_module(f"..kernels.{file}", __package__), each)))
        for file, names in exports.items()
        for each in names
    ]
    return _CARD.format(
        name=name,
        version=version,
        repo_id=repo_id or f"OWNER/{name}",
        functions="\n".join(f"| `{each}` | {text} |" for each, text in rows),
        layers="\n".join(f"| `{each}` | {_summary(each, getattr(layers, each))} |" for each in layers.__all__),
        mapped="\n".join(f'    "{each}",' for each in layers.__all__),
    )


def _summary(name: str, item: object) -> str:
    """Return the first line of a docstring; references to other objects become plain names."""
    if isinstance(item, functools.partial):  # it has no docstring of its own
        return f"Compute `{name.removesuffix('_reference')}` by its definition, with the same arguments."
    text = (inspect.getdoc(item) or "").split("\n")[0].replace("|", "\\|")
    for role in (":func:", ":class:", ":mod:"):
        while role in text:
            before, _, rest = text.partition(f"{role}`")
            target, _, after = rest.partition("`")
            text = f"{before}`{target.rpartition('.')[2]}`{after}"
    return text


_CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernel
- mamba
- state-space-models
---

# {name}

Ops of state space models and linear-time attention, version {version}, with the interfaces of mamba_ssm 2.3 and
causal-conv1d 1.7. Nothing is compiled ahead: on a CPU chunked and differentiable torch code runs, on a CUDA device
Triton kernels. The kernels pass their tests under Triton's interpreter and compile for sm_80 and sm_90; no GPU has run
them yet.

Needed are Python 3.11 or newer and torch 2.11 or newer; Triton only for the Triton kernels. Backends are `cpu` and
`cuda`.

## Use

```python
import torch
from kernels import get_kernel

ops = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
x, B, C = torch.randn(1, 100, 4, 16), torch.randn(1, 100, 1, 8), torch.randn(1, 100, 1, 8)
y = ops.ssd(x, torch.rand(1, 100, 4), torch.linspace(-1.0, -4.0, 4), B, C)
```

`kernels` asks for `trust_remote_code=True` unless the Hub lists the publisher as trusted. Read the code first: all of
it is Python, in `torch-ext/`. From a folder on this machine, `get_local_kernel(Path("FOLDER"))` loads the same module.

## In transformers

The layers of this package replace the functions behind transformers' Mamba layers, and its norms, on a CPU too:

```python
from kernels import LayerRepository, Mode, kernelize, use_kernel_mapping
from transformers import AutoModelForCausalLM

names = [
{mapped}
]
layers = {{
    name: LayerRepository("{repo_id}", layer_name=name, version={version}, trust_remote_code=True) for name in names
}}
model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
with use_kernel_mapping({{name: {{"cpu": layer}} for name, layer in layers.items()}}, inherit_mapping=False):
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
```

On a CUDA device write "cuda" twice; before a training, `Mode.TRAINING`. The functions belong to transformers' modules,
so all models of a type in the process share the replacement.

| layer | |
|---|---|
{layers}

The fused functions of a training step decline, so that adapters of the projections and activations other than SiLU have
effect: the mixer then calls the convolution and the scan of this package. Packed rows (`seq_idx`, `cu_seq_lens_q`) are
kept apart where transformers passes these arguments on. `Mamba2ForCausalLM` and most models with Mamba-1 drop them.
Zamba hands them to its convolution only, so that its scan mixes documents: do not pack there.

## Functions

| name | |
|---|---|
{functions}

Each has a docstring with shapes, ranges and errors. Tensors are (B, L, H, P), batch, length, heads, head width, except
in the interfaces of mamba_ssm and causal-conv1d, which keep theirs.

## Files

`build/` holds one folder for each backend, `torch-ext/` the same sources for kernel-builder. `metadata.json` in each
folder of `build/` has the SHA-256 of its files, and `manifest.json` that of all files.
"""
