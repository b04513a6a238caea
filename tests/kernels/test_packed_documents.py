"""Packed documents equal separate ones, for every op of the table that takes `seq_idx` and wherever a document ends.

A batch holds every place: row i has documents of i + 1, one and the remaining tokens, the last of which may be none.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_ops import OPS
from torch import Tensor

from ssm_zoo.kernels import selective_scan as selective_scan_torch
from ssm_zoo.kernels import selective_scan_triton
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

L = 19  # a chunk of SSD, which has at least 16 tokens, and a rest; two chunks and a rest of the selective scan
ROWS = L - 1
LETTERS = {"L": L, "B": ROWS, "H": 4, "P": 2, "G": 1, "N": 3, "K": 4, "J": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "ssd": {"chunk_size": 16, "dt_softplus": True},
    "ssd_log_decay": {"chunk_size": 16},
    "selective_scan": {"dt_softplus": True},
    "causal_conv1d": {"activation": "silu"},
    "bounded_attention": {"window": 4, "slots": [2], "sinks": 1, "chunk_size": 4},
}
# An op without `index` has the outputs of whole rows.
PACKED = [
    name
    for name, op in OPS.items()
    if "seq_idx" in op.tensors and "index" not in op.tensors and "implementation" in inspect.signature(op.op).parameters
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan_torch, "_CHUNK", 8)
    monkeypatch.setattr(selective_scan_triton, "_SPAN", 8)
    monkeypatch.setattr(selective_scan_triton, "_SHORTEST_SEGMENT", 8)
    monkeypatch.setattr(selective_scan_triton, "_FEWEST_SEGMENTS", 2)


def draw(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of order 1; parameters and states of a recurrence stay float32 in half precision, as in a model."""
    generator = torch.Generator().manual_seed(0)
    letters = LETTERS | ({"N": L} if name in ("masked_mix", "toeplitz_mix") else {})
    shapes = {key: [letters[each] for each in shape] for key, shape in OPS[name].tensors.items() if key != "seq_idx"}
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    values = {key: -value.exp() if key in ("A", "log_decay") else value for key, value in drawn.items()}
    kept = () if name == "causal_conv1d" else ("A", "D", "dt_bias", "initial_state")
    return {key: value if key in kept else value.to(dtype) for key, value in values.items()}


def separately(op: Callable[..., Any], seq_idx: Tensor, **arguments: Any) -> Any:
    """Every document of every row by a call of its own; the initial state goes to a row's first.

    The result is the op's: with the final state if that is asked for.
    """
    outputs, states = [], []
    for row in range(ROWS):
        parts = []
        for document in seq_idx[row].unique():
            tokens = (seq_idx[row] == document).nonzero().flatten()
            token = slice(int(tokens[0]), int(tokens[-1]) + 1)
            given = {
                key: value[row : row + 1, token]
                if isinstance(value, Tensor) and value.shape[:2] == (ROWS, L)
                else value
                for key, value in arguments.items()
            }
            if "initial_state" in given:
                initial = given.pop("initial_state")[row : row + 1]
                if token.start == 0:
                    given["initial_state"] = initial
            result = op(**given)
            y, state = result if isinstance(result, tuple) else (result, None)
            state = state if isinstance(state, Tensor) else None
            parts.append(y)
        outputs.append(torch.cat(parts, dim=1))
        states.append(state)
    y = torch.cat(outputs)
    return y if states[0] is None else (y, torch.cat(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_equal_separate_ones(name: str, implementation: str, dtype: torch.dtype) -> None:
    op = partial(OPS[name].op, **OPTIONS.get(name, {}))
    seq_idx = torch.tensor([[0] * (row + 1) + [1] + [2] * (L - row - 2) for row in range(ROWS)])
    packed = with_triton(op) if implementation == "triton" else partial(op, implementation="torch")
    results = []
    asked = {"return_final_state": True} if "initial_state" in OPS[name].tensors else {}
    for function, exact in ((packed, False), (partial(separately, op), True)):
        values = draw(name, dtype)
        given = {key: (value.double() if exact else value).requires_grad_() for key, value in values.items()}
        found = function(**given, seq_idx=seq_idx, **asked)
        parts = found if isinstance(found, tuple) else (found,)
        outputs = {key: part for key, part in zip(("y", "state"), parts, strict=False) if isinstance(part, Tensor)}
        generator = torch.Generator().manual_seed(1)
        loss = sum((part.double() * torch.randn(part.shape, generator=generator)).sum() for part in outputs.values())
        gradients = torch.autograd.grad(loss, list(given.values()))
        results.append(outputs | dict(zip(given, gradients, strict=True)))
    for key, expected in results[1].items():
        actual = results[0][key].double()
        if dtype == torch.float32 or key == "state":
            rtol, atol = TOLERANCES[results[0][key].dtype]
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )
        else:
            error = (actual - expected).norm() / expected.norm()
            assert error < TOLERANCES[dtype][0] / 2, f"{key}: relative error {error:.1e}"
