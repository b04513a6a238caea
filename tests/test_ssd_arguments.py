"""Bad arguments of the SSD ops and steps raise a ValueError that names them, and change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssm_zoo.kernels.ssd import (
    ssd,
    ssd_log_decay,
    ssd_log_decay_reference,
    ssd_reference,
)
from ssm_zoo.kernels.ssd_step import ssd_log_decay_step, ssd_step

FORMS = ["dt", "log_decay"]
OPS: dict[str, dict[str, Callable[..., Any]]] = {
    "dt": {"reference": ssd_reference, "torch": ssd},
    "log_decay": {"reference": ssd_log_decay_reference, "torch": ssd_log_decay},
}

BAD = [
    pytest.param({"x": torch.zeros(2, 5, 4)}, r"x must be \(B, L, H, P\)", id="x-3d"),
    pytest.param({"x": torch.zeros(2, 0, 4, 3)}, "x must hold at least one token", id="no-token"),
    pytest.param({"x": torch.zeros(2, 5, 4, 3).long()}, "x must .*floating", id="x-integer"),
    pytest.param({"DECAY": torch.zeros(2, 5, 3)}, r"DECAY must .*\(2, 5, 4\), got shape \(2, 5, 3\)", id="decay-heads"),
    pytest.param({"DECAY": torch.zeros(2, 5, 4).int()}, "DECAY must .*floating", id="decay-integer"),
    pytest.param({"B": torch.zeros(2, 4, 2, 6)}, r"B must be \(B, L, G, N\)", id="B-length"),
    pytest.param({"C": torch.zeros(2, 5, 2, 7)}, r"C must .*got shape \(2, 5, 2, 7\)", id="C-state-size"),
    pytest.param({"C": torch.zeros(2, 5, 1, 6)}, r"C must .*got shape \(2, 5, 1, 6\)", id="C-groups"),
    pytest.param(
        {"B": torch.zeros(2, 5, 3, 6), "C": torch.zeros(2, 5, 3, 6)},
        "groups must divide .* 4 .*got 3",
        id="groups",
    ),
    pytest.param({"D": torch.zeros(3)}, r"D must be .*\(4\) or \(4, 3\), got shape \(3,\)", id="D"),
    pytest.param({"z": torch.zeros(2, 5, 4, 1)}, r"z must be .*\(2, 5, 4, 3\)", id="z-broadcast"),
    pytest.param({"initial_state": torch.zeros(2, 4, 6, 3)}, r"initial_state must .*\(2, 4, 3, 6\)", id="state"),
    pytest.param({"seq_idx": torch.zeros(2, 4).long()}, r"seq_idx must .*\(2, 5\)", id="seq-shape"),
    pytest.param({"seq_idx": torch.zeros(2, 5)}, "seq_idx must .*integer", id="seq-float"),
    pytest.param(
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1], [0, 2, -1, 1, 2]])},
        "seq_idx must .*decreas",
        id="seq-decreasing",
    ),
]


def valid(form: str) -> dict[str, Any]:
    """Arguments that are accepted: B 2, L 5, H 4, P 3, G 2, N 6."""
    base = {"x": torch.zeros(2, 5, 4, 3), "B": torch.zeros(2, 5, 2, 6), "C": torch.zeros(2, 5, 2, 6)}
    base[form] = torch.zeros(2, 5, 4)
    return base | ({"A": -torch.ones(4)} if form == "dt" else {})


@pytest.mark.parametrize("op", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_the_base_of_these_tests_is_accepted(form: str, op: str) -> None:
    assert OPS[form][op](**valid(form)).shape == (2, 5, 4, 3)


@pytest.mark.parametrize("op", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_raises(form: str, op: str, change: dict[str, Any], message: str) -> None:
    change = {name.replace("DECAY", form): value for name, value in change.items()}
    with pytest.raises(ValueError, match=message.replace("DECAY", form)):
        OPS[form][op](**(valid(form) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"A": torch.ones(1)}, r"A must be \(H\) = \(4\)", id="A"),
        pytest.param({"dt_bias": torch.ones(2, 4)}, r"dt_bias must be \(H\) = \(4\)", id="dt_bias"),
        pytest.param({"chunk_size": 0}, "chunk_size must be at least 1, got 0", id="chunk"),
        pytest.param(
            {"x": torch.zeros(2, 5, 4, 3, dtype=torch.float64), "implementation": "triton"},
            "implementation='triton' of ssd.* accepted: 'auto', 'torch'$",
            id="triton",
        ),
        pytest.param({"implementation": "cuda"}, "implementation='cuda' .*'auto', 'torch'", id="unknown"),
    ],
)
def test_bad_options_raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**(valid("dt") | change))
    if not {"A", "dt_bias"} & set(change):
        with pytest.raises(ValueError, match=message):
            ssd_log_decay(**(valid("log_decay") | change))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.zeros(2, 4, 2)}, r"x must .*\(2, 4, 3\)", id="x"),
        pytest.param({"DECAY": torch.zeros(2, 1)}, r"DECAY must be \(B, H\) = \(2, 4\)", id="decay"),
        pytest.param({"B": torch.zeros(2, 2, 5)}, r"B must be \(B, G, N\)", id="B"),
        pytest.param({"C": torch.zeros(2, 3, 6)}, "C.* groups must divide", id="groups"),
        pytest.param({"implementation": "triton"}, "implementation='triton' .*'auto', 'torch'", id="triton"),
    ],
)
def test_bad_step_input_raises_and_leaves_the_state(form: str, change: dict[str, Any], message: str) -> None:
    base = valid(form)
    arguments = {name: value if name == "A" else value[:, 0] for name, value in base.items()}
    arguments |= {name.replace("DECAY", form): value for name, value in change.items()}
    state = torch.ones(2, 4, 3, 6)
    with pytest.raises(ValueError, match=message.replace("DECAY", form)):
        (ssd_step if form == "dt" else ssd_log_decay_step)(state, **arguments)
    assert (state == 1).all()
