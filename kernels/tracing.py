"""Support for tracing the ops by torch.compile, torch.export or torch.jit.trace.

A traced graph is reused for other values and lengths than those it was traced with. During tracing, therefore, no code
may depend on a value (e.g. a check, or a shortcut for masks without padding), and no Python loop on a length. Most
torch paths have a second form for tracing: a few dense operations that the compiler fuses and differentiates. For the
two scans such a form would be slow, so :func:`opaque` registers each as an operator, a single node of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tracing() -> bool:
    """Return whether a graph is being traced."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()  # the latter is torch.jit.is_tracing


def host_reads(tensor: Tensor) -> bool:
    """Return whether values can be read without waiting for a device; false while a graph is traced."""
    return tensor.device.type == "cpu" and not tracing()


class _Context:
    """Context for an autograd function that is called without autograd."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: an operator always receives all gradients."""


def opaque(
    function: type[torch.autograd.Function],
    name: str,
    arguments: str,
    fake: Callable[..., tuple[Tensor, ...]],
    results: int = 2,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register an autograd function with several results as an operator, a single node of a traced graph.

    The operator saves its inputs only; its backward, also an operator, runs the forward again. Operators are named
    after the module of `function`, so that the package and any number of exported copies can coexist in one process.

    Args:
        function: autograd function.
        name: name of the operator.
        arguments: arguments of `function.forward` in the syntax of operator schemas.
        fake: function that takes the arguments and returns empty contiguous results of the right shapes and dtypes.
        results: number of results, at least two.

    Returns:
        Function of the same arguments that calls the operator.
    """
    qualified = f"{re.sub(r'[^0-9a-zA-Z_]', '_', function.__module__)}::{name}"

    returned = ", ".join(["Tensor"] * results)

    @torch.library.custom_op(qualified, mutates_args=(), schema=f"({arguments}) -> ({returned})")
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            found = function.forward(_Context((False,) * len(inputs)), *inputs)
        return tuple(each.contiguous() for each in found)

    @torch.library.custom_op(
        f"{qualified}_backward",
        mutates_args=(),
        schema=f"(Tensor[] outer, bool[] needed, {arguments}) -> Tensor[]",
    )
    def backward(outer: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        context = _Context(tuple(needed))
        with torch.autocast(outer[0].device.type, enabled=False), torch.no_grad():
            function.forward(context, *inputs)
            gradients = function.backward(context, *outer)
        pairs = zip(inputs, gradients, needed, strict=True)
        return [
            torch.zeros_like(like, memory_format=torch.contiguous_format) if found is None else found.contiguous()
            for like, found, wanted in pairs
            if wanted
        ]

    def backward_fake(outer: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        return [like.new_empty(like.shape) for like, wanted in zip(inputs, needed, strict=True) if wanted]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in inputs])
        ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]

    def differentiate(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.options, strict=True)
        inputs = [option if tensor is None else tensor for tensor, option in saved]
        needed = list(ctx.needs_input_grad)
        found = iter(backward(list(outer), needed, *inputs))
        return tuple(next(found) if wanted else None for wanted in needed)

    forward.register_fake(fake)
    backward.register_fake(backward_fake)
    forward.register_autograd(differentiate, setup_context=save)
    return forward
