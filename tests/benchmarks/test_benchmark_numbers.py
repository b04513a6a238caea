"""The kernel benchmark's numbers: bytes and FLOPs, errors, times in turn, verdicts and fits."""

from typing import Any

import pytest
import torch
from circumstances import quartiles
from kernel_bars import exponents, judge, report, summarise
from kernel_cases import EAGER, FORWARD, HEADLINE, TRAINING, Case, our_run, prepare, small_cases
from kernel_check import error_of, sampled
from kernel_suite import describe
from kernel_timing import Clock
from roofline import Cost, chunk_state_bytes, cost

CPU = torch.device("cpu")

ROOFLINE = {
    # x, dt 2x3x(4x2 + 4), B and C 2x3x2x5 in two bytes; A, D, dt_bias 3x4 in four; y 2x3x4x2. Scores 3x5 (a chunk of
    # 3), product 4x(3x2), state 4x(4x2x5), skip 4x(2x2) a token.
    "ssd": (
        Case("ssd", FORWARD, {"B": 2, "L": 3, "H": 4, "P": 2, "N": 5, "G": 1}, torch.bfloat16),
        Cost(2 * (72 + 60) + 48 + 96, 6 * (15 + 24 + 160 + 16)),
    ),
    # x, dt, z 3x7, B and C 2x5 for 3 tokens; A 7x5, D, dt_bias 7 in four bytes; y 3x7. 7 a state, 4 a channel.
    "selective_scan": (
        Case("selective_scan", FORWARD, {"B": 1, "L": 3, "D": 7, "N": 5}, torch.bfloat16),
        Cost(2 * (63 + 30) + 4 * 49 + 2 * 21, 3 * 7 * 39),
    ),
    "causal_conv1d": (
        Case("causal_conv1d", FORWARD, {"B": 1, "L": 5, "D": 3, "K": 4}, torch.float32),
        Cost(4 * (15 + 12 + 3 + 15), 15 * 8),
    ),
    "rms_norm": (Case("rms_norm", FORWARD, {"B": 1, "L": 2, "D": 3}, torch.float32), Cost(4 * (6 + 3 + 6), 24)),
    "rms_norm_gated": (
        # Forward x, z, weight, y; backward x, z, weight and dy, and dx, dz, dweight.
        Case("rms_norm_gated", TRAINING, {"B": 1, "L": 2, "D": 3}, torch.bfloat16),
        Cost(2 * (12 + 3 + 6) + 2 * (12 + 3 + 6 + 12 + 3), 3 * 30),
    ),
    "add_rms_norm": (
        # Forward x, residual, weight, normed, total; backward the gradients of both, total, and the one of x.
        Case("add_rms_norm", TRAINING, {"B": 1, "L": 2, "D": 3}, torch.bfloat16),
        Cost(2 * (12 + 3 + 12) + 2 * 24, 3 * 30),
    ),
    # 3x2 + 2x5 = 16 channels; states 3x2x5 in four bytes and 16x3; weights 16x5, A, D, dt_bias; xBC, dt, y.
    "decode": (
        Case("decode", EAGER, {"B": 1, "H": 3, "P": 2, "N": 5, "G": 1}, torch.bfloat16),
        Cost(2 * (120 + 96) + 160 + 36 + 2 * (16 + 3) + 2 * 6, 8 * 16 + 3 * (50 + 6)),
    ),
}


@pytest.mark.parametrize(("case", "expected"), ROOFLINE.values(), ids=ROOFLINE)
def test_bytes_and_flops_are_those_counted_by_hand(case: Case, expected: Cost):
    assert cost(case) == expected


@pytest.mark.parametrize("case", list(small_cases()), ids=lambda case: case.name)
def test_counted_inputs_and_outputs_are_the_tensors_of_the_case(case: Case):
    if case.mode not in (FORWARD, EAGER):
        return
    setup = prepare(case, CPU)
    # Only our kernel counts arrivals.
    inputs = [tensor for name, tensor in setup.inputs.items() if name != "arrivals"]
    tensors = [*inputs, *our_run(setup)().values()]
    # Weights above the diagonal are not read.
    unread = case.sizes["H"] * case.sizes["L"] * (case.sizes["L"] - 1) // 2 if case.op == "masked_mix" else 0
    elements = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert cost(case).bytes == elements - unread * case.dtype.itemsize


def test_states_between_chunks_are_counted():
    sizes = {"B": 2, "L": 65, "H": 3, "P": 2, "N": 5, "G": 1}
    assert chunk_state_bytes(Case("ssd", FORWARD, sizes, torch.bfloat16)) == 2 * 2 * 3 * 10 * 2
    assert chunk_state_bytes(Case("ssd", TRAINING, sizes, torch.bfloat16)) == 2 * 2 * 2 * 3 * 10 * 2
    scan = {"B": 2, "L": 33, "D": 3, "N": 5}
    assert chunk_state_bytes(Case("selective_scan", FORWARD, scan, torch.bfloat16)) == 0
    assert chunk_state_bytes(Case("selective_scan", TRAINING, scan, torch.bfloat16)) == 2 * 2 * 3 * 5 * 4


