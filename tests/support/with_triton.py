"""Ops by their Triton kernels: on the CUDA device where there is one, interpreted on the CPU otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_zoo.kernels._triton import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def with_triton(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with `implementation="triton"`, its tensors moved to the device and its results moved back.

    Gradients follow both ways. An argument that the op changes in place is not copied back.
    """

    def run(*args: Any, **options: Any) -> Any:
        args = tuple(moved(value, DEVICE) for value in args)
        options = {name: moved(value, DEVICE) for name, value in options.items()}
        result = op(*args, **options, implementation="triton")
        return tuple(moved(part, "cpu") for part in result) if isinstance(result, tuple) else moved(result, "cpu")

    return run


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
