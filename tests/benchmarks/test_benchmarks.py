"""The kernel benchmark: a whole run at small sizes, what it refuses, how it goes on, what it counts and compares."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import (
    EAGER,
    FORWARD,
    GRAPH,
    OPS,
    TRAINING,
    Case,
    full_cases,
    prepare,
    reference_results,
    small_cases,
)
from kernel_check import error_of
from kernel_peers import PEERS, NotMeasuredError, require
from kernel_suite import Bench, main
from kernel_timing import Clock
from roofline import cost

from ssm_zoo.kernels import compat
from ssm_zoo.kernels.ssd import ssd_log_decay_reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a run without a CUDA device is what is tested")

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "gpu_kernels.py"
CEILINGS = {"copy_bytes_per_s": 1e9, "bfloat16_flops_per_s": 1e9, "float32_flops_per_s": 1e9}
NORM = Case("rms_norm", TRAINING, {"B": 2, "L": 3, "D": 8}, torch.float32)

EVERY_ROW = {"case", "peer", "status", "reason", "hardware", "versions", "date", "command"}
EVERY_CASE = EVERY_ROW | {"op", "mode", "sizes", "dtype", "full", "bars"}
MEASURED = EVERY_CASE | {"seconds", "repeats", "error"}
OURS = MEASURED | {"bytes", "flops", "bytes_per_s", "flops_per_s", "fraction_of_copy", "fraction_of_compute"}
OURS |= {"floor_seconds", "peak_bytes", "needed_bytes", "memory_ratio", "extra_bytes"}
THEIRS = MEASURED | {"ratio", "difference", "extra_bytes"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result_of(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


def bench(full: bool = False) -> Bench:
    return Bench(CPU, Clock(CPU, seconds=0.0, rounds=(2, 2)), CEILINGS, full)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["--output", str(folder)]) == 0
    return result_of(folder)


def test_a_whole_run_measures_every_small_case(finished: Path):
    rows = read(finished)
    assert rows[0]["case"] == "ceilings"
    assert all(rows[0][name] > 0 for name in CEILINGS)
    ours = {row["case"]: row for row in rows[1:] if row["peer"] is None}
    for case in small_cases():
        row = ours[case.name]
        assert row["status"] == ("not measured" if case.mode == GRAPH else "measured"), row["reason"]
        assert not row["full"]
    measured = {(row["op"], row["peer"]) for row in rows[1:] if row["status"] == "measured"}
    assert {("ssd", "torch attention"), ("rms_norm", "torch rms_norm"), ("decode", "transformers")} <= measured
    assert {("window_attention", f"{peer} of all tokens") for peer in ("FlexAttention", "torch attention")} <= measured
    dense = {
        ("masked_mix", "cuBLAS of tril(W)"),
        ("toeplitz_mix", "cuBLAS of the matrix"),
        ("toeplitz_mix", "torch rfft"),
    }
    assert {*dense, ("masked_mix", "the floor: cuBLAS of W unmasked")} <= measured
    theirs = {op for op, peer in measured if (peer or "").startswith("transformers")}
    assert theirs == OPS.keys() - {"add_rms_norm", "window_attention", "masked_mix", "toeplitz_mix"}


def test_every_row_has_its_keys_and_those_without_a_number_a_reason(finished: Path):
    rows = read(finished)
    assert all(row.keys() >= EVERY_ROW for row in rows)
    for row in rows[1:]:
        assert row.keys() >= EVERY_CASE
        if row["status"] == "measured":
            assert row["reason"] is None
            assert row.keys() >= (OURS if row["peer"] is None else THEIRS)
            assert 0 < row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"]
        else:
            assert row["status"] == "not measured"
            assert row["reason"]
            assert "seconds" not in row


def test_every_full_size_row_is_there_and_waits_for_a_device(finished: Path):
    rows = {(row["case"], row["peer"]): row for row in read(finished)[1:] if row["full"]}
    cases = list(full_cases())
    assert len({case.name for case in cases}) == len(cases)
    assert rows.keys() == {(case.name, peer) for case in cases for peer in (None, *PEERS[case.op])}
    assert {row["reason"] for row in rows.values()} == {"needs a CUDA device"}
    verdicts = [bar["verdict"] for row in rows.values() for bar in row["bars"]]
    assert verdicts
    assert set(verdicts) == {"not measured"}


def test_there_is_a_picture_of_every_op_and_of_the_roofline(finished: Path):
    pictures = {path.stem.removeprefix(f"{finished.stem}-") for path in finished.parent.glob("*.png")}
    assert pictures == OPS.keys() | {"roofline"}


def test_a_resumed_run_measures_only_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = read(finished)
    missing = next(case.name for case in small_cases() if case.op == "causal_conv1d")
    path = tmp_path / "cut-off.jsonl"
    # Of this case only our side had been measured.
    cut_off = [row for row in rows if row["case"] != missing or row["peer"] is None]
    assert len(cut_off) > sum(row["case"] != missing for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in cut_off))
    measured = []
    monkeypatch.setattr(Bench, "sides", lambda self, case: measured.append(case.name) or [])
    monkeypatch.setattr("kernel_plots.main", lambda arguments: None)
    assert main(["--resume", str(path)]) == 0
    # A step in a graph waits for a device, as the full sizes do, and is tried again.
    assert measured == [case.name for case in small_cases() if case.name == missing or case.mode == GRAPH]
    kept = [row for row in rows[1:] if row["status"] == "measured" and row["case"] != missing]
    assert [row for row in read(path)[1:] if row["status"] == "measured"] == kept


def test_other_hardware_and_other_files_are_not_resumed(finished: Path, tmp_path: Path):
    rows = read(finished)
    next(row for row in rows[1:] if row["status"] == "measured")["hardware"] = "another"
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"other\.jsonl:\d+: measured with hardware another.*start a new file"):
        main(["--resume", str(path)])
    path.write_text('{"case": 1}\n')
    with pytest.raises(SystemExit, match="not a row of this benchmark"):
        main(["--resume", str(path)])
    with pytest.raises(SystemExit, match=r"absent\.jsonl"):
        main(["--resume", str(tmp_path / "absent.jsonl")])


def test_no_case_starts_after_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = iter(range(0, 10000, 50))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    monkeypatch.setattr("kernel_plots.main", lambda arguments: None)
    main(["--minutes", "1", "--only", "^rms_norm forward", "--output", str(tmp_path)])
    assert [row["status"] for row in read(result_of(tmp_path)) if row["case"].endswith("float32")][:1] == ["measured"]
    main(["--minutes", "1", "--only", "^(add_)?rms_norm ", "--output", str(tmp_path / "more")])
    assert "--minutes 1 are over with 3 cases left: --resume" in capsys.readouterr().out


def test_the_script_runs_where_the_package_is_not_installed(tmp_path: Path):
    # Without `site` no .pth file is read, and so no editable installation found; packages are still on the path.
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    arguments = ["--only", "^rms_norm forward .*float32$", "--output", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-S", str(SCRIPT), *arguments],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
    )
    assert [row["status"] for row in read(result_of(tmp_path)) if row["peer"] is None] == ["measured", "measured"]


def wrong(change: str) -> dict[str, Any]:
    """`OPS` with a norm that is wrong in one way."""
    right = OPS["rms_norm"]

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = right.ours(x=x, weight=weight)
        if change == "output":
            return y * 1.001
        if change == "gradient":
            return y.detach() + (y - y.detach()) * 1.001
        if change == "NaN":
            return torch.where(torch.arange(y.shape[-1]) == 1, torch.nan, y)
        if change == "full size" and x.shape[1] == 400:
            return torch.cat([y[:, :-1], 2 * y[:, -1:]], dim=1)
        return y

    return OPS | {"rms_norm": dataclasses.replace(right, ours=ours)}


@pytest.mark.parametrize("change", ["output", "gradient", "NaN"])
def test_a_wrong_kernel_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch, change: str):
    monkeypatch.setattr("kernel_cases.OPS", wrong(change))
    monkeypatch.setattr(Clock, "times", lambda *arguments: pytest.fail("timed"))
    ours, *others = bench(full=True).rows(NORM)
    assert ours["status"] == "refused"
    name = {"output": "y", "gradient": "d(x|weight)", "NaN": "y"}[change]
    assert re.match(rf"{name} differs by .* of its largest entry, at most 1e-04", ours["reason"])
    assert {row["status"] for row in others} == {"not measured"}
    assert all(row["reason"].startswith("ours is refused: ") for row in others)


def test_a_refused_kernel_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernel_cases.OPS", wrong("output"))
    monkeypatch.setattr("kernel_plots.main", lambda arguments: None)
    assert main(["--only", "^rms_norm forward .*float32$", "--output", str(tmp_path)]) == 1


def test_a_kernel_that_is_wrong_at_full_size_alone_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernel_cases.OPS", wrong("full size"))
    rows = bench().rows(Case("rms_norm", FORWARD, {"B": 1, "L": 400, "D": 8}, torch.float32))
    (row,) = (row for row in rows if row["peer"] == "torch rms_norm")
    assert row["status"] == "refused"
    assert row["reason"].startswith("y differs")


def test_a_wrong_peer_is_refused_and_a_failing_one_says_why(monkeypatch: pytest.MonkeyPatch):
    def fails(setup: Any) -> Any:
        raise RuntimeError("no such device\nand a long story")

    right = PEERS["rms_norm"]["torch rms_norm"]

    def doubles(setup: Any) -> Any:
        side = right(setup)
        return dataclasses.replace(side, run=lambda: {n: 2 * t for n, t in side.run().items()})

    monkeypatch.setattr("kernel_suite.PEERS", {"rms_norm": {"bad": doubles, "broken": fails, "good": right}})
    ours, bad, broken, good = bench().rows(NORM)
    assert (ours["status"], good["status"], good["repeats"]) == ("measured", "measured", 2)
    assert bad["status"] == "refused"
    assert (broken["status"], broken["reason"]) == ("not measured", "RuntimeError: no such device")


def test_a_peer_is_tuned_again_at_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch):
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    tuner, found = object.__new__(autotuner.Autotuner), []
    tuner.cache = {}
    right = PEERS["rms_norm"]["torch rms_norm"]

    def tuned(setup: Any) -> Any:
        side = right(setup)

        def run() -> Any:
            found.append(tuner.cache.setdefault(("key without sizes",), setup.case.sizes))
            return side.run()

        return dataclasses.replace(side, run=run)

    monkeypatch.setattr("kernel_suite.PEERS", {"rms_norm": {"tuned": tuned}})
    case = Case("rms_norm", FORWARD, {"B": 1, "L": 400, "D": 8}, torch.float32)
    assert bench().rows(case)[1]["status"] == "measured"
    assert found[0] == case.reduced.sizes != case.sizes
    assert len(found) > 1 and all(sizes == case.sizes for sizes in found[1:])


@pytest.mark.parametrize("mode", [FORWARD, EAGER])
def test_a_ratio_is_ours_over_the_peers_and_shares_are_of_the_ceilings(monkeypatch: pytest.MonkeyPatch, mode: str):
    counted = []

    def times(self: Clock, runs: list[Any], launches: bool = False) -> list[list[float]]:
        counted.append(launches)
        return [[2.0, 4.0, 2.0], [4.0, 8.0]][: len(runs)]

    monkeypatch.setattr(Clock, "times", times)
    case = next(case for case in small_cases() if case.mode == mode)
    rows = bench().rows(case)
    needed = cost(case)
    assert rows[0]["seconds"]["median"] == 2.0
    assert rows[0]["fraction_of_copy"] == pytest.approx(needed.bytes / 2.0 / 1e9)
    assert rows[0]["fraction_of_compute"] == pytest.approx(needed.flops / 2.0 / 1e9)
    assert rows[0]["floor_seconds"] == max(needed.bytes, needed.flops) / 1e9
    theirs = [row for row in rows[1:] if row["status"] == "measured"]
    assert theirs
    assert {(row["ratio"]["q1"], row["ratio"]["q3"], row["seconds"]["median"]) for row in theirs} == {(0.5, 0.5, 6.0)}
    assert set(counted) == {mode == EAGER}  # launches count for steps one by one


def test_nothing_is_measured_on_a_device_that_stopped_answering(monkeypatch: pytest.MonkeyPatch):
    def lose(self: Clock) -> None:
        raise RuntimeError("illegal memory access")

    def breaks(setup: Any) -> Any:
        monkeypatch.setattr(Clock, "wait", lose)
        raise RuntimeError("illegal memory access")

    right = PEERS["rms_norm"]["torch rms_norm"]
    monkeypatch.setattr("kernel_suite.PEERS", {"rms_norm": {"breaks": breaks, "next": right}})
    here = bench()
    ours, _, after = here.rows(NORM)
    assert here.lost
    assert ours["status"] == "measured"
    assert after["reason"] == "the device stopped answering before"


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


def simple_gla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float) -> Any:
    return ssd_log_decay_reference(v, g, k, scale * q), None


STAND_INS = (
    module("mamba_ssm"),
    module("selective_scan_cuda", fwd=compat.selective_scan_fn),
    module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=compat.mamba_chunk_scan_combined),
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=compat.selective_scan_fn),
    module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=compat.selective_state_update),
    module(
        "causal_conv1d",
        causal_conv1d_fn=compat.causal_conv1d_fn,
        causal_conv1d_update=compat.causal_conv1d_update,
    ),
    module("fla"),
    module("fla.ops.simple_gla", chunk_simple_gla=simple_gla),
)


@pytest.mark.parametrize("mode", [FORWARD, TRAINING, EAGER])
def test_peers_get_our_numbers_in_their_layout_and_give_theirs_back_in_ours(monkeypatch: pytest.MonkeyPatch, mode: str):
    """The packages' interfaces are known; what stands in for them here computes the same on the CPU."""
    for stand_in in STAND_INS:
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    compared = set()
    for case in (case for case in small_cases() if case.mode == mode and case.sizes.get("L", 0) <= 64):
        setup = prepare(case, CPU)
        expected = reference_results(setup)
        for name, build in PEERS[case.op].items():
            try:
                side = build(setup)
            except NotMeasuredError:
                continue
            results = side.ours(side.run())
            found = error_of(results, expected)
            if found is None:
                assert name == "torch attention"
                continue
            assert found[0] < 1e-5, (case.name, name, found)
            if name != "fla chunk_simple_gla":
                # The floor's gradient of the weights fills the triangle that ours leaves empty.
                other = {"dweight"} if name.startswith("the floor") else set()
                assert results.keys() == expected.keys() - other, (case.name, name)
            compared.add(name)
    if mode == EAGER:
        assert compared == {"mamba_ssm and causal_conv1d", "transformers"}
    else:
        wanted = {"mamba_ssm chunk_size=256", "mamba_ssm selective_scan_cuda", "causal_conv1d channel last"}
        assert compared >= wanted | {"causal_conv1d channel first", "fla chunk_simple_gla", "unfused torch scan"}


def test_a_peer_without_the_function_says_so(monkeypatch: pytest.MonkeyPatch):
    for name in ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, module(name))
    setup = prepare(next(small_cases()), CPU)
    with pytest.raises(NotMeasuredError, match=r"mamba_chunk_scan_combined cannot be imported"):
        PEERS["ssd"]["mamba_ssm chunk_size=256"](setup)


def test_triton_parts_of_mamba_ssm_need_no_cuda_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its release 2.3.2 imports the extension in any case; the peers that call it say what they lack."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (tmp_path / "mamba_ssm" / "some.py").write_text("def op(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert require("mamba_ssm.some", "op").__name__ == "op"
    for name in ("mamba_ssm", "mamba_ssm.some"):
        monkeypatch.delitem(sys.modules, name)
    assert "selective_scan_cuda" not in sys.modules
    setup = prepare(next(case for case in small_cases() if case.op == "selective_scan"), CPU)
    with pytest.raises(NotMeasuredError, match="selective_scan_cuda is not installed"):
        PEERS["selective_scan"]["mamba_ssm selective_scan_cuda"](setup)


def test_a_bad_pattern_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--only", "("])
    assert "must be a regular expression, got '('" in capsys.readouterr().err
