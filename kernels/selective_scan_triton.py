"""Selective scan (S6) in Triton: forward, backward and the one-token step, as defined in `selective_scan.py`.

A program takes one batch row and one tile of channels of a group, keeps their (BLOCK_D, N) states in float32 registers
and walks along L. Step size (bias, softplus), decay, skip and gate are computed in registers, so that the inputs are
read once and the output is written once. In training, the forward also stores the state entering every span of tokens.
The backward walks over the spans from the end. It first runs forward through a span and stores the state before each
chunk in a scratch tensor; then it takes the chunks from the last to the first, with a chunk's states in registers. dB
and dC are sums over channels: every tile writes a partial sum, and a reduction adds these in a fixed order, as it does
for dA, dD and ddt_bias over batch rows. There are no atomics, so that two runs are bit-identical. The backward has one
launch per section of a row, which limits the memory for partial sums to those of a section.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import tl, triton
from .tracing import opaque, tracing
from .triton_math import softplus, strides, unit_stride

# Tokens whose loads the forward issues together, so that the recurrence waits for memory once per chunk.
_FORWARD_CHUNK = 8
# Tokens whose states the backward holds in registers. For N = 16 and 4 tokens, Triton 3.9 uses 248 registers per thread
# on sm_90 without spilling, and spills 24 bytes on sm_80; with 8 tokens it spills 200 bytes on both.
_BACKWARD_CHUNK = 4
# Tokens between the states that the forward saves. They take 4 N / 32 bytes per token and channel: 2 for N = 16,
# while x, dt, z and y take 8 in half precision. The scratch tensor takes 4 N _SPAN / _BACKWARD_CHUNK bytes per
# row and channel.
_SPAN = 32
# Fewest spans in a section of the backward (:meth:`_Call.spans_of_a_section`).
_SHORTEST_SECTION = 4
# States per program: 4 per thread of 4 warps, i.e. 32 channels for N = 16; for other N as many as fit, between 4 (16
# bytes of float32) and 64. Chosen by the compiler's register counts; not measured on a device yet.
_STATES = 512
_WARPS = 4


def selective_scan_triton(
    *operands: Tensor | None, dt_softplus: bool, real: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the differentiable op on checked arguments.

    Args:
        operands: x, dt, A, B, C, D, z, dt_bias and initial state of `selective_scan`.
        dt_softplus: apply softplus to `dt + dt_bias`.
        real: (B, L) mask of real tokens; None if there is no padding and one document per row.
        first: (B, L) mask of tokens at which a document starts, likewise.

    Returns:
        (B, L, D) outputs in the dtype of `x` and the (B, D, N) final state in float32.
    """
    kinds = None
    if real is not None and first is not None:
        kinds = first.to(torch.int8).masked_fill_(~real, 2)
    scan = _traced_scan if tracing() else _SelectiveScanTriton.apply
    return scan(*operands, kinds, dt_softplus, torch.is_grad_enabled())  # type: ignore[return-value]


