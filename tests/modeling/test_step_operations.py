"""A step of decoding on the CPU is as long as its operations are many: what checks may add to them."""

from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from ssm_zoo.kernels.rms_norm import rms_norm
from ssm_zoo.modeling.layers import LayerNorm


class Counted(TorchDispatchMode):
    """The operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "taipan", "mixer", "mamba2-full"])
def test_a_mask_without_padding_adds_two_operations_to_a_step(name: str) -> None:
    model = make_model(name)
    steps = []
    with torch.no_grad():
        for mask in (None, torch.ones(1, 9, dtype=torch.long)):
            cache = DynamicCache(config=model.config)
            model(draw_ids(1, 8), cache=cache)
            with Counted() as counted:
                model(draw_ids(1, 1), attention_mask=mask, cache=cache)
            steps.append(counted.operations)
    assert set(steps[1]) - set(steps[0]) <= {"aten::min", "aten::_local_scalar_dense"}
    assert len(steps[1]) <= len(steps[0]) + 2


def test_norms_without_gradients_notice_an_overflow_in_one_operation() -> None:
    x, weight = torch.ones(1, 1, 8), torch.ones(8)
    with torch.no_grad():
        with Counted() as counted:
            rms_norm(x, weight, 1e-5)
        square_root = ["aten::add_.Tensor", "aten::nan_to_num_", "aten::rsqrt_"]
        norm = ["aten::pow.Tensor_Scalar", "aten::mean.dim", *square_root, "aten::mul.Tensor", "aten::mul_.Tensor"]
        assert counted.operations == norm
        layer_norm = LayerNorm(8)
        with Counted() as counted:
            layer_norm(x)
    without_views = [name for name in counted.operations if name not in ("aten::detach", "aten::alias")]
    assert without_views == ["aten::native_layer_norm", "aten::addcdiv_"]


def test_a_norm_without_gradients_has_the_bits_of_one_with_them_and_leaves_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, z = (torch.randn(2, 3, 8, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(8, generator=generator).to(dtype)
        for options in ({}, {"z": z}, {"z": z, "group_size": 4}, {"z": z, "norm_before_gate": True}, {"group_size": 2}):
            before = x.clone(), z.clone()
            plain = rms_norm(x, weight, 1e-5, **options)
            assert torch.equal(x, before[0]) and torch.equal(z, before[1])
            recorded = rms_norm(x.clone().requires_grad_(), weight, 1e-5, **options)
            assert recorded.requires_grad and not plain.requires_grad
            assert torch.equal(plain, recorded)
