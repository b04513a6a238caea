"""The prediction of `resources.py`: counts, bytes and times, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import resources
from kernel_loops import section, trips
from offline_compile import Binary, Launch
from resource_cases import ResourceCase
from resource_model import DEVICES, Executed, case_rows, executed, moved_bytes, predict, programs_per_processor, report
from roofline import Cost
from sass import Code, Instruction, Loop, SourceLoop

CASE = ResourceCase("op L8", lambda: None, Cost(3_000_000, 10), 64, changed=((4, 4),))
H100 = DEVICES["H100"]


def launch(kernel: str, grid: tuple[int, ...] = (264,), **arguments: Any) -> Launch:
    binary = Binary(b"", Path("x.py"), registers=128, stack=0, spill_stores=0, spill_loads=0, shared=40_000, warps=4)
    return Launch(kernel, binary, grid, arguments)


def code(names: list[str], *bodies: set[int]) -> Code:
    """Instructions, and loops of which each has the source of the norm's only loop."""
    source = SourceLoop("_backward_kernel", 0, 3, 9)
    loops = [Loop(frozenset(body), source) for body in bodies]
    return Code([Instruction(name, ()) for name in names], loops)


def test_instructions_count_as_often_as_their_loop_runs() -> None:
    norm = launch("rms_norm_triton._backward_kernel", ROWS=32, BLOCK_R=4)
    assert trips(norm, "_backward_kernel", 0) == 8
    found = executed(norm, code(["MOV", "BAR", "FADD", "HMMA.16816.F32", "EXIT"], {1, 2, 3}))
    assert (found.instructions, found.barriers, found.flops) == (2 + 3 * 8, 8, 8 * 2 * 16 * 8 * 16)
    assert found.loops == [{"line": 3, "instructions": 3, "barriers": 1, "iterations": 8.0}]


def test_an_unrolled_loop_runs_less_often() -> None:
    """Six instructions that do three iterations each time, and two for the rest."""
    found = executed(
        launch("rms_norm_triton._backward_kernel", ROWS=36, BLOCK_R=3), code(["FADD"] * 9, {0, 1, 2, 3, 4, 5}, {6, 7})
    )
    assert found.instructions == 1 + 6 * 12 / 3


def test_a_loop_without_known_iterations_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rms_norm_triton\.new_kernel: the iterations of loop 1 are not known\. Add"):
        trips(launch("rms_norm_triton.new_kernel"), "new_kernel", 1)


def test_bytes_are_those_of_the_arguments() -> None:
    """A tensor that is passed twice, an expanded one, one that is changed in place, and sections of rows."""
    x, state = torch.empty(2, 8, 4), torch.empty(4, 4)
    both = launch("f.some_kernel", x=x, again=x, bias=torch.empty(4).expand(8, 4), state=state, length=8)
    assert moved_bytes(both, CASE) == 256 + 16 + 2 * 64
    part = launch("ssd_gradients_triton.source_gradients_kernel", x=x, state=state, length=8, count=1, chunks=4)
    assert section(part) == 0.25
    assert moved_bytes(part, CASE) == 64 + 2 * 64


def test_times_follow_the_model() -> None:
    """264 programs on 132 multiprocessors: 8 warps on 4 schedulers of each."""
    some = launch("f.some_kernel")
    found = predict(some, Executed(1755, 0, 0, []), 3_000, True, H100)
    assert found["bound"] == "issue"
    assert found["seconds"]["middle"] == pytest.approx(2 * 1755 / 0.4 / 1.755e9)
    assert found["share_of_roofline"] == pytest.approx(1e-9 / 5e-6)
    found = predict(some, Executed(10, 0, 0, []), 3_000_000, True, H100)
    assert found["bound"] == "memory" and found["seconds"]["high"] == pytest.approx(1e-6 / 0.85)
    found = predict(some, Executed(10, 0, 700e12 / 264 / 4, []), 3_000, False, H100)
    assert found["bound"] == "products" and found["seconds"]["low"] == pytest.approx(1 / 0.85)
    assert found["floor_seconds"] is None and found["share_of_roofline"] is None


def test_programs_that_fit_a_multiprocessor() -> None:
    """128 registers of 128 threads: four by registers, five by shared memory."""
    assert programs_per_processor(launch("f.some_kernel"), H100) == 4
    assert programs_per_processor(launch("f.some_kernel"), DEVICES["A100"]) == 4


def test_a_case_without_launches_takes_no_less_than_its_roofline() -> None:
    (row,) = case_rows(CASE, 90, {"H100": H100}, [])
    assert row["predicted"]["H100"]["seconds"]["middle"] == pytest.approx(1e-6 / 0.85)
    assert row["status"] == "predicted, not measured"
    kernel = {"kernel": "f.some_kernel", "case": "op L8", "target": "sm_90", "spill_store_bytes": 4}
    assert report([kernel, row]).splitlines()[-1] == "| op L8 | 0.00118-0.00118 (85%) | f.some_kernel on sm_90 |"


def test_a_folder_without_triton_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        resources.options(["--triton-path", str(tmp_path)])
    assert f"--triton-path {tmp_path} must be a folder that holds the package triton" in capsys.readouterr().err
