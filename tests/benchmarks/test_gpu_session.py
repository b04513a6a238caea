"""The session on a GPU: what it runs, how steps end, how it goes on; every op once; other tiles."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import every_op
import kernel_tiles
import pytest
import torch
from gpu_session import BARS, CUT_OFF, FAILED, PASSED, UNAVAILABLE, WAITING, Step, digest_of, links, main, plan, session
from kernel_cases import full_cases

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in map(json.loads, (folder / "session.jsonl").read_text().splitlines())}


def test_steps_end_in_every_way_and_only_those_that_have_not_passed_run_again(tmp_path: Path) -> None:
    count = "from pathlib import Path; p = Path({!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    steps = [
        Step("good", python(count.format(str(tmp_path / "good")))),
        Step("bad", python("print('what was wrong'); raise SystemExit(3)")),
        Step("absent", ["no-such-program"], ("no-such-program",)),
        Step("all skipped", python("print('3 skipped')"), says=" passed"),
    ]
    for calls in (1, 2):
        assert session(steps, tmp_path / "out", 60, {"hardware": "h"}) == 1
        rows = rows_of(tmp_path / "out")
        assert [row["status"] for row in rows.values()] == [PASSED, FAILED, UNAVAILABLE, FAILED]
        assert (tmp_path / "good").read_text() == "x", calls
    assert rows["bad"]["exit"] == 3 and "what was wrong" in rows["bad"]["tail"]
    assert rows["absent"]["reason"] == "no-such-program is not installed"
    assert all(row["hardware"] == "h" for row in rows.values())


def test_a_step_is_stopped_with_its_children_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_session.LEAST_SECONDS", 0.5)
    child = "import time, pathlib; time.sleep(4); pathlib.Path({!r}).touch()".format(str(tmp_path / "late"))
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps = [Step("slow", python(code)), Step("later", python("pass"))]
    assert session(steps, tmp_path / "out", 1, {}) == 2
    assert [row["status"] for row in rows_of(tmp_path / "out").values()] == [CUT_OFF, WAITING]
    time.sleep(4.5)
    assert not (tmp_path / "late").exists()
    quick = [Step("slow", python("pass")), steps[1]]
    assert session(quick, tmp_path / "out", 60, {}) == 0
    assert [row["status"] for row in rows_of(tmp_path / "out").values()] == [PASSED, PASSED]


def test_what_was_cut_off_comes_after_what_waits_and_other_sources_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_session.LEAST_SECONDS", 0.5)
    steps = [Step("too long", python("import time; time.sleep(60)")), Step("later", python("pass"))]
    assert session(steps, tmp_path, 1, {"sources": "a"}) == 2
    assert session(steps, tmp_path, 3, {"sources": "a"}) == 2
    assert [row["status"] for row in rows_of(tmp_path).values()] == [CUT_OFF, PASSED]
    assert session(steps, tmp_path, 0, {"sources": "b"}) == 2
    assert [row["status"] for row in rows_of(tmp_path).values()] == [WAITING, WAITING]


def test_sources_device_and_versions_decide_the_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gpu_session.ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "ssd.py").write_text("x = 1")
    found = {digest_of({"gpu": "a", "versions": {}}), digest_of({"gpu": "b", "versions": {}})}
    (tmp_path / "kernels" / "ssd.py").write_text("x = 2")
    assert len(found | {digest_of({"gpu": "a", "versions": {}})}) == 3


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "session.jsonl").write_text('{"case": 1}\n')
    with pytest.raises(SystemExit, match=r"session.jsonl:1: not a row of this script; choose another --output"):
        session([], tmp_path, 60, {})
    assert (tmp_path / "session.jsonl").read_text() == '{"case": 1}\n'


def test_the_plan_has_every_kernel_test_and_each_group_has_cases(tmp_path: Path) -> None:
    steps = plan(tmp_path, 1, "sources")
    assert len({step.name for step in steps}) == len(steps)
    tests = {Path(step.command[-1]).name for step in steps if step.name.startswith("proof")}
    assert tests == {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    for step in steps:
        where = tmp_path / "sources"
        assert step.name not in ("tiles", "bars: all others") or str(where) in " ".join(step.command)
    for group in BARS:
        assert any(re.search(group, case.name) for case in full_cases()), group
    assert steps[-1].name == "bars: all others" and "--only" not in steps[-1].command


def test_the_checkout_is_importable_without_an_installation(tmp_path: Path) -> None:
    code = "import ssm_zoo.kernels.ssd as m, ssm_zoo.training; print(m.__file__)"
    (tmp_path / "ssm_zoo").mkdir()
    (tmp_path / "ssm_zoo" / "kernels").symlink_to(tmp_path / "nowhere")  # of an earlier call
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(links(tmp_path))!r}]; "]
    command[-1] += f"sys.path += {[path for path in sys.path if 'site-packages' in path]!r}; {code}"
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).resolve() == ROOT / "kernels" / "ssd.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
def test_without_a_device_the_session_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (main, lambda arguments: kernel_tiles.main([*arguments, "--output", "x.jsonl"])):
        with pytest.raises(SystemExit, match="2"):
            program([])
        assert "finds no CUDA device" in capsys.readouterr().err


def test_a_wrong_result_and_one_that_is_not_finite_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for an op, so that no kernel has to be interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def op(x: torch.Tensor, wrong: float, implementation: str) -> torch.Tensor:
        return x * (wrong if implementation == "triton" else 1.0)

    for wrong, status in ((1.001, 0), (1.1, 1), (float("nan"), 1)):
        case = ("stand-in", op, {"x": torch.ones(3, requires_grad=True), "wrong": wrong})
        monkeypatch.setattr(every_op, "cases", lambda device, length, case=case: iter([case]))
        monkeypatch.setattr(every_op, "steps", lambda device: iter(()))
        assert every_op.main([]) == status
        assert ("differs" in capsys.readouterr().out) == bool(status)


def test_every_op_has_a_case() -> None:
    """The names of all ops with an argument `implementation`, except those made of others."""
    names = {name.partition(",")[0] for name, _, _ in every_op.cases(torch.device("cpu"), 40)}
    names |= {name.partition(",")[0] for name, _, _ in every_op.steps(torch.device("cpu"))}
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^def ([a-z]\w*)\((?:[^()]|\([^()]*\))*implementation: str", text, re.MULTILINE):
            if not path.name.startswith(("compat", "checks", "hub_")):
                found.add(match[1])
    assert found - names == {"ssd_log_decay_step"}  # the kernel of ssd_step


def test_launch_options_are_replaced_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "__getitem__", lambda kernel, grid: lambda **options: options)
    kernel = object.__new__(jit.JITFunction)
    kernel.__name__ = "walk_kernel"
    plain = jit.JITFunction.__getitem__
    with kernel_tiles.launched_with({"walk_kernel": {"num_warps": 8}}):
        assert kernel[(1,)](num_warps=4, BLOCK=2) == {"num_warps": 8, "BLOCK": 2}
    assert jit.JITFunction.__getitem__ is plain


def test_the_kernels_whose_options_vary_are_there() -> None:
    names = [case.name for case in full_cases()]
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*_triton.py"))
    for beginning, kernels in kernel_tiles.KERNELS.items():
        assert any(name.startswith(beginning) for name in names), beginning
        assert all(f"def {kernel}(" in text for kernel in kernels)
