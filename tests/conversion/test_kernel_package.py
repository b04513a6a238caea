"""The kernel repository: its files, its loading where ssm_zoo cannot be imported, and transformers' models on it."""

import ast
import base64
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_package_calls
import pytest
import torch
from kernel_ops import OPS
from safetensors.torch import load_file, save_file

from ssm_zoo.conversion.kernel_package import (
    BACKENDS,
    EXPORTS,
    NAME,
    check_kernel_package,
    write_kernel_package,
)
from ssm_zoo.kernels import compat
from with_triton import NEEDS_TRITON

SUPPORT = Path(kernel_package_calls.__file__).parent
NAMES = [name for names in EXPORTS.values() for name in names]
# What transformers looks for by name (integrations/hub_kernels.py of 5.24), as far as this project has the op.
MAPPED = ["causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]
MAPPED += ["mamba_inner_fn", "selective_scan_fn", "selective_state_update"]
TYPES = {"BoundedMemory", "SSDFactors", "RowDistances"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel_package(tmp_path_factory.mktemp("kernels") / NAME)


def function_of(label: str) -> str:
    """The function of a row of the table of ops; some labels add what for."""
    return label.partition(" ")[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_bytecode(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if "__pycache__" not in name}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **more}


def test_every_op_and_every_name_of_transformers_is_exported() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(MAPPED) <= set(NAMES)
    assert set(compat.__all__) <= set(NAMES)
    assert {function_of(label) for label in OPS} <= set(NAMES)


def test_writing_again_gives_the_same_bytes_and_replaces_an_unchanged_package(package: Path, tmp_path: Path) -> None:
    again = write_kernel_package(tmp_path / "again")
    first = without_bytecode(package)
    assert files(again) == first
    (again / "torch-ext" / "__pycache__").mkdir()
    (again / "torch-ext" / "__pycache__" / "a.pyc").write_bytes(b"left by Python")
    write_kernel_package(again, repo_id="someone/kernels")
    changed = {name for name, content in files(again).items() if content != first[name]}
    assert changed == {"README.md", "build.toml", "manifest.json"}
    assert 'repo-id = "someone/kernels"' in (again / "build.toml").read_text(encoding="utf-8")
    assert 'get_kernel("someone/kernels", version=1' in (again / "README.md").read_text(encoding="utf-8")
    check_kernel_package(again)


def test_the_folder_has_the_layout_of_a_kernel_repository(package: Path) -> None:
    build = tomllib.loads((package / "build.toml").read_text(encoding="utf-8"))
    assert build["torch-noarch"] == {}
    assert build["general"] == {
        **{"name": NAME, "version": 1, "edition": 5, "license": "Apache-2.0", "backends": list(BACKENDS)}
    }
    sources = files(package / "torch-ext" / "ssm_zoo_kernels")
    identifiers = set()
    for backend in BACKENDS:
        variant = package / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        there = {name: content for name, content in without_bytecode(variant).items() if name != "metadata.json"}
        assert {name: content for name, content in there.items() if "/" not in name} == sources
        assert metadata["backend"] == {"type": backend}
        identifiers.add(metadata["id"])
        assert metadata["id"].isidentifier()
        hashes = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in there.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}
    assert len(identifiers) == len(BACKENDS)
    card = (package / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | " in card for name in NAMES)
    assert "Apache License" in (package / "LICENSE").read_text(encoding="utf-8")


def test_the_files_import_each_other_torch_and_the_standard_library_only(package: Path) -> None:
    sources = package / "torch-ext" / "ssm_zoo_kernels"
    there = {path.stem for path in sources.glob("*.py")}
    for path in sources.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and (node.module or "layers") in there, path.name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                allowed = {"torch", *sys.stdlib_module_names, *(["triton"] if path.stem == "_triton" else [])}
                assert {name.partition(".")[0] for name in names} <= allowed, path.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "it also holds notes.txt"),
        (lambda folder: (folder / "README.md").write_text("mine"), "README.md has 4 bytes"),
        (lambda folder: (folder / "build" / "torch-cpu" / "ssd.py").unlink(), "build/torch-cpu/ssd.py is missing"),
        (lambda folder: (folder / "build.toml").unlink(), "it holds no build.toml of ssm-zoo-kernels"),
        (lambda folder: (folder / "a").symlink_to(folder), "it also holds a"),
    ],
    ids=["added", "changed", "missing", "other", "link"],
)
def test_a_folder_that_is_no_unchanged_package_is_reported_and_kept(
    package: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
    change(folder)
    before = without_bytecode(folder)
    with pytest.raises(ValueError, match=f"folder must be new, empty or an unchanged .*{message}"):
        write_kernel_package(folder)
    assert without_bytecode(folder) == before
    with pytest.raises(ValueError, match=f"not a complete kernel package: {message}"):
        check_kernel_package(folder)


@pytest.mark.parametrize("repo_id", ["kernels", "a/b/c", "/kernels", 'a/"b'])
def test_a_repository_without_an_owner_is_refused(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repo_id must be OWNER/NAME"):
        write_kernel_package(tmp_path / "package", repo_id=repo_id)
    assert not (tmp_path / "package").exists()


def calls_and_inputs() -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Calls of every function of the package with values that are valid for it, e.g. negative decay rates."""
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, dict[str, Any]] = {}
    inputs: dict[str, torch.Tensor] = {}
    for label, op in OPS.items():
        arguments = op.arguments()
        tensors = {name: each for name, each in arguments.items() if isinstance(each, torch.Tensor)}
        for name, each in tensors.items():
            if each.is_floating_point():
                each.uniform_(-1, -0.1, generator=generator)
            inputs[f"{label}|{name}"] = each
        options = {name: each for name, each in arguments.items() if name not in tensors}
        calls[label] = {"function": function_of(label), "options": options}
    x = torch.randn(3, 4, generator=generator)
    for label in kernel_package_calls.SPECIAL.keys() - calls.keys() - {"rms_norm by Triton"}:
        calls[label], inputs[f"{label}|x"] = {"function": label, "options": {}}, x.clone()
    if not torch.cuda.is_available():  # otherwise Triton compiles for the device, and these tensors are not there
        label = "rms_norm by Triton"
        calls[label] = {"function": label, "options": {}}
        inputs |= {
            f"{label}|{name}": each for name, each in (("x", x.clone()), ("weight", x[0].clone()), ("z", x.exp()))
        }
    return calls, inputs


@NEEDS_TRITON
def test_without_ssm_zoo_every_function_gives_the_same_bits(package: Path, tmp_path: Path) -> None:
    calls, inputs = calls_and_inputs()
    (tmp_path / "calls.json").write_text(json.dumps(calls), encoding="utf-8")
    save_file(inputs, tmp_path / "inputs.safetensors")
    program = [sys.executable, "-P", SUPPORT / "kernel_package_calls.py", package]
    places = [tmp_path / "calls.json", tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    done = subprocess.run([*program, *places], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {
        name: getattr(importlib.import_module(f"ssm_zoo.kernels.{file}"), name)
        for file, exported in EXPORTS.items()
        for name in exported
    }
    expected = kernel_package_calls.run(SimpleNamespace(**names), calls, inputs)
    got = load_file(places[-1])
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    called = {call["function"] for call in calls.values()}
    assert set(NAMES) - called == {*TYPES, "quantise_rows", "dequantise_rows"}  # the call int8_rows has the latter two


def test_the_package_loads_without_triton_and_by_the_path_of_older_versions(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    variant = package / "build" / "torch-cuda"
    ops = kernel_package_calls.load_by_path(variant)
    x, scale = torch.randn(2, 3, 4), torch.rand(4)
    assert torch.equal(ops.rms_norm(x, scale, 1e-5), compat.rmsnorm_fn(x, scale, None, eps=1e-5))
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        ops.rms_norm(x, scale, 1e-5, implementation="triton")
    spec = importlib.util.spec_from_file_location("older", variant / "ssm_zoo_kernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.ssd is ops.ssd and older.layers is ops.layers and older.__all__ == ops.__all__


def test_the_library_reads_the_configuration_the_metadata_and_the_digest(package: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("kernels._rust")
    general = library.Build.open(package).general
    assert [str(backend) for backend in general.backends] == list(BACKENDS)
    for backend in BACKENDS:
        variant = tmp_path / backend
        shutil.copytree(package / "build" / f"torch-{backend}", variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = library.Metadata.read_from_file(variant / "metadata.json")
        assert (metadata.version, metadata.license, str(metadata.backend.backend_type)) == (1, "Apache-2.0", backend)
        assert metadata.name.python_name == "ssm_zoo_kernels" and metadata.python_depends == []
        metadata.digest.validate(library.Digest.hash_variant(metadata.digest.algorithm, variant))
        (variant / "ssd.py").write_text("changed", encoding="utf-8")
        with pytest.raises(library.DigestValidationError, match=r"ssd\.py"):
            metadata.digest.validate(library.Digest.hash_variant(metadata.digest.algorithm, variant))


def test_transformers_own_models_run_on_the_package(package: Path) -> None:
    pytest.importorskip("kernels")
    program = [sys.executable, SUPPORT / "native_on_kernel_package.py", package]
    done = subprocess.run(program, env=environment(TRITON_INTERPRET="0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
