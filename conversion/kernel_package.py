"""The kernels as a repository of the type `kernel`, which Hugging Face's package `kernels` loads from the Hub.

The layout is that of kernel-builder for kernels without compiled parts (huggingface/kernels@8ac69fc,
docs/source/kernel-requirements.md and builder/writing-kernels.md; read and loaded with kernels 0.17.2):

    build.toml                        name, version, licence, backends, [torch-noarch]
    torch-ext/ssm_zoo_kernels/        the sources: the files of kernels/ as they are, `layers.py`, `__init__.py`
    build/torch-<backend>/            the same files again, which is what is loaded, and
        metadata.json                 a name unique to these sources, and a SHA-256 of each file
        ssm_zoo_kernels/__init__.py   the same module for older versions of `kernels`
    README.md  LICENSE
    manifest.json                     size and SHA-256 of every file of the repository

Files import each other relatively and nothing but torch, the standard library and, where it is installed, Triton.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..harness.checkpoint_manifest import MANIFEST, damage, write_manifest
from ..harness.json_files import json_text, read_json_object
from ..harness.whole_files import new_folder
from ..kernels import compat
from ..modeling.hub_code import code_licence
from .kernel_card import kernel_card

__all__ = ["BACKENDS", "EXPORTS", "NAME", "VERSION", "check_kernel_package", "write_kernel_package"]

NAME = "ssm-zoo-kernels"
"""Name of the kernel; its module has underscores instead of dashes."""

VERSION = 1
"""Major version: the number of the branch, v1. It increases when a name of `EXPORTS` changes incompatibly."""

BACKENDS = ("cpu", "cuda")
"""Backends whose paths are tested; those for CUDA under Triton's interpreter, so far."""

EXPORTS: dict[str, tuple[str, ...]] = {
    "ssd": (
        "ssd",
        "ssd_step",
        "ssd_reference",
        "ssd_log_decay",
        "ssd_log_decay_step",
        "ssd_log_decay_reference",
        "ssd_matrix",
    ),
    "selective_scan": ("selective_scan", "selective_scan_step", "selective_scan_reference"),
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_step", "causal_conv1d_reference"),
    "mamba2_step": ("mamba2_step",),
    "rms_norm": ("rms_norm", "rms_norm_reference", "add_rms_norm", "add_rms_norm_reference"),
    "position_mix": (
        "masked_mix",
        "masked_mix_step",
        "masked_mix_reference",
        "toeplitz_mix",
        "toeplitz_mix_step",
        "toeplitz_mix_reference",
    ),
    "window_attention": ("window_attention", "window_attention_reference", "window_attention_matrix"),
    "bounded_attention": (
        "BoundedMemory",
        "bounded_attention",
        "bounded_attention_step",
        "bounded_attention_reference",
        "bounded_attention_matrix",
    ),
    "int8_rows": ("quantise_rows", "dequantise_rows"),
    "matrix_distance": ("SSDFactors", "RowDistances", "row_distances", "row_distances_reference"),
    "compat": tuple(compat.__all__),
}
"""Public names of the package by the file that they are imported from."""

_TITLE = "Ops of state space models and linear-time attention, with the interfaces of mamba_ssm and causal-conv1d."
_MODULE = NAME.replace("-", "_")
_LICENCE = "Apache-2.0"
# Edition of the format of build.toml.
_EDITION = 5
_LAYERS = "hub_layers"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What Python leaves in a folder that has been imported.
_BYTECODE = "__pycache__"
# Versions of `kernels` that look for a folder of the module's name find there what newer ones load one level up.
_OLDER = '''"""The module one folder up, for versions of `kernels` that look for it here."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{identifier}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).resolve().parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    try:
        _spec.loader.exec_module(sys.modules[_NAME])
    except BaseException:
        del sys.modules[_NAME]
        raise
__all__ = sys.modules[_NAME].__all__
globals().update((name, getattr(sys.modules[_NAME], name)) for name in __all__)
'''


