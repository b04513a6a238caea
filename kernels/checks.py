"""Validation of the ops' arguments, and the choice between their implementations.

Every op has an argument `implementation` with the same contract (:func:`choose_implementation`):

* "auto" runs Triton if the tensors are on a CUDA device, Triton is installed and its kernels support the call, and
  torch otherwise. No Triton kernel supports float64; the docstring of an op names its other limits. While a graph is
  traced, only ops whose kernels are better kept apart from their neighbours (`traceable`) run Triton.
* "torch" runs torch on any device.
* "triton" runs Triton, or raises a ValueError that states why it cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import HAS_TRITON, INTERPRETED
from .tracing import host_reads, tracing


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over `x` are accumulated: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context that disables autocast, which would round the operands of products."""
    return torch.autocast(x.device.type, enabled=False)


def recorded(*tensors: Tensor | None) -> bool:
    """Return whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose_implementation(
    implementation: str, name: str, x: Tensor, supports_triton: bool = True, traceable: bool = False
) -> str:
    """Return the implementation to run, "triton" or "torch" (see the module docstring for the contract).

    Args:
        implementation: "auto", "triton" or "torch".
        name: name of the op, for the error message.
        x: tensor of the call, whose device and dtype decide.
        supports_triton: whether the op's Triton kernels support this call.
        traceable: whether "auto" runs the kernels in a traced graph too; if not, it leaves the op to the compiler.

    Raises:
        ValueError: if `implementation` is unknown, or is "triton" and cannot run.
    """
    if implementation == "torch":
        return "torch"
    if implementation == "auto":
        served = x.is_cuda and supports_triton and HAS_TRITON and x.dtype != torch.float64
        return "triton" if served and (traceable or not tracing()) else "torch"
    if implementation != "triton":
        raise ValueError(f"implementation of {name} must be 'auto', 'torch' or 'triton', got {implementation!r}")
    obstacle = None
    if not supports_triton:
        obstacle = "is not available for these arguments"
    elif not HAS_TRITON:
        obstacle = "needs Triton, which is not installed"
    elif x.dtype == torch.float64:
        obstacle = "computes in float32 and does not support torch.float64"
    elif not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        obstacle = f"needs CUDA tensors, got one on {x.device}"
    if obstacle is not None:
        raise ValueError(f"implementation='triton' of {name} {obstacle}. Pass 'auto' or 'torch'.")
    return "triton"


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], symbols: str) -> None:
    """Raise ValueError unless the tensor has the given shape (None matches any size) and a floating-point dtype."""
    fits = tensor.shape == shape  # the common case, kept fast for decoding steps
    if not fits and tensor.dim() == len(shape):
        fits = all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be {symbols} = ({sizes}), got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_optional(name: str, tensor: Tensor | None, shape: tuple[int | None, ...], symbols: str) -> None:
    """Run :func:`check_tensor` unless the tensor is None."""
    if tensor is not None:
        check_tensor(name, tensor, shape, symbols)


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are not None are on the device of the first one."""
    (x_name, x), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of {x_name}, {x.device}, got {tensor.device}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """Raise ValueError unless the tensor has the given shape and an integer dtype."""
    if tuple(tensor.shape) != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be {symbols} = ({sizes}), got shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_groups(name: str, groups: int, heads: int, noun: str = "heads") -> None:
    """Raise ValueError unless the number of groups of a tensor divides the number of heads (or of `noun`)."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{name} must have a number of groups that divides the {heads} {noun}, got {groups}")


def check_seq_idx(seq_idx: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless `seq_idx` is None or a (B, L) integer tensor that does not decrease over real tokens.

    The order is checked on the CPU only: reading values of another device would wait for it, and a traced graph has
    none.
    """
    if seq_idx is None:
        return
    check_integers("seq_idx", seq_idx, (batch, length), "(B, L)")
    if not host_reads(seq_idx):
        return
    # Padding is negative, so it never increases the running maximum.
    highest = seq_idx.long().cummax(1).values
    wrong = ((seq_idx >= 0) & (seq_idx < highest)).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        raise ValueError(
            "seq_idx must not decrease along a row (negative entries are padding), "
            f"got {int(seq_idx[row, column])} after {int(highest[row, column])} in row {row}"
        )


def check_projection(name: str, weight: Tensor, shape: tuple[int | None, ...], symbols: str, **inputs: Tensor) -> None:
    """Raise ValueError unless a weight has the given shape and, except under autocast, the dtype of the named input."""
    check_tensor(name, weight, shape, symbols)
    ((x_name, x),) = inputs.items()
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must have the dtype of {x_name}, {x.dtype}, got {weight.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> list[int]:
    """Return the bounds of consecutive sequences as a list, which waits for the device.

    Raises:
        ValueError: if the bounds are not integers, do not start at 0, decrease, or exceed `length`.
    """
    check_integers("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), "(number of sequences + 1)")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > length:
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease and not exceed the number of tokens, {length}, got {bounds}"
        )
    return bounds


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor | None) -> Tensor:
    """Return an op's (0, ...) result for an empty batch, connected to the inputs so that they get zero gradients."""
    given = [tensor for tensor in inputs if tensor is not None]
    zero = sum(tensor.sum().to(dtype) for tensor in given if tensor.requires_grad)
    return given[0].new_zeros(shape, dtype=dtype) + zero