def selective_scan_step_triton(state: Tensor, *operands: Any) -> Tensor:
    """Run the forward kernel on rows of one token, reading and writing the same state; returns (B, D) outputs.

    Args:
        state: (B, D, N) state.
        operands: x, dt, A, B, C, D, z, dt_bias and dt_softplus of `selective_scan_step`.
    """
    x, dt, A, B, C, D, z, dt_bias, dt_softplus = operands
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
    """The Triton scan: h_t = a_t h_{t-1} + dt_t x_t B_t, y_t = silu(z_t) (C_t h_t + D x_t), with a_t = exp(dt_t A).

    Backward, with p_t the gradient before the gate and g_t the one at h_t:  p_t = silu(z_t) dy_t;
    g_t = C_t p_t + a_{t+1} g_{t+1};  dx_t = D p_t + dt_t sum_n B_t g_t;  dB_t = sum_d dt_t x_t g_t;
    dC_t = sum_d p_t h_t;  with e_t = g_t a_t h_{t-1}:  ddt_t = x_t sum_n B_t g_t + sum_n A e_t, times the sigmoid of
    its argument where softplus made dt_t;  dA = sum_t dt_t e_t.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, initial_state, kinds, ctx.dt_softplus, grad_enabled = arguments
        x, _, A, *_ = operands
        call = _Call(*operands, kinds, ctx.dt_softplus)
        initial = None if initial_state is None else initial_state.contiguous()
        y = x.new_empty(x.shape)
        final = x.new_empty(call.batch, *A.shape, dtype=torch.float32)
        saved = None
        if grad_enabled and any(ctx.needs_input_grad):
            saved = final.new_empty(call.batch, triton.cdiv(call.length, _SPAN), *A.shape)
        call.forward(initial, y, final, saved)
        ctx.save_for_backward(*operands, kinds, saved)
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *operands, saved = ctx.saved_tensors
        dy, dfinal = gradients
        *found, dinitial = _Call(*operands, ctx.dt_softplus).backward(dy, dfinal, saved)
        return *found, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), None, None, None


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
    """Operands of a call in the layout of the kernels, whose last axis is contiguous; and the grid of programs."""

    def __init__(self, *arguments: Any) -> None:
        x, dt, A, B, C, D, z, dt_bias, kinds, self.dt_softplus = arguments
        self.x, self.dt, self.B, self.C, self.z = map(unit_stride, (x, dt, B, C, z))
        self.A, self.kinds = A.contiguous(), None if kinds is None else kinds.contiguous()
        self.D, self.dt_bias = map(unit_stride, (D, dt_bias))
        self.batch, self.length, channels = x.shape
        groups, size = B.shape[2:]
        self.per_group = channels // groups
        self.block_n = triton.next_power_of_2(size)
        most = min(max(_STATES // self.block_n, 4), 64)
        self.block_d = min(triton.next_power_of_2(self.per_group), most)
        self.tiles = triton.cdiv(self.per_group, self.block_d)
        self.groups, self.size = groups, size

    def operands(self) -> tuple[Any, ...]:
        """Return the leading arguments of both kernels."""
        return (
            *(self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.kinds),
            *(self.length, self.per_group, self.size, self.tiles, self.groups),
            *(*strides(2, self.x, self.dt, self.z), *strides(3, self.B, self.C)),
        )

    def forward(self, initial: Tensor | None, y: Tensor, final: Tensor, saved: Tensor | None) -> None:
        """Write the (B, L, D) outputs, the final state and, if `saved` is given, the state entering each span."""
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
        """Return gradients of x, dt, A, B, C, D, z and dt_bias in their dtypes, and of the initial state in float32."""
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
        """Return the number of spans per section of the backward.

        The partial sums of dB and dC of a section, one per tile, take memory in addition to inputs, results and their
        gradients. They may take an eighth of those, but no section is shorter than `_SHORTEST_SECTION`. Sections cost
        only their launches, since the tokens of a row are processed in sequence anyway. The ratio of the peak memory of
        forward and backward to the memory of inputs, outputs, gradients and saved states is then 1.11 to 1.13 for N =
        16 and 64 and rows of at least 2048; it exceeds 1.2 for rows shorter than 512, by 1.2 MB per row of 128 tokens
        for D = 1024.
        """
        wide = (self.x, self.dt, self.x, self.z)  # y has the dtype of x
        sizes = [tensor.element_size() for tensor in wide if tensor is not None]
        beside = 2 * sum(sizes) * self.per_group * self.groups  # bytes per token, including gradients
        parts = 2 * 4 * self.tiles * self.groups * self.size
        return max(triton.cdiv(self.length * beside, 8 * parts * _SPAN), _SHORTEST_SECTION)


@triton.jit
def _decay(dt, rates):
    """Return the (BLOCK_D, BLOCK_N) factors on the state from (BLOCK_D) step sizes and A log2(e).

    Another discretisation would change this function only, as long as the gradient of the factor's logarithm is A for
    dt and dt for A.
    """
    return tl.exp2(dt[:, None] * rates)


@triton.jit
def _read_kind(kind_ptr, t, length):
    """Return whether token t is real and whether a document starts there."""
    live = t < length
    first = t < 0
    if kind_ptr is not None:
        kind = tl.load(kind_ptr + t, mask=live, other=2)
        live = kind != 2
        first = kind == 1
    return live, first


@triton.jit
def _read_vector(ptr, offset, index, mask):
    return tl.load(ptr + offset + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _read_step_size(dt_ptr, offset, d, mask, live, bias, SOFTPLUS: tl.constexpr):
    """Return the argument of softplus, and the step size, which is 0 at padding and beyond the end of the row."""
    raw = _read_vector(dt_ptr, offset, d, mask) + bias
    if SOFTPLUS:
        return raw, tl.where(live, softplus(raw), 0.0)
    else:
        return raw, tl.where(live, raw, 0.0)


@triton.jit
def _advance(
    h, t, x_ptr, dt_ptr, b_ptr, kind_ptr, length, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
    inside, d, n, rates, bias, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Return the state after token t from the one before, the token's inputs, and masks for its other operands."""
    live, first = _read_kind(kind_ptr, t, length)
    # Bounds instead of `on_d & live`, because the interpreter turns a vector and a scalar mask into an integer.
    mask_d, mask_n = inside < tl.where(live, per_group, 0), n < tl.where(live, size, 0)
    x = _read_vector(x_ptr, t * stride_x_l, d, mask_d)
    _, dt = _read_step_size(dt_ptr, t * stride_dt_l, d, mask_d, live, bias, SOFTPLUS)
    b = _read_vector(b_ptr, t * stride_b_l, n, mask_n)
    h = tl.where(first, 0.0, _decay(dt, rates) * h) + (dt * x)[:, None] * b[None, :]
    return h, x, mask_d, mask_n


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x_ptr,  # (B, L, D)
    dt_ptr,  # (B, L, D)
    a_ptr,  # (D, N)
    b_ptr,  # (B, L, G, N)
    c_ptr,  # (B, L, G, N)
    d_ptr,  # (D) or None
    z_ptr,  # (B, L, D) or None
    bias_ptr,  # (D) or None
    kind_ptr,  # (B, L) or None: 1 where a document starts, 2 at padding
    length, per_group, size, tiles, groups,
    stride_x_b, stride_x_l, stride_dt_b, stride_dt_l, stride_z_b, stride_z_l,
    stride_b_b, stride_b_l, stride_b_g, stride_c_b, stride_c_l, stride_c_g,
    initial_ptr,  # (B, D, N) or None
    y_ptr,  # (B, L, D), contiguous
    final_ptr,  # (B, D, N)
    saved_ptr,  # (B, spans, D, N) or None
    SOFTPLUS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // tiles
    row = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    on_d = inside < per_group
    d = group * per_group + inside  # (BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    on_n = n < size
    on_dn = on_d[:, None] & on_n[None, :]
    channels = groups * per_group
    dn = d[:, None] * size + n[None, :]  # in a (D, N) matrix
    x_ptr += row * stride_x_b
    dt_ptr += row * stride_dt_b
    b_ptr += row * stride_b_b + group * stride_b_g
    c_ptr += row * stride_c_b + group * stride_c_g
    y_ptr += row * length * channels
    chunks = (length + CHUNK - 1) // CHUNK
    spans = (length + SPAN - 1) // SPAN

    rates = tl.load(a_ptr + dn, mask=on_dn, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=on_d, other=0.0).to(tl.float32)
    if d_ptr is not None:
        skip = tl.load(d_ptr + d, mask=on_d, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z_ptr += row * stride_z_b
    if kind_ptr is not None:
        kind_ptr += row * length
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        h = tl.load(initial_ptr + row * channels * size + dn, mask=on_dn, other=0.0).to(tl.float32)

    start = row * 0  # an int64 zero
    for _ in range(0, chunks):
        if saved_ptr is not None:  # noqa: SIM102
            if start % SPAN == 0:  # nested, because the outer condition is decided at compile time
                tl.store(saved_ptr + (row * spans + start // SPAN) * channels * size + dn, h, mask=on_dn)
        for i in tl.static_range(CHUNK):
            t = start + i
            h, x, mask_d, mask_n = _advance(
                h, t, x_ptr, dt_ptr, b_ptr, kind_ptr, length, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
                inside, d, n, rates, bias, SOFTPLUS,
            )  # fmt: skip
            c = _read_vector(c_ptr, t * stride_c_l, n, mask_n)
            y = tl.sum(h * c[None, :], axis=1)
            if d_ptr is not None:
                y += skip * x
            if z_ptr is not None:
                z = _read_vector(z_ptr, t * stride_z_l, d, mask_d)
                y *= z * tl.sigmoid(z)
            within = inside < tl.where(t < length, per_group, 0)
            tl.store(y_ptr + t * channels + d, y.to(y_ptr.dtype.element_ty), mask=within)
        start += CHUNK
    tl.store(final_ptr + row * channels * size + dn, h.to(final_ptr.dtype.element_ty), mask=on_dn)


@triton.jit(do_not_specialize=["length", "first_span", "span_count", "section"])
def backward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, kind_ptr,  # as above
    length, per_group, size, tiles, groups,
    stride_x_b, stride_x_l, stride_dt_b, stride_dt_l, stride_z_b, stride_z_l,
    stride_b_b, stride_b_l, stride_b_g, stride_c_b, stride_c_l, stride_c_g,
    first_span, span_count, section,  # spans of this launch, and the most tokens of a section
    dy_ptr,  # (B, L, D), contiguous like all gradients
    dleaving_ptr,  # (B, D, N), gradient of the state after these spans
    saved_ptr,  # (B, spans, D, N)
    scratch_ptr,  # (B, SPAN / CHUNK, D, N)
    dx_ptr,  # (B, L, D)
    ddt_ptr,  # (B, L, D)
    da_ptr,  # (B, D, N), accumulated over launches, like dd and dbias
    db_ptr,  # (tiles, B, section, G, N)
    dc_ptr,  # (tiles, B, section, G, N)
    dd_ptr,  # (B, D) or None
    dz_ptr,  # (B, L, D) or None
    dbias_ptr,  # (B, D) or None
    dentering_ptr,  # (B, D, N)
    SOFTPLUS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // tiles
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    on_d = inside < per_group
    d = group * per_group + inside  # (BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    on_n = n < size
    on_dn = on_d[:, None] & on_n[None, :]
    channels = groups * per_group
    dn = d[:, None] * size + n[None, :]
    x_ptr += row * stride_x_b
    dt_ptr += row * stride_dt_b
    b_ptr += row * stride_b_b + group * stride_b_g
    c_ptr += row * stride_c_b + group * stride_c_g
    dy_ptr += row * length * channels
    dx_ptr += row * length * channels
    ddt_ptr += row * length * channels
    part = ((tile * tl.num_programs(1) + row) * section * groups + group) * size
    spans = (length + SPAN - 1) // SPAN
    scratch_ptr += row * (SPAN // CHUNK) * channels * size

    rates = tl.load(a_ptr + dn, mask=on_dn, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=on_d, other=0.0).to(tl.float32)
    if d_ptr is not None:
        skip = tl.load(d_ptr + d, mask=on_d, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z_ptr += row * stride_z_b
        dz_ptr += row * length * channels
    if kind_ptr is not None:
        kind_ptr += row * length
    carry = tl.load(dleaving_ptr + row * channels * size + dn, mask=on_dn, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + row * channels * size + dn, mask=on_dn, other=0.0)
    dskip = tl.zeros((BLOCK_D,), tl.float32)
    if dd_ptr is not None:
        dskip = tl.load(dd_ptr + row * channels + d, mask=on_d, other=0.0)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.load(dbias_ptr + row * channels + d, mask=on_d, other=0.0)

    begin_section = (row * 0 + first_span) * SPAN  # int64
    start = begin_section + span_count * SPAN
    for _ in range(0, span_count):
        start -= SPAN
        chunks = tl.minimum((length - start + CHUNK - 1) // CHUNK, SPAN // CHUNK).to(tl.int32)
        h = tl.load(saved_ptr + (row * spans + start // SPAN) * channels * size + dn, mask=on_dn, other=0.0)
        begin = start
        at = scratch_ptr + dn
        for _chunk in range(0, chunks):
            tl.store(at, h, mask=on_dn)
            for i in tl.static_range(CHUNK):
                t = begin + i
                h, _x, _mask_d, _mask_n = _advance(
                    h, t, x_ptr, dt_ptr, b_ptr, kind_ptr, length, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
                    inside, d, n, rates, bias, SOFTPLUS,
                )  # fmt: skip
            begin += CHUNK
            at += channels * size
        tl.debug_barrier()  # a thread may read scratch that another thread has written
        for _chunk in range(0, chunks):
            begin -= CHUNK
            at -= channels * size
            h = tl.load(at, mask=on_dn, other=0.0)
            states = (h,)  # before each token of the chunk, and after the last one
            for i in tl.static_range(CHUNK):
                t = begin + i
                h, _x, _mask_d, _mask_n = _advance(
                    h, t, x_ptr, dt_ptr, b_ptr, kind_ptr, length, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
                    inside, d, n, rates, bias, SOFTPLUS,
                )  # fmt: skip
                states = states + (h,)  # noqa: RUF005 - Triton has no starred tuples
            for i in tl.static_range(CHUNK):
                t = begin + (CHUNK - 1 - i)
                live, first = _read_kind(kind_ptr, t, length)
                mask_d, mask_n = inside < tl.where(live, per_group, 0), n < tl.where(live, size, 0)
                x = _read_vector(x_ptr, t * stride_x_l, d, mask_d)
                raw, dt = _read_step_size(dt_ptr, t * stride_dt_l, d, mask_d, live, bias, SOFTPLUS)
                b = _read_vector(b_ptr, t * stride_b_l, n, mask_n)
                c = _read_vector(c_ptr, t * stride_c_l, n, mask_n)
                p = _read_vector(dy_ptr, t * channels, d, mask_d)
                within, within_n = inside < tl.where(t < length, per_group, 0), n < tl.where(t < length, size, 0)
                after = states[CHUNK - i]
                if z_ptr is not None:
                    z = _read_vector(z_ptr, t * stride_z_l, d, mask_d)
                    sigmoid = tl.sigmoid(z)
                    y = tl.sum(after * c[None, :], axis=1)
                    if d_ptr is not None:
                        y += skip * x
                    dz = p * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                    tl.store(dz_ptr + t * channels + d, dz.to(dz_ptr.dtype.element_ty), mask=within)
                    p *= z * sigmoid
                decay = tl.where(first, 0.0, _decay(dt, rates))
                g = p[:, None] * c[None, :] + carry
                carry = decay * g
                e = carry * states[CHUNK - 1 - i]
                du = tl.sum(g * b[None, :], axis=1)
                dx = dt * du
                if d_ptr is not None:
                    dx += skip * p
                    dskip += p * x
                ddt = x * du + tl.sum(e * rates, axis=1) * 0.6931471805599453
                if SOFTPLUS:
                    ddt *= tl.sigmoid(raw)
                ddt = tl.where(live, ddt, 0.0)
                dbias += ddt
                da += dt[:, None] * e
                db = tl.sum(g * (dt * x)[:, None], axis=0)
                dc = tl.sum(after * p[:, None], axis=0)
                tl.store(dx_ptr + t * channels + d, dx.to(dx_ptr.dtype.element_ty), mask=within)
                tl.store(ddt_ptr + t * channels + d, ddt.to(ddt_ptr.dtype.element_ty), mask=within)
                at_token = part + (t - begin_section) * groups * size
                tl.store(db_ptr + at_token + n, db, mask=within_n)
                tl.store(dc_ptr + at_token + n, dc, mask=within_n)
        tl.debug_barrier()  # all reads of the scratch end before the next span is written
    tl.store(dentering_ptr + row * channels * size + dn, carry, mask=on_dn)
    tl.store(da_ptr + row * channels * size + dn, da, mask=on_dn)
    if dd_ptr is not None:
        tl.store(dd_ptr + row * channels + d, dskip, mask=on_d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + row * channels + d, dbias, mask=on_d)
