"""The Triton convolution: the spans of tokens that its programs walk over, and its activation where that saturates."""

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels import causal_conv1d_triton
from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from tolerances import TOLERANCES
from with_triton import NEEDS_TRITON, with_triton

pytestmark = NEEDS_TRITON


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("layout", [None, [[-1] + [0] * 17 + [1] * 15 + [2, -1, 2, 3]]], ids=["plain", "packed"])
def test_spans_change_nothing_but_the_order_of_sums(
    layout: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 37, 3), "weight": (3, 4), "bias": (3,), "initial_state": (1, 3, 3)}
    values = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    seq_idx = None if layout is None else torch.tensor(layout)
    results: list[dict[str, Tensor]] = []
    for tokens in (16, 64):
        for choices in ("_SPANS", "_BACKWARD_SPANS"):
            monkeypatch.setattr(causal_conv1d_triton, choices, (tokens,))
        y, state = with_triton(causal_conv1d)(**values, activation="silu", seq_idx=seq_idx, return_final_state=True)
        gradients = torch.autograd.grad((y.sin().sum() + state.cos().sum()), list(values.values()))
        results.append({"y": y, "state": state} | dict(zip(values, gradients, strict=True)))
    for name, short in results[0].items():
        if name in ("weight", "bias"):
            close(short, results[1][name], f"d{name}")
        else:
            assert torch.equal(short, results[1][name]), name


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        pytest.param((8, 2048, 4352), torch.bfloat16, ((17 * 8 * 16,), 16, 128, 256), id="enough-programs"),
        pytest.param((1, 2048, 4352), torch.bfloat16, ((17 * 64,), 64, 32, 256), id="shortest-spans"),
        pytest.param((8, 512, 4096), torch.float32, ((32 * 8 * 8,), 8, 64, 128), id="just-enough"),
        pytest.param((2, 33, 257), torch.float16, ((2 * 2 * 2,), 2, 32, 256), id="ragged"),
    ],
)
def test_spans_are_short_where_programs_are_few(
    shape: tuple[int, ...], dtype: torch.dtype, expected: tuple[object, ...]
) -> None:
    """Grid, spans of a row, tokens of each, channels of a program."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert causal_conv1d_triton._spans(x, causal_conv1d_triton._BACKWARD_SPANS) == expected


def test_saturated_activation() -> None:
    """Where the exponential overflows, silu is the input or 0, and its slope 1 or 0."""
    x = torch.tensor([-1e4, -200.0, -100.0, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4])[None, :, None].requires_grad_()
    y = with_triton(causal_conv1d)(x, torch.tensor([[0.0, 1.0]]), activation="silu")
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    close(y, expected, "y")
    close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), exact)[0], "dx")
