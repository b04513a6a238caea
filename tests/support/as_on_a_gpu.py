"""Calls as they run on a CUDA device, without one: tensors without values, and launches that do nothing."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ssm_zoo.kernels import checks, tracing
from ssm_zoo.kernels._triton import triton

# What a call raises that reads a value, or makes a tensor whose shape depends on values: it waits for the device.
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def replace(monkeypatch: pytest.MonkeyPatch, original: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Let all files of the package use another function."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ssm_zoo.") and getattr(module, original.__name__, None) is original:
            monkeypatch.setattr(module, original.__name__, other)


@contextlib.contextmanager
def as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], launch: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """Yield arguments without values, which ops treat as CUDA tensors; `launch` takes the place of every launch.

    They say that they are on the CPU: without CUDA, torch cannot index tensors that say otherwise.
    """

    def choose(implementation: str, name: str, x: Tensor, supports: bool = True, traceable: bool = False) -> str:
        return "triton" if supports and (traceable or not checks.tracing()) else "torch"

    replace(monkeypatch, checks.choose_implementation, choose)
    replace(monkeypatch, tracing.host_reads, lambda tensor: False)
    for kind in (triton.runtime.JITFunction, triton.runtime.interpreter.InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: launch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
