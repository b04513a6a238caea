"""The Triton kernels compile for the devices they are meant for, and fit there; none of them is needed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import SWEEP

from ssm_zoo.kernels import checks
from with_triton import NEEDS_TRITON

# Bytes of shared memory that a program may take, from the CUDA programming guide.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def kernels() -> set[str]:
    """`file.function` of all that is launched: what a decorator of Triton's makes, by the name that it has."""
    found = set()
    for path in Path(checks.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found.add(f"{path.stem}.{node.name}")
    return found


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param(80, marks=SWEEP), 90])
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, str(capability)], env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shared = json.loads(run.stdout)
    assert kernels() and shared.keys() == kernels()
    assert max(shared.values()) <= SHARED_MEMORY[capability], shared
