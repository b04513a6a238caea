"""Selective scan (S6) in Triton: forward, backward and the one-token update. Definitions in `selective_scan.py`.

A program takes one batch row and one tile of channels of a group, keeps their (BLOCK_D, N) states in float32 registers
and walks along L. Step size (bias, softplus), decay, skip and gate happen in registers, so that memory sees the inputs
once and the output once. The forward of a training step also writes the state entering every span of tokens. The
backward walks the spans from the end: it runs through a span once from the state entering it, noting the state before
each chunk in a scratch of its own, and then takes the chunks from the last to the first, with a chunk's states in
registers. dB and dC are sums over channels: every tile writes its part, and one reduction adds the parts in a fixed
order, as for dA, dD and ddt_bias over batch rows. There are no atomics, so two runs are bit-identical. The backward is
one launch per section of a row, so that the parts of a section, not of the whole row, take memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import triton
from .selective_scan_triton_kernels import backward_kernel, forward_kernel
from .tracing import opaque, tracing

# Tokens whose loads the forward issues together: the recurrence waits for memory once per so many tokens.
_FORWARD_CHUNK = 8
# Tokens whose states the backward holds in registers. For N = 16, Triton 3.9 compiles 4 to 248 registers per thread on
# sm_90 and spills none of them; on sm_80 it spills 24 bytes, and with 8 tokens 200 bytes everywhere.
_BACKWARD_CHUNK = 4
# Tokens between the states that the forward saves: 4 N / 32 bytes per token and channel, 2 for N = 16, where x, dt, z
# and y in half precision have 8. The backward's scratch is 4 N _SPAN / _BACKWARD_CHUNK bytes per row and channel.
_SPAN = 32
# Spans of the shortest section of the backward (:meth:`_Call.spans_of_a_section`).
_SHORTEST_SECTION = 4
# States of a program: 4 per thread of 4 warps. 32 channels for N = 16; for other N as many as fit, between 4 (a 16-byte
# row of float32) and 64. Chosen from the compiler's register counts; not measured on a device yet.
_STATES = 512
_WARPS = 4


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    real: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The differentiable op on checked arguments; `real` and `first` (B, L) mark real tokens and documents' starts.

    Returns:
        (B, L, D) outputs in the dtype of `x` and the (B, D, N) final state in float32.
    """
    kinds = None
    if real is not None and first is not None:
        kinds = first.to(torch.int8).masked_fill_(~real, 2)
    scan = _traced_scan if tracing() else _SelectiveScanTriton.apply
    return scan(  # type: ignore[return-value]
        x, dt, A, B, C, D, z, dt_bias, initial_state, kinds, dt_softplus, torch.is_grad_enabled()
    )


def selective_scan_step_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One token: the forward kernel on a row of length 1 that reads and writes the same state. Returns (B, D)."""
    row = [None if tensor is None else tensor[:, None] for tensor in (x, dt, B, C, z)]
    held = state.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = _Call(row[0], row[1], A, row[2], row[3], D, row[4], dt_bias, None, dt_softplus)
    with torch.cuda.device_of(x):
        call.forward(held, y, held, None)
    if held is not state:
        state.copy_(held)
    return y


class _SelectiveScanTriton(torch.autograd.Function):
    """h_t = a_t h_{t-1} + dt_t x_t B_t, y_t = silu(z_t) (C_t h_t + D x_t), with a_t = exp(dt_t A).

    Backward, with p_t the gradient before the gate and g_t the one at h_t:  p_t = silu(z_t) dy_t;
    g_t = C_t p_t + a_{t+1} g_{t+1};  dx_t = D p_t + dt_t sum_n B_t g_t;  dB_t = sum_d dt_t x_t g_t;
    dC_t = sum_d p_t h_t;  with e_t = g_t a_t h_{t-1}:  ddt_t = x_t sum_n B_t g_t + sum_n A e_t, times the sigmoid of
    its argument where softplus made dt_t;  dA = sum_t dt_t e_t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        kinds: Tensor | None,
        dt_softplus: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        call = _Call(x, dt, A, B, C, D, z, dt_bias, kinds, dt_softplus)
        initial = None if initial_state is None else initial_state.contiguous()
        y = x.new_empty(batch, length, channels)
        final = x.new_empty(batch, *A.shape, dtype=torch.float32)
        saved = None
        if grad_enabled and any(ctx.needs_input_grad):
            saved = final.new_empty(batch, triton.cdiv(length, _SPAN), *A.shape)
        call.forward(initial, y, final, saved)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, kinds, saved)
        ctx.dt_softplus = dt_softplus
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, kinds, saved = ctx.saved_tensors
        call = _Call(x, dt, A, B, C, D, z, dt_bias, kinds, ctx.dt_softplus)
        dy, dfinal = gradients
        dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = call.backward(dy, dfinal, saved)
        dstate = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
        return dx, ddt, dA, dB, dC, dD, dz, dbias, dstate, None, None, None


def _empty_results(x: Tensor, dt: Any, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)


_traced_scan = opaque(
    _SelectiveScanTriton,
    "scan",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? kinds, bool dt_softplus, bool grad_enabled",
    _empty_results,
)


