"""What callers give to the ops: checks, whose one message names the argument, what it is and what is accepted, and the
reading of `seq_idx` that the recurrences share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import HAS_TRITON, INTERPRETED
from .tracing import host_reads, tracing


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over `x` are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them is to be recorded."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose_implementation(
    implementation: str, name: str, x: Tensor, supports_triton: bool = True, traceable: bool = False
) -> str:
    """The implementation that the op `name` takes for `x`.

    Args:
        implementation: "triton", "torch", or "auto": Triton for CUDA tensors where it is installed and serves the
            call, torch otherwise.
        name: the op, for the message.
        x: a tensor of the call; its device and dtype decide. Triton kernels sum in float32 and so take no float64.
        supports_triton: whether the op's Triton kernels serve this call.
        traceable: whether they may stand in a traced graph; if not, "auto" takes the torch path while tracing.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: if `implementation` is unknown, or is "triton" and cannot be had.
    """
    if implementation == "torch":
        return "torch"
    if implementation == "auto":
        served = x.is_cuda and supports_triton and HAS_TRITON and x.dtype != torch.float64
        return "triton" if served and (traceable or not tracing()) else "torch"
    if implementation != "triton":
        raise ValueError(
            f"implementation={implementation!r} is unknown for {name}; accepted: 'auto', 'torch', 'triton'"
        )
    obstacle = None
    if not supports_triton:
        obstacle = "is not available for these arguments"
    elif not HAS_TRITON:
        obstacle = "needs Triton, which is not installed"
    elif x.dtype == torch.float64:
        obstacle = "computes in float32 and takes no torch.float64"
    elif not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        obstacle = f"takes CUDA tensors, got one on {x.device}"
    if obstacle is not None:
        raise ValueError(f"implementation='triton' of {name} {obstacle}; accepted: 'auto', 'torch'")
    return "triton"


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], symbols: str) -> None:
    """Raise ValueError unless the sizes are as expected (None: any) and the dtype is floating point."""
    fits = tensor.shape == shape  # nearly always; a step of decoding is short enough to feel the next line
    if not fits and tensor.dim() == len(shape):
        fits = all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be {symbols} = ({sizes}), got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError unless the named tensors are where the first one is."""
    (x_name, x), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of {x_name}, {x.device}, got {tensor.device}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """Raise ValueError unless the sizes are as expected and the dtype is an integer one."""
    if tuple(tensor.shape) != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be {symbols} = ({sizes}), got shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be of an integer dtype, got {tensor.dtype}")


def check_groups(name: str, groups: int, heads: int, noun: str = "heads") -> None:
    """Raise ValueError unless the number of groups of a map divides that of the heads (`noun` names them)."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: the number of groups must divide the {heads} {noun}, got {groups}")


def check_seq_idx(seq_idx: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `seq_idx` is (B, L), integer, and non-decreasing over each row's real tokens.

    Values on a device are not looked at, as that would wait for it, nor are those of a traced graph.
    """
    check_integers("seq_idx", seq_idx, (batch, length), "(B, L)")
    if not host_reads(seq_idx):
        return
    # Padding is negative, so it never raises the running maximum.
    highest = seq_idx.long().cummax(1).values
    wrong = ((seq_idx >= 0) & (seq_idx < highest)).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        raise ValueError(
            "seq_idx must not decrease along a row (negative entries are padding), "
            f"got {int(seq_idx[row, column])} after {int(highest[row, column])} in row {row}"
        )


def check_projection(name: str, weight: Tensor, shape: tuple[int | None, ...], symbols: str, **inputs: Tensor) -> None:
    """Raise ValueError unless a weight has the shape and, but under autocast, the dtype of the one named input."""
    check_tensor(name, weight, shape, symbols)
    ((x_name, x),) = inputs.items()
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must be of the dtype of {x_name}, {x.dtype}, got {weight.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> list[int]:
    """Return the bounds of sequences that follow each other, read on the host.

    Raises:
        ValueError: unless they are integers that start at 0, do not decrease and end at most at `length`.
    """
    check_integers("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), "(number of sequences + 1)")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > length:
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease, and end at most at the number of tokens, {length}, got {bounds}"
        )
    return bounds


def of_no_rows(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor | None) -> Tensor:
    """The (0, ...) result of an op on an empty batch, in the graph of its inputs, whose gradients are zeros."""
    nothing = next(tensor for tensor in inputs if tensor is not None).new_zeros(shape, dtype=dtype)
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            nothing = nothing + tensor.sum().to(dtype)
    return nothing


def documents(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) masks: the real tokens, and the first tokens of a row's second, third, ... document."""
    document = seq_idx.cummax(dim=1).values
    before = F.pad(document[:, :-1], (1, 0), value=-1)
    return seq_idx >= 0, (document != before) & (before >= 0)


def blank_padding(seq_idx: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """Put zeros at padding tokens, so that what stands there (a NaN, say) reaches neither a state nor a gradient."""
    if seq_idx is None:
        return tensors
    padding = seq_idx < 0
    if not tracing() and not bool(padding.any()):
        return tensors
    return tuple(
        None if tensor is None else tensor.masked_fill(padding.view(*padding.shape, *[1] * (tensor.dim() - 2)), 0)
        for tensor in tensors
    )
