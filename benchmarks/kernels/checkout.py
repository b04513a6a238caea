"""Import `ssm_zoo` from this checkout if it is not installed, e.g. on a machine without a network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    """Make the folders of this checkout importable as `ssm_zoo.*`, unless an installation already is.

    `ssm_zoo` is a namespace whose sub-packages are the folders at the top of the repository, so a module with the
    repository as its path is all there is to it.
    """
    if "ssm_zoo" in sys.modules or importlib.util.find_spec("ssm_zoo") is not None:
        return
    package = ModuleType("ssm_zoo")
    package.__path__ = [str(ROOT)]
    sys.modules["ssm_zoo"] = package
