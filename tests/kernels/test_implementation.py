"""Which implementation an op takes, and what is said where one cannot be had."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssm_zoo.kernels import checks
from ssm_zoo.kernels.checks import choose_implementation

X = torch.zeros(2)


def on_cuda(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A CUDA tensor without memory, on any machine."""
    with FakeTensorMode():
        return torch.empty(2, dtype=dtype, device="cuda:0")


@pytest.fixture(autouse=True)
def triton_is_installed_and_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", False)


def test_auto_is_triton_on_cuda_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_implementation("auto", "op", on_cuda()) == "triton"
    assert choose_implementation("auto", "op", on_cuda(), supports_triton=False) == "torch"
    assert choose_implementation("auto", "op", on_cuda(torch.float64)) == "torch"
    assert choose_implementation("auto", "op", X) == "torch"
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    assert choose_implementation("auto", "op", on_cuda()) == "torch"


def test_auto_is_torch_on_a_cpu_that_could_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "INTERPRETED", True)
    assert choose_implementation("auto", "op", X) == "torch"
    assert choose_implementation("triton", "op", X) == "triton"


def test_what_is_asked_for_is_taken() -> None:
    assert choose_implementation("triton", "op", on_cuda()) == "triton"
    assert choose_implementation("torch", "op", on_cuda()) == "torch"
    assert choose_implementation("torch", "op", X) == "torch"


@pytest.mark.parametrize(
    ("implementation", "dtype", "supports_triton", "message"),
    [
        pytest.param("fast", None, True, " of op must be 'auto', 'torch' or 'triton', got 'fast'$", id="unknown"),
        pytest.param("triton", None, False, "='triton' of op is not available for these arguments", id="arguments"),
        pytest.param(
            "triton", torch.float64, True, "=.* does not support torch.float64. Pass .*'torch'.$", id="float64"
        ),
        pytest.param("triton", None, True, "=.* needs CUDA tensors, got one on cpu. Pass .*'torch'.$", id="cpu"),
    ],
)
def test_what_cannot_be_had_raises(
    implementation: str, dtype: torch.dtype | None, supports_triton: bool, message: str
) -> None:
    with pytest.raises(ValueError, match="implementation" + message):
        choose_implementation(implementation, "op", X.to(dtype), supports_triton)


def test_triton_that_is_not_installed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"needs Triton, which is not installed\. Pass 'auto' or 'torch'"):
        choose_implementation("triton", "op", on_cuda())
