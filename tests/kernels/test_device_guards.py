"""Every Triton kernel is launched on the device of its tensors, which need not be the current one."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_ops import INTEGERS, OPS
from torch import Tensor

from ssm_zoo.kernels import selective_scan_triton
from with_triton import DEVICE, NEEDS_TRITON, moved

IMPLEMENTED = [key for key, op in OPS.items() if "implementation" in inspect.signature(op.op).parameters]


@NEEDS_TRITON
@pytest.mark.parametrize("key", IMPLEMENTED)
def test_every_launch_of_an_op_and_its_gradient_is_guarded(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guards, launches = [], []
    guard, kernels = torch.cuda.device_of, type(selective_scan_triton.forward_kernel)
    launch = kernels.run

    @contextlib.contextmanager
    def counted(tensor: Tensor) -> Iterator[None]:
        guards.append(tensor.device)
        with guard(tensor):
            yield
        guards.pop()

    def recorded(kernel: Any, *arguments: Any, **options: Any) -> Any:
        launches.append((kernel.__name__, bool(guards)))
        return launch(kernel, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", counted)
    monkeypatch.setattr(kernels, "run", recorded)
    op, trained = OPS[key], not key.endswith("_step")
    values = {name: moved(value, DEVICE) for name, value in op.arguments().items()}
    for name, value in values.items():
        if trained and isinstance(value, Tensor) and name not in INTEGERS:
            value.requires_grad_()
    results = op.op(**values, implementation="triton")
    if trained:
        results = results if isinstance(results, tuple) else (results,)
        sums = [each.sum() for each in results if isinstance(each, Tensor) and each.requires_grad]
        torch.stack(sums).sum().backward()
    assert launches and all(guarded for _, guarded in launches), launches
