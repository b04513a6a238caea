"""The tests that transformers and peft publish, taken from the source distributions of the installed versions.

Neither library's wheel holds its tests. Their source distributions do: peft's all of them, transformers' the files
`tests/test_*.py`, but no folder below (`generation`, `exporters`) and no helper of another name
(`causal_lm_tester.py`). A checkout of transformers has these too, and can be named beside.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

NEEDED = {
    "transformers": ("tests/test_modeling_common.py", "tests/test_training_mixin.py"),
    "peft": ("tests/test_decoder_models.py", "tests/testing_common.py", "tests/testing_utils.py"),
}


def cache_folder() -> Path:
    """Where unpacked source distributions stay from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssm-zoo" / "contracts"


def source_distribution(name: str, version: str) -> Path:
    """Folder of the unpacked source distribution of exactly that version, downloaded if it is not there yet.

    Raises:
        RuntimeError: if the package index has none, or if files that are needed are not in it.
    """
    folder = cache_folder() / f"{name}-{version}"
    if not (folder / "complete").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            root = _unpack(_download(name, version, Path(temporary)), Path(temporary) / "unpacked")
            missing = _missing(name, version, root)
            if missing:
                raise RuntimeError(f"the source distribution of {name} {version} lacks {', '.join(missing)}")
            (root / "tests" / "__init__.py").touch()  # some of transformers' tests import the folder's by its path
            (root / "complete").touch()
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was interrupted
            root.rename(folder)
    missing = _missing(name, version, folder)
    if missing:
        raise RuntimeError(f"{folder} lacks {', '.join(missing)}: delete the folder and run again")
    return folder


def _download(name: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    command += ["--dest", str(folder), f"{name}=={version}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if finished.returncode or len(archives) != 1:
        reason = finished.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"pip found no source distribution of {name} {version}: {reason}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def _missing(name: str, version: str, root: Path) -> list[str]:
    """What a source distribution must hold and does not; its own metadata has to name the version."""
    missing = [file for file in NEEDED[name] if not (root / file).is_file()]
    metadata = root / "PKG-INFO"
    if not metadata.is_file() or f"\nVersion: {version}\n" not in metadata.read_text(encoding="utf-8"):
        missing.append(f"PKG-INFO of version {version}")
    return missing


def checkout_version(checkout: Path) -> str:
    """Version of a checkout of transformers.

    Raises:
        RuntimeError: if it is none, or has no tests.
    """
    init = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"', init.read_text(encoding="utf-8") if init.is_file() else "", re.M)
    if found is None or not (checkout / "tests" / "generation" / "test_utils.py").is_file():
        raise RuntimeError(
            f"--transformers-checkout must name a checkout of transformers with its tests, got {checkout}"
        )
    return found[1]


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the test modules that no source has: every name in them is an empty class."""

    def __init__(self, package: str, left_out: list[str]) -> None:
        self.prefix = package + "."
        self.left_out = left_out
        self.modules: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix(self.prefix)
        if name == fullname or (name not in self.left_out and self._exists(name.rpartition(".")[2], path)):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    @staticmethod
    def _exists(name: str, path: Any) -> bool:
        return importlib.machinery.PathFinder.find_spec(name, path) is not None

    def exec_module(self, module: ModuleType) -> None:
        self.modules.append(module.__name__)
        module.__getattr__ = lambda name: _absent_class(module, name)  # pyright: ignore[reportAttributeAccessIssue]


def _absent_class(module: ModuleType, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    absent = type(name, (), {"__module__": module.__name__})
    setattr(module, name, absent)
    return absent


def open_package(package: str, folders: list[Path], left_out: list[str]) -> list[str]:
    """Make the test files in `folders` importable as `package`; the first folder that has a file gives it.

    Modules `left_out` count as missing.

    Returns:
        A list that grows by the name of each module that none of them had when it was imported.
    """
    module = ModuleType(package)
    module.__path__ = [str(folder) for folder in folders]
    sys.modules[package] = module
    absent = _Absent(package, left_out)
    sys.meta_path.insert(0, absent)
    return absent.modules