def write_kernel_package(folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write the kernels as a repository that can be pushed to the Hub; the folder appears whole or not at all.

    Two calls with the same sources and arguments write the same bytes.

    Args:
        folder: a new or empty folder, or an unchanged package that was written before, which is replaced.
        repo_id: OWNER/NAME of the repository on the Hub, for the card and build.toml.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds anything else, or `repo_id` is no such name.
    """
    folder = Path(os.path.abspath(folder))
    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be OWNER/NAME, got {repo_id!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = _problem(folder)
        if problem is not None:
            raise ValueError(
                f"folder must be new, empty or an unchanged kernel package, got {folder}: {problem}. Move its files, "
                "or write to another folder."
            )
    sources = _sources()
    digest = hashlib.sha256("\0".join(part for item in sources.items() for part in item).encode()).hexdigest()[:12]
    texts = {"build.toml": _build_file(repo_id), "README.md": kernel_card(NAME, VERSION, EXPORTS, repo_id)}
    licence = code_licence()
    if licence is None:
        raise ValueError("LICENSE of ssm-zoo was not found: install ssm-zoo with its licence file, or use a checkout.")
    texts["LICENSE"] = licence
    texts |= {f"torch-ext/{_MODULE}/{name}": text for name, text in sources.items()}
    for backend in BACKENDS:
        identifier = f"_{_MODULE}_{backend}_{digest}"
        files = {**sources, f"{_MODULE}/__init__.py": _OLDER.format(identifier=identifier)}
        files["metadata.json"] = _metadata(identifier, backend, files)
        texts |= {f"build/torch-{backend}/{name}": text for name, text in files.items()}
    with new_folder(folder, overwrite=True) as made:
        for name, text in texts.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(text.encode("utf-8"))
        write_manifest(made)
    return folder


def check_kernel_package(folder: str | Path) -> None:
    """Raise a ValueError unless a folder is a kernel package as it was written: no file changed, missing or added."""
    problem = _problem(Path(folder))
    if problem is not None:
        raise ValueError(f"folder: {folder} is not a complete kernel package: {problem}. Write it again.")


def _sources() -> dict[str, str]:
    """Return the files of the module by name: those of kernels/, with the layers under the name that is looked for."""
    here = Path(__file__).resolve().parents[1] / "kernels"
    names = {"layers.py" if path.stem == _LAYERS else path.name: path for path in here.glob("*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in names.items()}
    texts["__init__.py"] = _init_file()
    return dict(sorted(texts.items()))


def _init_file() -> str:
    imports = "".join(
        f"from .{file} import (\n{_listed(f'    {name},' for name in sorted(names))})\n"
        for file, names in sorted(EXPORTS.items())
    )
    public = sorted(["layers", *(name for names in EXPORTS.values() for name in names)])
    listed = _listed(f'    "{name}",' for name in public)
    return f'"""{_TITLE}"""\n\nfrom . import layers\n{imports}\n__all__ = [\n{listed}]\n'


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _build_file(repo_id: str | None) -> str:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    hub = "" if repo_id is None else f'\n[general.hub]\nrepo-id = "{repo_id}"\n'
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = {_EDITION}
license = "{_LICENCE}"
backends = [{backends}]
{hub}
[torch-noarch]
"""


def _metadata(identifier: str, backend: str, files: dict[str, str]) -> str:
    """Return the metadata of a build, with the digest of its files as in kernels-data/src/digest.rs."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
        for name, text in sorted(files.items())
    }
    values = {
        "name": NAME,
        "id": identifier,
        "version": VERSION,
        "license": _LICENCE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return json_text(values, "metadata.json") + "\n"


def _problem(folder: Path) -> str | None:
    """Return why a folder is no unchanged package of :func:`write_kernel_package`; None if it is one."""
    build = folder / "build.toml"
    if not build.is_file() or f'name = "{NAME}"' not in build.read_text(encoding="utf-8", errors="replace"):
        return f"it holds no build.toml of {NAME}"
    problem = damage(folder)
    if problem is not None:
        return problem
    listed = {MANIFEST, *read_json_object(folder / MANIFEST)["files"]}
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    foreign = sorted(path.as_posix() for path in there if path.as_posix() not in listed and _BYTECODE not in path.parts)
    return f"it also holds {', '.join(foreign[:3])}" if foreign else None
