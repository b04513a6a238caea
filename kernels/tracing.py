"""Support for tracing the ops by torch.compile, torch.export or torch.jit.trace.

A traced graph is reused for other values and lengths than those it was traced with. During tracing, therefore, no code
may depend on a value (e.g. a check, or a shortcut for masks without padding), and no Python loop on a length. Most
torch paths have a second form for tracing: a few dense operations that the compiler fuses and differentiates. Where
such a form would be slow, and for Triton kernels, whose launches cannot be traced, the computation is registered as an
operator, a single node of the graph: an autograd function by :func:`opaque`, a function without a gradient, such as a
decode step, by :func:`launch`. Calls outside of a graph do not go through the operator.
"""

from __future__ import annotations

import functools
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

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Do nothing: an operator ignores the gradients of these results. Its caller detaches them."""


def _qualified(module: str, name: str) -> str:
    """Return the name of an operator, which has that of its module, so that exported copies can coexist."""
    return f"{re.sub(r'[^0-9a-zA-Z_]', '_', module)}::{name}"


def opaque(
    function: type[torch.autograd.Function],
    name: str,
    arguments: str,
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    results: int = 2,
    restore: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an autograd function as an operator, a single node of a traced graph.

    The operator saves its inputs only; its backward, also an operator, runs the forward again, or `restore`. Operators
    are named after the module of `function`, so that the package and any number of exported copies can coexist in one
    process.

    Args:
        function: autograd function.
        name: name of the operator.
        arguments: arguments of `function.forward` in the syntax of operator schemas.
        fake: function that takes the arguments and returns empty contiguous results of the right shapes and dtypes.
        results: number of results. A result of the autograd function that is None becomes an empty (0) tensor in the
            dtype of the first argument.
        restore: function that takes a context and the arguments and saves in the context what `function.backward`
            needs, without computing the results. By default `function.forward`.

    Returns:
        Function of the same arguments that calls the operator.
    """
    qualified = _qualified(function.__module__, name)
    restore = function.forward if restore is None else restore
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"

    @torch.library.custom_op(qualified, mutates_args=(), schema=f"({arguments}) -> {returned}")
    def forward(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            found = function.forward(_Context((False,) * len(inputs)), *inputs)
        if isinstance(found, Tensor):
            return found.contiguous()
        return tuple(inputs[0].new_empty(0) if each is None else each.contiguous() for each in found)

    @torch.library.custom_op(
        f"{qualified}_backward",
        mutates_args=(),
        schema=f"(Tensor[] outer, bool[] needed, {arguments}) -> Tensor[]",
    )
    def backward(outer: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        context = _Context(tuple(needed))
        with torch.autocast(outer[0].device.type, enabled=False), torch.no_grad():
            restore(context, *inputs)
            gradients = function.backward(context, *outer)
        pairs = zip(inputs, gradients, needed, strict=True)
        taken = {each.untyped_storage().data_ptr() for each in (*outer, *inputs) if isinstance(each, Tensor)}
        results = []
        for like, found, wanted in pairs:
            if wanted:
                found = torch.zeros_like(like) if found is None else found
                # Results of an operator share no memory with each other or with its arguments, and take all of theirs.
                storage = found.untyped_storage()
                copied = storage.data_ptr() in taken or storage.nbytes() > found.numel() * found.element_size()
                results.append(found.clone(memory_format=torch.contiguous_format) if copied else found.contiguous())
                taken.add(results[-1].untyped_storage().data_ptr())
        return results

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


def launch(arguments: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate a function without a gradient, which becomes an operator, a single node of a traced graph.

    While a graph is traced, the decorated function calls the operator, which is named after it, and otherwise the
    function itself. It takes all arguments by position and returns a new tensor.

    Args:
        arguments: arguments of the function in the syntax of operator schemas. Tensors that it writes to are annotated,
            e.g. `Tensor(a!) state`.
        fake: function that takes the arguments and returns an empty contiguous result of the right shape and dtype.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        operator = torch.library.custom_op(
            _qualified(function.__module__, function.__name__),
            function,
            mutates_args=re.findall(r"Tensor\(\w+!\)\S* (\w+)", arguments),
            schema=f"({arguments}) -> Tensor",
        )
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*inputs: Any) -> Tensor:
            return (operator if tracing() else function)(*inputs)

        return call

    return register
