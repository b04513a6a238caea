"""Opens the two libraries' test packages: `TRANSFORMERS` and `PEFT`."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft
import transformers
from sources import checkout_version, open_package, source_distribution


@dataclass(frozen=True)
class LibraryTests:
    """A library's tests as a package.

    Attributes:
        package: its name.
        sources: where its files come from, and which version that is.
        absent: modules that were imported and that no source has.
    """

    package: str
    sources: dict[str, str]
    absent: list[str]

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def _transformers() -> LibraryTests:
    version = transformers.__version__
    folders = [source_distribution("transformers", version)]
    sources = {"source distribution": version}
    named = os.environ.get("CONTRACTS_CHECKOUT")
    if named:
        sources["checkout, for the files that the source distribution lacks"] = checkout_version(Path(named))
        folders.append(Path(named).resolve())
    # Some of the files name the package `tests` in full. The pipelines' tests choose models on the Hub by the names of
    # transformers' own classes, from a list that the source distribution lacks: there is none for other models.
    absent = open_package("tests", [folder / "tests" for folder in folders], ["test_pipeline_mixin"])
    return LibraryTests("tests", sources, absent)


def _peft() -> LibraryTests:
    version = peft.__version__
    folder = source_distribution("peft", version) / "tests"
    return LibraryTests("peft_tests", {"source distribution": version}, open_package("peft_tests", [folder], []))


TRANSFORMERS, PEFT = _transformers(), _peft()
