"""Bad arguments of the selective scan and its step raise a ValueError that names them, and change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from with_triton import NEEDS_TRITON

BAD = [
    pytest.param({"x": torch.zeros(2, 5, 4, 1)}, r"x must be \(B, L, D\)", id="x-4d"),
    pytest.param({"x": torch.zeros(2, 0, 4)}, "x must hold at least one token", id="no-token"),
    pytest.param({"x": torch.zeros(2, 5, 4).long()}, "x must .*floating", id="x-integer"),
    pytest.param({"dt": torch.zeros(2, 5, 1)}, r"dt must .*\(2, 5, 4\), got shape \(2, 5, 1\)", id="dt"),
    pytest.param({"A": torch.zeros(4)}, r"A must be \(D, N\) = \(4, any\)", id="A-vector"),
    pytest.param({"A": torch.zeros(3, 6)}, r"A must be \(D, N\) = \(4, any\), got shape \(3, 6\)", id="A-channels"),
    pytest.param({"B": torch.zeros(2, 5, 6)}, r"B must be \(B, L, G, N\)", id="B-without-groups"),
    pytest.param({"B": torch.zeros(2, 4, 2, 6)}, r"B must be \(B, L, G, N\)", id="B-length"),
    pytest.param({"B": torch.zeros(2, 5, 2, 7)}, r"B must .*got shape \(2, 5, 2, 7\)", id="B-state-size"),
    pytest.param({"B": torch.zeros(2, 5, 3, 6)}, "B: the number of groups must divide the 4 .*got 3", id="groups"),
    pytest.param({"C": torch.zeros(2, 5, 1, 6)}, r"C must .*got shape \(2, 5, 1, 6\)", id="C-groups"),
    pytest.param({"D": torch.zeros(3)}, r"D must be \(D\) = \(4\), got shape \(3,\)", id="D"),
    pytest.param({"dt_bias": torch.zeros(1)}, r"dt_bias must be \(D\) = \(4\)", id="dt_bias"),
    pytest.param({"z": torch.zeros(2, 5, 1)}, r"z must be .*\(2, 5, 4\)", id="z-broadcast"),
    pytest.param({"initial_state": torch.zeros(2, 6, 4)}, r"initial_state must .*\(2, 4, 6\)", id="state"),
    pytest.param({"seq_idx": torch.zeros(2, 4).long()}, r"seq_idx must .*\(2, 5\)", id="seq-shape"),
    pytest.param({"seq_idx": torch.zeros(2, 5)}, "seq_idx must .*integer", id="seq-float"),
    pytest.param(
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1], [0, 2, -1, 1, 2]])},
        "seq_idx must .*decreas",
        id="seq-decreasing",
    ),
    pytest.param({"D": torch.zeros(4, device="meta")}, "D must be on the device of x, cpu, got meta", id="device"),
]
BAD_OPTIONS = [
    pytest.param("cuda", torch.float32, "implementation='cuda' .*'auto', 'torch', 'triton'", id="unknown"),
    pytest.param("triton", torch.float64, "takes no torch.float64", id="float64", marks=NEEDS_TRITON),
]


def valid(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments that are accepted: B 2, L 5, D 4, G 2, N 6."""
    return {
        "x": torch.zeros(2, 5, 4, dtype=dtype),
        "dt": torch.zeros(2, 5, 4, dtype=dtype),
        "A": -torch.ones(4, 6, dtype=dtype),
        "B": torch.zeros(2, 5, 2, 6, dtype=dtype),
        "C": torch.zeros(2, 5, 2, 6, dtype=dtype),
    }


def token(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: value if name == "A" else value[:, 0] for name, value in valid(dtype).items()}


@pytest.mark.parametrize("op", [selective_scan, selective_scan_reference])
def test_the_base_of_these_tests_is_accepted(op: Callable[..., Any]) -> None:
    assert op(**valid()).shape == (2, 5, 4)
    assert selective_scan_step(torch.zeros(2, 4, 6), **token()).shape == (2, 4)


@pytest.mark.parametrize("op", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_raises(op: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**(valid() | change))


@pytest.mark.parametrize(("implementation", "dtype", "message"), BAD_OPTIONS)
def test_bad_implementations_raise(implementation: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**valid(dtype), implementation=implementation)
    state = torch.ones(2, 4, 6, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        selective_scan_step(state, **token(dtype), implementation=implementation)
    assert (state == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.zeros(2, 5, 4)}, r"x must be \(B, D\)", id="x-3d"),
        pytest.param({"x": torch.zeros(2, 3)}, r"dt must be \(B, D\) = \(2, 3\)", id="x-channels"),
        pytest.param({"dt": torch.zeros(2, 1)}, r"dt must be \(B, D\) = \(2, 4\), got shape \(2, 1\)", id="dt"),
        pytest.param({"dt": torch.zeros(2)}, r"dt must be \(B, D\) = \(2, 4\), got shape \(2,\)", id="dt-vector"),
        pytest.param({"A": torch.zeros(4, 5)}, r"B must be \(B, G, N\) = \(2, any, 5\)", id="A"),
        pytest.param({"B": torch.zeros(2, 6)}, r"B must be \(B, G, N\)", id="B-without-groups"),
        pytest.param({"B": torch.zeros(2, 3, 6)}, "B: .* groups must divide", id="groups"),
        pytest.param({"C": torch.zeros(2, 2, 5)}, r"C must be \(B, G, N\) = \(2, 2, 6\)", id="C"),
        pytest.param({"z": torch.zeros(1, 4)}, r"z must be \(B, D\) = \(2, 4\)", id="z"),
    ],
)
def test_bad_step_input_raises_and_leaves_the_state(change: dict[str, Any], message: str) -> None:
    state = torch.ones(2, 4, 6)
    with pytest.raises(ValueError, match=message):
        selective_scan_step(state, **(token() | change))
    assert (state == 1).all()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(torch.ones(2, 4, 5), r"state must be \(B, D, N\) = \(2, 4, 6\)", id="shape"),
        pytest.param(torch.ones(2, 4, 6).bfloat16(), "state must be float32 or float64, got torch.bfloat16", id="half"),
    ],
)
def test_bad_states_raise(state: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan_step(state, **token())
    assert (state == 1).all()