def test_only_results_that_both_have_are_compared_and_shapes_count():
    one = torch.ones(3)
    assert error_of({"y": one}, {"z": one}) is None
    assert error_of({"y": one, "z": 0 * one}, {"y": one}) == (0.0, "y")
    assert error_of({"y": one + torch.tensor([0, 0, 0.5])}, {"y": 2 * one}) == (0.5, "y")
    assert error_of({"y": one}, {"y": torch.ones(1)}) == (float("inf"), "y")
    assert error_of({"y": one * torch.nan}, {"y": one}) == (float("inf"), "y")


def test_a_sample_reaches_all_over_a_result():
    grid = torch.arange(1024 * 256.0).view(256, 1024).t()
    entries = sampled({"y": grid})["y"]
    assert 2**15 <= len(entries) <= 2**17
    assert {int(value) // 1024 for value in entries} == set(range(256))
    assert len({int(value) % 1024 for value in entries}) == 1024


def test_sides_are_timed_in_turn_and_the_slow_one_less_often(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    now = 0.0

    def clock() -> float:
        return now

    def run(name: str, seconds: float) -> Any:
        def call() -> dict[str, torch.Tensor]:
            nonlocal now
            now += seconds
            calls.append(name)
            return {}

        return call

    monkeypatch.setattr("time.perf_counter", clock)
    fast, slow = Clock(CPU, seconds=4.0, rounds=(2, 100)).times([run("fast", 1.0), run("slow", 3.0)])
    assert calls[-6:] == ["fast", "slow", "fast", "slow", "fast", "fast"]
    assert (fast, slow) == ([1.0] * 4, [3.0] * 2)
    assert quartiles([1.0, 2.0, 3.0]) == {"q1": 1.5, "median": 2.0, "q3": 2.5}
    assert quartiles([1.0]) == {"q1": 1.0, "median": 1.0, "q3": 1.0}


def row(op: str, mode: str, sizes: dict[str, int], peer: str | None, **fields: Any) -> dict[str, Any]:
    case = Case(op, mode, sizes, torch.bfloat16)
    made = describe(case, peer, full=True) | {"status": "measured", "reason": None} | fields
    return made | {"bars": judge(made)}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.6, "pass"), (0.3, "pass"), (0.61, "fail")], ids=["on the bar", "below", "above"]
)
def test_a_ratio_is_judged_by_its_median(ratio: float, verdict: str):
    made = row("ssd", FORWARD, HEADLINE, "mamba_ssm chunk_size=128", ratio={"q1": 0.1, "median": ratio, "q3": 9.0})
    (bar,) = made["bars"]
    assert (bar["bar"], bar["limit"], bar["stretch"]) == ("SSD forward / mamba_ssm", 0.6, 0.35)
    assert (bar["value"], bar["verdict"]) == (ratio, verdict)


@pytest.mark.parametrize(("fraction", "verdict"), [(0.79, "fail"), (0.8, "pass"), (0.95, "pass")])
def test_a_share_of_the_copy_has_to_be_reached(fraction: float, verdict: str):
    made = row("rms_norm", FORWARD, {"B": 8, "L": 2048, "D": 4096}, None, fraction_of_copy=fraction)
    assert [bar["verdict"] for bar in made["bars"]] == [verdict]


def test_the_report_takes_the_peers_fastest_setting_and_names_what_is_missing():
    ratios = {"mamba_ssm chunk_size=128": 0.7, "mamba_ssm chunk_size=256": 0.5}
    rows = [
        row(
            "ssd",
            FORWARD,
            HEADLINE,
            peer,
            ratio=dict.fromkeys(("q1", "median", "q3"), ratio),
            seconds={"median": 1.0},
            error=None,
        )
        for peer, ratio in ratios.items()
    ]
    rows.append(row("ssd", FORWARD, HEADLINE, "mamba_ssm chunk_size=64", status="not measured", reason="out of memory"))
    rows.append(row("ssd", FORWARD, HEADLINE, None, status="refused", reason="y differs", memory_ratio=None))
    for order in (rows, rows[::-1]):
        speed, memory = summarise(order)
        assert (speed["value"], speed["verdict"]) == (0.7, "fail")
        assert (memory["value"], memory["verdict"]) == (None, "fail")
    text = report(rows)
    assert "| 0.700 | <= 0.6 (stretch 0.35) | fail |" in text
    assert "fail: y differs" in text


def test_exponents_are_fitted_over_the_long_lengths_of_each_shape():
    rows = []
    for length in (256, 8192, 32768, 131072):
        seconds = {"median": 1e-9 * length**1.5 if length > 256 else 1.0}
        sizes = {**HEADLINE, "L": length}
        rows.append(row("ssd", FORWARD, sizes, None, seconds=seconds, peak_bytes=7 * length, memory_ratio=1.0))
    (fit,) = exponents(rows)
    assert fit["lengths"] == [8192, 32768, 131072]
    assert fit["time"] == pytest.approx(1.5)
    assert fit["memory"] == pytest.approx(1.0)
    assert "| ssd forward B1 H128 P64 N128 G1 bfloat16 | 1.500 | 1.000 |" in report(
        [made | {"error": None} for made in rows]
    )