class _Call:
    """One call's operands as the kernels take them: last axis contiguous, the others by strides; and its grid."""

    def __init__(
        self,
        x: Any,
        dt: Any,
        A: Tensor,
        B: Any,
        C: Any,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        kinds: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        self.x, self.dt, self.B, self.C, self.z = map(_rows_contiguous, (x, dt, B, C, z))
        self.A, self.kinds = A.contiguous(), None if kinds is None else kinds.contiguous()
        self.D, self.dt_bias = map(_rows_contiguous, (D, dt_bias))
        self.dt_softplus = dt_softplus
        self.batch, self.length, channels = x.shape
        groups, size = B.shape[2:]
        self.per_group = channels // groups
        self.block_n = triton.next_power_of_2(size)
        most = min(max(_STATES // self.block_n, 4), 64)
        self.block_d = min(triton.next_power_of_2(self.per_group), most)
        self.tiles = triton.cdiv(self.per_group, self.block_d)
        self.groups, self.size = groups, size

    def operands(self) -> tuple[Any, ...]:
        """What both kernels take first."""
        z = self.x if self.z is None else self.z  # for its strides only
        return (
            *(self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.kinds),
            *(self.length, self.per_group, self.size, self.tiles, self.groups),
            *(stride for tensor in (self.x, self.dt, z) for stride in tensor.stride()[:2]),
            *(stride for tensor in (self.B, self.C) for stride in tensor.stride()[:3]),
        )

    def forward(self, initial: Tensor | None, y: Tensor, final: Tensor, saved: Tensor | None) -> None:
        """Write the (B, L, D) outputs, the final state and, if asked for, the state entering each span."""
        forward_kernel[self.tiles * self.groups, self.batch](
            *self.operands(),
            *(initial, y, final, saved),
            SOFTPLUS=self.dt_softplus,
            SPAN=_SPAN,
            CHUNK=1 if self.length == 1 else _FORWARD_CHUNK,
            BLOCK_D=self.block_d,
            BLOCK_N=self.block_n,
            num_warps=_WARPS,
        )

    def backward(self, dy: Tensor, dfinal: Tensor, saved: Tensor) -> tuple[Any, ...]:
        """Gradients of x, dt, A, B, C, D, z, dt_bias and of the initial state, each in its operand's dtype."""
        x, sizes = self.x, (self.batch, *self.A.shape)
        dx, ddt = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, self.dt))
        dz = None if self.z is None else torch.empty(x.shape, dtype=self.z.dtype, device=x.device)
        dB, dC = (torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device) for tensor in (self.B, self.C))
        dA = saved.new_zeros(sizes)
        dD, dbias = (None if vector is None else saved.new_zeros(sizes[:2]) for vector in (self.D, self.dt_bias))
        scratch = saved.new_empty(self.batch, _SPAN // _BACKWARD_CHUNK, *self.A.shape)
        spans, count = saved.shape[1], self.spans_of_a_section()
        section = min(count * _SPAN, self.length)
        parts = [saved.new_empty(self.tiles, self.batch, section, *self.B.shape[2:]) for _ in range(2)]
        dy, dstate = dy.contiguous(), dfinal.contiguous()
        for first in reversed(range(0, spans, count)):
            dleaving, dstate = dstate, saved.new_empty(sizes)
            backward_kernel[self.tiles * self.groups, self.batch](
                *self.operands(),
                *(first, min(count, spans - first), section),
                *(dy, dleaving, saved, scratch),
                *(dx, ddt, dA, *parts, dD, dz, dbias, dstate),
                SOFTPLUS=self.dt_softplus,
                SPAN=_SPAN,
                CHUNK=_BACKWARD_CHUNK,
                BLOCK_D=self.block_d,
                BLOCK_N=self.block_n,
                num_warps=_WARPS,
            )
            for whole, part in ((dB, parts[0]), (dC, parts[1])):
                tokens = whole[:, first * _SPAN : (first + count) * _SPAN]
                tokens.copy_(part[:, :, : tokens.shape[1]].sum(0))

        def total(rows: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if rows is None or like is None else rows.sum(0).to(like.dtype)

        return dx, ddt, total(dA, self.A), dB, dC, total(dD, self.D), dz, total(dbias, self.dt_bias), dstate

    def spans_of_a_section(self) -> int:
        """The number of spans that the backward goes through at a time.

        A section's parts of dB and dC, one of each tile, stand in memory beside inputs, results and their gradients:
        they get an eighth of what those take, but no section is shorter than `_SHORTEST_SECTION`. Sections cost their
        launches alone, since a row's tokens come after each other anyway. The peak of forward and backward, over
        inputs, outputs, gradients and saved states, is then 1.11 to 1.13 for N = 16 and 64, rows of 2048 and more;
        rows shorter than 512 exceed 1.2, by 1.2 MB a row of 128 tokens for D = 1024.
        """
        wide = (self.x, self.dt, self.x, self.z)  # y is like x
        sizes = [tensor.element_size() for tensor in wide if tensor is not None]
        beside = 2 * sum(sizes) * self.per_group * self.groups  # bytes of a token, with the gradients
        parts = 2 * 4 * self.tiles * self.groups * self.size
        return max(triton.cdiv(self.length * beside, 8 * parts * _SPAN), _SHORTEST_SECTION)


def _rows_contiguous(tensor: Any) -> Any:
    """The tensor, if its last axis is contiguous, or a copy; None stays."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
