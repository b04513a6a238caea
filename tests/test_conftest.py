"""The shared fixtures do what the tests that use them rely on."""

import os

import pytest
import torch


@pytest.mark.usefixtures("poisoned_empty")
def test_poisoned_empty_fills_every_way_to_allocate():
    base = torch.zeros(2, 3)
    floats = (
        torch.empty(2, 3),
        torch.empty_like(base),
        torch.empty_strided((2, 3), (3, 1)),
        base.new_empty(2, 3),
        base.new_empty_strided((2, 3), (3, 1)),
        torch.empty(2, 3, dtype=torch.bfloat16, requires_grad=True),
    )
    for tensor in floats:
        assert tensor.shape == (2, 3)
        assert tensor.isnan().all()
    assert floats[-1].requires_grad
    assert floats[-1].is_leaf
    assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(4, dtype=torch.bool).all()


def test_triton_is_interpreted_without_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, the kernels run natively")
    assert os.environ["TRITON_INTERPRET"] == "1"
