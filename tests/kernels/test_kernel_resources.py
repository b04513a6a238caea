"""What the compiled kernels take does not get worse: spills, widths of accesses, barriers, instructions.

The numbers are held in kernel_resources.json, for the versions of Triton that are named there. No device is needed.
"""

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resource_guard import RENEW, Numbers, collect, numbers_of, renew, worse
from sweeps import SWEEP, SWEEPING

from ssm_zoo.kernels import checks
from with_triton import NEEDS_TRITON

HELD_FILE = Path(__file__).with_name("kernel_resources.json")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "resources.py"
HELD: Numbers = json.loads(HELD_FILE.read_text(encoding="utf-8"))
# A row of `resources.py`, as far as numbers are held.
ROW: dict[str, Any] = {
    "kernel": "file.some_kernel",
    "variant": 1,
    "case": "op L8",
    "target": "sm_90",
    "versions": {"triton": "3.9.0"},
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
    "loads": {2: 3, 16: 8},
    "stores": {16: 4},
    "barriers": 20,
    "executed_barriers": 100,
    "instructions": 1000,
    "executed_instructions": 9000,
}


def compiled(target: int, only: str, folder: Path) -> Numbers:
    """Compile the cases in a process of their own, since Triton's driver is replaced there."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    output = folder / "rows.jsonl"
    command = [sys.executable, SCRIPT, "--targets", str(target), "--only", only, "--output", output]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return collect(map(json.loads, output.read_text(encoding="utf-8").splitlines()))


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "only"),
    [
        pytest.param(90, "^(rms_norm|masked_mix_step) ", id="some"),
        pytest.param(80, "", marks=SWEEP, id="all for sm_80"),
        pytest.param(90, "", marks=SWEEP, id="all for sm_90"),
        pytest.param(100, "", marks=SWEEP, id="all for sm_100"),
    ],
)
def test_no_compiled_kernel_is_worse_than_before(target: int, only: str, tmp_path: Path) -> None:
    found = compiled(target, only, tmp_path)
    (version,) = found
    if version not in HELD and not SWEEPING:
        pytest.skip(f"no numbers are held for Triton {version}; {RENEW}")
    assert not (faults := worse(found, HELD)), "\n".join(faults)


def test_numbers_are_held_for_every_kernel() -> None:
    """Every kernel that is launched, for every target, and wide accesses where rows are contiguous."""
    launched = set()
    for path in Path(checks.__file__).parent.glob("*_triton.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                launched.add(f"{path.stem}.{node.name}")
    for targets in HELD.values():
        for kernels in targets.values():
            assert launched and {name.partition(" ")[0] for name in kernels} == launched
            norms = [numbers for name, numbers in kernels.items() if name.startswith("rms_norm_triton._forward")]
            assert norms and all(numbers["narrow_loads"] == numbers["spilled_bytes"] == 0 for numbers in norms)
            backward = [
                numbers for name, numbers in kernels.items() if name.startswith("causal_conv1d_triton.backward")
            ]
            assert backward and all(numbers["narrow_stores"] == numbers["spilled_bytes"] == 0 for numbers in backward)


@pytest.mark.parametrize(
    ("change", "name", "number"),
    [
        ({"spill_load_bytes": 4}, "spilled_bytes", 4),
        ({"loads": {2: 4, 16: 8}}, "narrow_loads", 4),
        ({"stores": {4: 1, 16: 4}}, "narrow_stores", 1),
        ({"barriers": 23}, "barriers", 23),
        ({"executed_barriers": 111}, "executed_barriers", 111),
        ({"instructions": 1101}, "instructions", 1101),
        ({"executed_instructions": 9901}, "executed_instructions", 9901),
    ],
)
def test_a_number_that_is_worse_is_named(change: dict[str, Any], name: str, number: int) -> None:
    (fault,) = worse(collect([ROW | change]), collect([ROW]))
    assert fault.startswith(f"sm_90 file.some_kernel 1 of op L8: {name} is {number}, held is {numbers_of(ROW)[name]} ")
    assert RENEW in fault


def test_as_good_or_better_is_no_fault() -> None:
    better = {"loads": {16: 8}, "barriers": 22, "instructions": 1100, "executed_instructions": 5}
    assert worse(collect([ROW | better]), collect([ROW])) == []


def test_what_is_not_held_is_said() -> None:
    with pytest.raises(ValueError, match=r"no numbers are held for Triton 3\.9\.0, only for 3\.6\.0\. Run python"):
        worse(collect([ROW]), {"3.6.0": {}})
    (fault,) = worse(collect([ROW | {"case": "op L9"}]), collect([ROW]))
    assert fault.startswith("sm_90 file.some_kernel 1 of op L9: no numbers are held. Run python")


def test_the_committed_numbers_fail_for_a_kernel_that_spills(tmp_path: Path) -> None:
    version, targets = next(iter(HELD.items()))
    doctored = copy.deepcopy({version: targets})
    target, kernels = next(iter(targets.items()))
    for kernel, numbers in kernels.items():
        doctored[version][target][kernel]["spilled_bytes"] = numbers["spilled_bytes"] + 8
    assert len(worse(doctored, HELD)) == len(kernels)
    assert worse({version: targets}, HELD) == []


def test_renewing_keeps_other_versions_and_cases(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    renew([ROW], path)
    renew([ROW | {"case": "op L9"}, ROW | {"versions": {"triton": "3.6.0"}}, ROW | {"barriers": 3}], path)
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held.keys() == {"3.6.0", "3.9.0"}
    assert held["3.9.0"]["sm_90"].keys() == {"file.some_kernel 1 of op L8", "file.some_kernel 1 of op L9"}
    assert held["3.9.0"]["sm_90"]["file.some_kernel 1 of op L8"]["barriers"] == 3
    assert os.listdir(tmp_path) == ["numbers.json"]
