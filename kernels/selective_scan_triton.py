"""Selective scan (S6) in Triton: forward, backward and the one-token step, as defined in `selective_scan.py`.

A row is divided into segments, which run in parallel if there are too few rows and channels for a GPU. What enters a
segment is found in two launches before: `summary_kernel` runs each segment from a zero state and writes its last state
and the sum of its step sizes, whose exponential with A is the segment's decay; `carry_kernel` walks over the segments.
The backward does the same from the end, for gradients of states. A row that is not divided takes one launch.

A program is a warp that takes a segment of one batch row and a tile of channels of a group. For N = 16 a thread holds
four states of each of four channels: matrices are addressed by rows, whose elements the compiler gives to threads four
at a time. So a sum over states, or one over channels (dB and dC), is mostly inside threads and takes few exchanges;
threads that held one state of 16 channels needed 64 for a sum over states. Step size (bias, softplus), decay, skip and
gate are computed in registers, so that a launch reads the inputs once. In training, the forward also stores the state
entering every span of tokens. The backward takes the spans of a segment from the last to the first. It runs forward
through a span, holds the states before each chunk, then takes the chunks from the last to the first, with a chunk's
states in registers.

Every program writes its partial sums of dB and dC, and every segment those of dA, dD and ddt_bias; reductions add these
in a fixed order. There are no atomics, so that two runs are bit-identical.
"""

# Triton unrolls loops that add to tuples; for Python's types they stay empty.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import tl, triton
from .tracing import launch, opaque, tracing
from .triton_math import softplus, strides, unit_stride

# Tokens whose loads are issued together, and whose states the backward holds in registers.
_CHUNK = 4
# Tokens between the states that the forward saves: 4 N / _SPAN bytes per token and channel, i.e. 4 for N = 16, while x,
# dt, z and y take 8 in half precision. The backward holds _SPAN / _CHUNK - 1 more in registers.
_SPAN = 16
# States of a warp: 16 per thread.
_STATES = 512
# Most channels of a program: two per thread.
_MOST_CHANNELS = 64
# A step reads and writes each state once, so its threads take 4 states each, 16 bytes.
_STEP_WARPS = 4
# Segments whose loads the carry issues together.
_CARRY_STEPS = 8
# Programs to divide rows for: two for each of the four schedulers of 132 processors.
_PROGRAMS = 1024
# Fewest tokens of a segment, and fewest segments: two take as long as an undivided row, as each is read twice.
_SHORTEST_SEGMENT, _FEWEST_SEGMENTS = 32, 3
# Memory that the backward may take in addition, as a share of inputs, results, their gradients and saved states, and
# for small calls in bytes.
_BESIDE, _ALWAYS_ALLOWED = 0.17, 2**20


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


@launch(
    "Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus",
    lambda state, x, *_: x.new_empty(x.shape),
)
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
        with torch.cuda.device_of(x):
            call.forward(initial, y, final, saved)
        ctx.save_for_backward(*operands, kinds, saved)
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *operands, saved = ctx.saved_tensors
        dy, dfinal = gradients
        with torch.cuda.device_of(dy):
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
        self.batch, self.length, self.channels = x.shape
        groups, size = B.shape[2:]
        self.per_group = self.channels // groups
        self.groups, self.size = groups, size
        self.block_n = triton.next_power_of_2(size)

    def tiles(self) -> tuple[int, dict[str, Any]]:
        """Return the number of tiles of a group, and launch options."""
        block_d = min(triton.next_power_of_2(self.per_group), max(_STATES // self.block_n, 1), _MOST_CHANNELS)
        options = {"BLOCK_D": block_d, "BLOCK_N": self.block_n, "SOFTPLUS": self.dt_softplus}
        options["num_warps"] = max(block_d * self.block_n // _STATES, 1)
        return triton.cdiv(self.per_group, block_d), options

    def operands(self, tiles: int) -> tuple[Any, ...]:
        """Return the leading arguments of the forward and backward kernels."""
        return (
            *(self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.kinds),
            *(self.length, self.per_group, self.size, tiles, self.groups),
            *(*strides(2, self.x, self.dt, self.z), *strides(3, self.B, self.C)),
        )

    def forward(self, initial: Tensor | None, y: Tensor, final: Tensor, saved: Tensor | None) -> None:
        """Write the (B, L, D) outputs, the final state and, if `saved` is given, the state entering each span."""
        step = self.length == 1
        tiles, options = self.tiles()
        segment = self.segment(tiles * self.groups * self.batch, _SHORTEST_SEGMENT)
        segments = triton.cdiv(self.length, segment)
        carried = self.carried(segments, segment, None) if segments > 1 else None
        if carried is not None:
            self.carry(initial, *carried, backward=False)
        forward_kernel[tiles * self.groups, segments, self.batch](
            *self.operands(tiles),
            *(segment, initial, None if carried is None else carried[0], y, final, saved),
            STEP=step,
            SPAN=_SPAN,
            CHUNK=1 if step else _CHUNK,
            **(options | {"num_warps": _STEP_WARPS} if step else options),
        )

    def carried(self, segments: int, segment: int, dy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what each segment adds to a state, (B, segments, D, N), and its sums of step sizes (B, segments, D).

        With `dy`, the gradient of the outputs, it is what a segment adds to the gradient of a state.
        """
        added = self.A.new_empty(self.batch, segments, *self.A.shape, dtype=torch.float32)
        sums = added.new_empty(self.batch, segments, self.channels)
        inputs, maps, gate = (self.x, self.B, None) if dy is None else (dy, self.C, self.z)
        tiles, options = self.tiles()
        summary_kernel[tiles * self.groups, segments - 1, self.batch](
            *(inputs, self.dt, self.A, maps, gate, self.dt_bias, self.kinds),
            *(self.length, self.per_group, self.size, tiles, self.groups),
            *(*strides(2, inputs, self.dt, gate), *strides(3, maps)),
            *(segment, added, sums),
            BACKWARD=int(dy is not None),
            CHUNK=_CHUNK,
            **options,
        )
        return added, sums

    def carry(self, initial: Tensor | None, carried: Tensor, sums: Tensor, *, backward: bool) -> None:
        """Replace what the segments add by the states, or gradients of states, that they start from."""
        block = 128
        carry_kernel[triton.cdiv(self.channels * self.size, block), self.batch](
            *(initial, self.A, sums, carried, carried.shape[1], self.channels, self.size),
            BACKWARD=int(backward),
            STEPS=_CARRY_STEPS,
            BLOCK=block,
            num_warps=block // 32,
        )

    def backward(self, dy: Tensor, dfinal: Tensor, saved: Tensor) -> tuple[Any, ...]:
        """Return gradients of x, dt, A, B, C, D, z and dt_bias in their dtypes, and of the initial state in float32."""
        x, sizes = self.x, (self.batch, *self.A.shape)
        dx, ddt = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, self.dt))
        dz = None if self.z is None else torch.empty(x.shape, dtype=self.z.dtype, device=x.device)
        dy, dfinal = dy.contiguous(), dfinal.contiguous()
        dinitial = saved.new_empty(sizes)
        segment, together = self.backward_division()
        segments = triton.cdiv(self.length, segment)
        carried = None
        if segments > 1:
            carried, sums = self.carried(segments, segment, dy)
            self.carry(dfinal, carried, sums, backward=True)
        # A program reads a gradient from `carried` and replaces it by its part of dA.
        dA = saved.new_empty(self.batch, 1, *self.A.shape) if carried is None else carried
        dD, dbias = (
            None if vector is None else saved.new_empty(self.batch, segments, self.channels)
            for vector in (self.D, self.dt_bias)
        )
        tiles, options = self.tiles()
        programs = triton.cdiv(tiles, together)
        parts = saved.new_empty(programs, 2, *self.B.shape)
        backward_kernel[programs * self.groups, segments, self.batch](
            *self.operands(tiles),
            *(segment, together),
            *(dy, dfinal, carried, saved),
            *(dx, ddt, dA, parts, dD, dz, dbias, dinitial),
            SPAN=_SPAN,
            CHUNK=_CHUNK,
            **options,
        )

        def total(rows: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if rows is None or like is None else rows.sum((0, 1)).to(like.dtype)

        dA = dA.sum((0, 1)).to(self.A.dtype)
        dB, dC = (parts[:, index].sum(0).to(like.dtype) for index, like in ((0, self.B), (1, self.C)))
        return dx, ddt, dA, dB, dC, total(dD, self.D), dz, total(dbias, self.dt_bias), dinitial

    def backward_division(self) -> tuple[int, int]:
        """Return the number of tokens of a segment of the backward, and of tiles that a program takes in turn.

        The backward needs memory beside inputs, results, their gradients and saved states: partial sums of dB and dC,
        one for every program that shares them, and parts of dA, one for each segment. Each may take half of
        `_BESIDE` of the former. Fewer tiles and shorter segments would make more programs.
        """
        wide = (self.x, self.dt, self.x, self.z)  # y has the dtype of x
        bytes_of_token = 2 * sum(tensor.element_size() for tensor in wide if tensor is not None) * self.channels
        bytes_of_state = 4 * self.size * self.channels
        allowed = _BESIDE * (bytes_of_token + bytes_of_state / _SPAN)  # for a token
        allowed = max(allowed, _ALWAYS_ALLOWED / (self.batch * self.length)) / 2
        tiles, _ = self.tiles()
        parts = 2 * 4 * tiles * self.groups * self.size
        together = min(math.ceil(parts / allowed), tiles)
        programs = triton.cdiv(tiles, together) * self.groups * self.batch
        return self.segment(programs, max(bytes_of_state / allowed, _SHORTEST_SEGMENT)), together

    def segment(self, programs: int, shortest: float) -> int:
        """Return the number of tokens of a segment: the row's if it is not divided, whole spans otherwise."""
        segments = min(_PROGRAMS // programs, int(self.length / shortest))
        return self.length if segments < _FEWEST_SEGMENTS else math.ceil(self.length / segments / _SPAN) * _SPAN


@triton.jit
def _decay(dt, rates):
    """Return the (BLOCK_D, BLOCK_N) factors on the state from (BLOCK_D) step sizes and A log2(e).

    Another discretisation would change this function only, as long as the gradient of the factor's logarithm is A for
    dt and dt for A, and the product of several factors is that of the sum of their step sizes.
    """
    return tl.exp2(dt[:, None] * rates)


@triton.jit
def _tile(index, tiles, per_group, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the group of a tile, its channels in the group and in the row, and the states."""
    inside = index % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    group = index // tiles
    return group, inside, group * per_group + inside, tl.arange(0, BLOCK_N)


@triton.jit
def _read_vector(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _read_bias(bias_ptr, d, on_d):
    return 0.0 if bias_ptr is None else _read_vector(bias_ptr, d, on_d)


@triton.jit
def _read_kind(kind_ptr, i, left, inside, n, per_group, size):
    """Return whether token i is real, whether a document starts there, and masks of its channels and states."""
    live = i < left
    first = i != i  # false, as the compiler sees
    if kind_ptr is not None:
        kind = tl.load(kind_ptr + i, mask=live, other=2)
        live = kind != 2
        first = kind == 1
    # Bounds instead of `on_d & live`, because the interpreter turns a vector and a scalar mask into an integer.
    return live, first, inside < tl.where(live, per_group, 0), n < tl.where(live, size, 0)


@triton.jit
def _step_size(raw, bias, live, SOFTPLUS: tl.constexpr):
    """Return the argument of softplus, and the step size, which is 0 at padding and beyond the end of the row."""
    raw = raw.to(tl.float32) + bias
    if SOFTPLUS:
        return raw, tl.where(live, softplus(raw), 0.0)
    else:
        return raw, tl.where(live, raw, 0.0)


@triton.jit
def _read_inputs(
    i, x_ptr, dt_ptr, b_ptr, kind_ptr, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l, inside, d, n,
):  # fmt: skip
    """Return what `_advance` takes of token i as it is stored, and masks for the token's other operands.

    Tokens are counted from the one that the pointers point to, of which `left` are in the row. Their offsets have 32
    bits, which take half the instructions of 64.
    """
    live, first, mask_d, mask_n = _read_kind(kind_ptr, i, left, inside, n, per_group, size)
    x = tl.load(x_ptr + (i * stride_x_l + d), mask=mask_d, other=0.0)
    dt = tl.load(dt_ptr + (i * stride_dt_l + d), mask=mask_d, other=0.0)
    b = tl.load(b_ptr + (i * stride_b_l + n), mask=mask_n, other=0.0)
    return live, first, x, dt, b, mask_d, mask_n


@triton.jit
def _advance(h, token, rates, bias, SOFTPLUS: tl.constexpr):
    """Return the state after a token from the one before."""
    _raw, dt = _step_size(token[3], bias, token[0], SOFTPLUS)
    u = dt * token[2].to(tl.float32)
    return tl.where(token[1], 0.0, _decay(dt, rates) * h) + u[:, None] * token[4].to(tl.float32)[None, :]


@triton.jit
def _through_chunk(
    h, start, x_ptr, dt_ptr, b_ptr, kind_ptr, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
    inside, d, n, rates, bias, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the state after the chunk that begins at token `start`."""
    tokens = ()
    for i in tl.static_range(CHUNK):
        token = _read_inputs(
            start + i, x_ptr, dt_ptr, b_ptr, kind_ptr, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
            inside, d, n,
        )  # fmt: skip
        tokens = tokens + (token,)  # noqa: RUF005 - Triton has no starred tuples
    for i in tl.static_range(CHUNK):
        h = _advance(h, tokens[i], rates, bias, SOFTPLUS)
    return h


@triton.jit(do_not_specialize=["length", "segment"])
def summary_kernel(
    x_ptr,  # (B, L, D) inputs; BACKWARD: gradients of the outputs
    dt_ptr,  # (B, L, D)
    a_ptr,  # (D, N)
    b_ptr,  # (B, L, G, N) input maps; BACKWARD: output maps
    z_ptr,  # (B, L, D) or None; BACKWARD only
    bias_ptr,  # (D) or None
    kind_ptr,  # (B, L) or None: 1 where a document starts, 2 at padding
    length, per_group, size, tiles, groups,
    stride_x_b, stride_x_l, stride_dt_b, stride_dt_l, stride_z_b, stride_z_l, stride_b_b, stride_b_l, stride_b_g,
    segment,  # tokens of a segment, a multiple of CHUNK
    carried_ptr,  # (B, segments, D, N)
    sums_ptr,  # (B, segments, D)
    SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run a segment from zero, for the segment after it: its last state, and the sum of its step sizes.

    The sum is infinite if a document starts in the segment. BACKWARD: for the segment before it, the gradient of the
    state that enters the segment, if that of the state that leaves it is zero.
    """
    group, inside, d, n = _tile(tl.program_id(0), tiles, per_group, BLOCK_D, BLOCK_N)
    row = tl.program_id(2).to(tl.int64)
    on_d = inside < per_group
    on_dn = on_d[:, None] & (n < size)[None, :]
    channels = groups * per_group
    place = tl.program_id(1) + BACKWARD
    start = place.to(tl.int64) * segment
    chunks = ((tl.minimum(length - start, segment) + CHUNK - 1) // CHUNK).to(tl.int32)
    step = CHUNK
    if BACKWARD:
        start += (chunks - 1) * CHUNK
        step = -CHUNK
    x_ptr += row * stride_x_b + start * stride_x_l
    dt_ptr += row * stride_dt_b + start * stride_dt_l
    b_ptr += row * stride_b_b + group * stride_b_g + start * stride_b_l
    if z_ptr is not None:
        z_ptr += row * stride_z_b + start * stride_z_l
    if kind_ptr is not None:
        kind_ptr += row * length + start
    dn = d[:, None] * size + n[None, :]
    rates = tl.load(a_ptr + dn, mask=on_dn, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = _read_bias(bias_ptr, d, on_d)
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(0, chunks):
        left = tl.minimum(length - start, CHUNK).to(tl.int32)
        tokens = ()
        gates = ()
        for i in tl.static_range(CHUNK):
            token = _read_inputs(
                CHUNK - 1 - i if BACKWARD else i,
                x_ptr, dt_ptr, b_ptr, kind_ptr, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l, inside, d,
                n,
            )  # fmt: skip
            tokens = tokens + (token,)  # noqa: RUF005 - Triton has no starred tuples
            if z_ptr is not None:
                at = (CHUNK - 1 - i) * stride_z_l + d
                gates = gates + (tl.load(z_ptr + at, mask=token[5], other=0.0),)  # noqa: RUF005
        for i in tl.static_range(CHUNK):
            token = tokens[i]
            _raw, dt = _step_size(token[3], bias, token[0], SOFTPLUS)
            total += tl.where(token[1], float("inf"), dt)
            if BACKWARD:
                p = token[2].to(tl.float32)
                if z_ptr is not None:
                    z = gates[i].to(tl.float32)
                    p *= z * tl.sigmoid(z)
                h = tl.where(token[1], 0.0, _decay(dt, rates) * (h + p[:, None] * token[4].to(tl.float32)[None, :]))
            else:
                h = _advance(h, token, rates, bias, SOFTPLUS)
        start += step
        x_ptr += step * stride_x_l
        dt_ptr += step * stride_dt_l
        b_ptr += step * stride_b_l
        if z_ptr is not None:
            z_ptr += step * stride_z_l
        if kind_ptr is not None:
            kind_ptr += step
    at = row * (tl.num_programs(1) + 1) + place
    to = at + (1 - 2 * BACKWARD)
    tl.store(carried_ptr + to * channels * size + dn, h, mask=on_dn)
    tl.store(sums_ptr + at * channels + d, total, mask=on_d)


@triton.jit(do_not_specialize=["segments"])
def carry_kernel(
    initial_ptr,  # (B, D, N) state that enters the row; BACKWARD: gradient of the one that leaves it; or None
    a_ptr,  # (D, N)
    sums_ptr,  # (B, segments, D)
    carried_ptr,  # (B, segments, D, N): see above
    segments, channels, size,
    BACKWARD: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace what segments add to states by the state that enters each segment.

    BACKWARD: by the gradient of the state that leaves it.
    """
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # in (D, N)
    mask = place < channels * size
    rates = tl.load(a_ptr + place, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634
    h = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        h = tl.load(initial_ptr + row * channels * size + place, mask=mask, other=0.0).to(tl.float32)
    carried_ptr += row * segments * channels * size + place
    sums_ptr += row * segments * channels + place // size
    zero = row * 0  # int64
    for begin in range(0, segments, STEPS):
        added = ()
        sums = ()
        for i in tl.static_range(STEPS):  # all loads before the stores, which the compiler keeps in order
            step = begin + i
            at = zero + (segments - 1 - step if BACKWARD else step)
            came = at + 1 if BACKWARD else at - 1  # the segment whose decay it takes to get here
            on = place < tl.where((step > 0) & (step < segments), channels * size, 0)
            added = added + (tl.load(carried_ptr + at * channels * size, mask=on, other=0.0),)  # noqa: RUF005
            sums = sums + (tl.load(sums_ptr + came * channels, mask=on, other=0.0),)  # noqa: RUF005
        for i in tl.static_range(STEPS):
            step = begin + i
            at = zero + (segments - 1 - step if BACKWARD else step)
            h = tl.where(sums[i] == float("inf"), 0.0, tl.exp2(sums[i] * rates) * h) + added[i]
            on = place < tl.where(step < segments, channels * size, 0)
            tl.store(carried_ptr + at * channels * size, h, mask=on)


@triton.jit(do_not_specialize=["length", "segment"])
def forward_kernel(
    x_ptr,  # (B, L, D)
    dt_ptr,  # (B, L, D)
    a_ptr,  # (D, N)
    b_ptr,  # (B, L, G, N)
    c_ptr,  # (B, L, G, N)
    d_ptr,  # (D) or None
    z_ptr,  # (B, L, D) or None
    bias_ptr,  # (D) or None
    kind_ptr,  # (B, L) or None, as above
    length, per_group, size, tiles, groups,
    stride_x_b, stride_x_l, stride_dt_b, stride_dt_l, stride_z_b, stride_z_l,
    stride_b_b, stride_b_l, stride_b_g, stride_c_b, stride_c_l, stride_c_g,
    segment,  # tokens of a segment, a multiple of SPAN
    initial_ptr,  # (B, D, N) or None
    carried_ptr,  # (B, segments, D, N) states that enter the segments, or None for one segment
    y_ptr,  # (B, L, D), contiguous
    final_ptr,  # (B, D, N)
    saved_ptr,  # (B, spans, D, N) or None
    SOFTPLUS: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a segment, the states that enter its spans, and after the last segment the final state."""
    group, inside, d, n = _tile(tl.program_id(0), tiles, per_group, BLOCK_D, BLOCK_N)
    row = tl.program_id(2).to(tl.int64)
    on_d = inside < per_group
    on_dn = on_d[:, None] & (n < size)[None, :]
    channels = groups * per_group
    start = tl.program_id(1).to(tl.int64) * segment
    chunks = ((tl.minimum(length - start, segment) + CHUNK - 1) // CHUNK).to(tl.int32)
    dn = d[:, None] * size + n[None, :]
    x_ptr += row * stride_x_b + start * stride_x_l
    dt_ptr += row * stride_dt_b + start * stride_dt_l
    b_ptr += row * stride_b_b + group * stride_b_g + start * stride_b_l
    c_ptr += row * stride_c_b + group * stride_c_g + start * stride_c_l
    y_ptr += (row * length + start) * channels
    rates = tl.load(a_ptr + dn, mask=on_dn, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = _read_bias(bias_ptr, d, on_d)
    if d_ptr is not None:
        skip = _read_vector(d_ptr, d, on_d)
    if z_ptr is not None:
        z_ptr += row * stride_z_b + start * stride_z_l
    if kind_ptr is not None:
        kind_ptr += row * length + start
    if saved_ptr is not None:
        saved_ptr += (row * ((length + SPAN - 1) // SPAN) + start // SPAN) * channels * size
    if carried_ptr is not None:
        at = row * tl.num_programs(1) + tl.program_id(1)
        h = tl.load(carried_ptr + at * channels * size + dn, mask=on_dn, other=0.0)
    elif initial_ptr is not None:
        h = tl.load(initial_ptr + row * channels * size + dn, mask=on_dn, other=0.0).to(tl.float32)
    else:
        h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)

    for _ in range(0, chunks):
        if saved_ptr is not None:  # noqa: SIM102
            if start % SPAN == 0:  # nested, because the outer condition is decided at compile time
                tl.store(saved_ptr + dn, h, mask=on_dn)
                saved_ptr += channels * size
        left = tl.minimum(length - start, CHUNK).to(tl.int32)
        tokens = ()
        maps = ()
        gates = ()
        for i in tl.static_range(CHUNK):
            token = _read_inputs(
                i, x_ptr, dt_ptr, b_ptr, kind_ptr, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
                inside, d, n,
            )  # fmt: skip
            tokens = tokens + (token,)  # noqa: RUF005 - Triton has no starred tuples
            maps = maps + (tl.load(c_ptr + (i * stride_c_l + n), mask=token[6], other=0.0),)  # noqa: RUF005
            if z_ptr is not None:
                gates = gates + (tl.load(z_ptr + (i * stride_z_l + d), mask=token[5], other=0.0),)  # noqa: RUF005
        for i in tl.static_range(CHUNK):
            h = _advance(h, tokens[i], rates, bias, SOFTPLUS)
            y = tl.sum(h * maps[i].to(tl.float32)[None, :], axis=1)
            if d_ptr is not None:
                y += skip * tokens[i][2].to(tl.float32)
            if z_ptr is not None:
                z = gates[i].to(tl.float32)
                y *= z * tl.sigmoid(z)
            within = inside < tl.where(i < left, per_group, 0)
            tl.store(y_ptr + (i * channels + d), y.to(y_ptr.dtype.element_ty), mask=within)
        start += CHUNK
        x_ptr += CHUNK * stride_x_l
        dt_ptr += CHUNK * stride_dt_l
        b_ptr += CHUNK * stride_b_l
        c_ptr += CHUNK * stride_c_l
        y_ptr += CHUNK * channels
        if z_ptr is not None:
            z_ptr += CHUNK * stride_z_l
        if kind_ptr is not None:
            kind_ptr += CHUNK
    if start >= length:
        tl.store(final_ptr + row * channels * size + dn, h.to(final_ptr.dtype.element_ty), mask=on_dn)


@triton.jit(do_not_specialize=["length", "together", "segment"])
def backward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, kind_ptr,  # as above
    length, per_group, size, tiles, groups,
    stride_x_b, stride_x_l, stride_dt_b, stride_dt_l, stride_z_b, stride_z_l,
    stride_b_b, stride_b_l, stride_b_g, stride_c_b, stride_c_l, stride_c_g,
    segment,  # as above
    together,  # tiles of a program
    dy_ptr,  # (B, L, D), contiguous like all gradients
    dleaving_ptr,  # (B, D, N), gradient of the state after the row
    carried_ptr,  # (B, segments, D, N) gradients of the states that leave the segments, or None for one segment
    saved_ptr,  # (B, spans, D, N)
    dx_ptr,  # (B, L, D)
    ddt_ptr,  # (B, L, D)
    da_ptr,  # (B, segments, D, N), may be `carried_ptr`
    parts_ptr,  # (programs of a group, 2, B, L, G, N) sums of dB and dC over the channels of a program
    dd_ptr,  # (B, segments, D) or None
    dz_ptr,  # (B, L, D) or None
    dbias_ptr,  # (B, segments, D) or None
    dentering_ptr,  # (B, D, N)
    SOFTPLUS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a segment, for `together` tiles in turn."""
    programs = (tiles + together - 1) // together  # of a group
    group = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    place = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channels = groups * per_group
    at = row * tl.num_programs(1) + place
    spans = (length + SPAN - 1) // SPAN
    maps = groups * size
    first = place.to(tl.int64) * segment
    x_ptr += row * stride_x_b
    dt_ptr += row * stride_dt_b
    b_ptr += row * stride_b_b + group * stride_b_g
    c_ptr += row * stride_c_b + group * stride_c_g
    dy_ptr += row * length * channels
    dx_ptr += row * length * channels
    ddt_ptr += row * length * channels
    if z_ptr is not None:
        z_ptr += row * stride_z_b
        dz_ptr += row * length * channels
    if kind_ptr is not None:
        kind_ptr += row * length
    db_ptr = parts_ptr + ((part.to(tl.int64) * 2 * tl.num_programs(2) + row) * length * groups + group) * size
    dc_ptr = db_ptr + tl.num_programs(2).to(tl.int64) * length * groups * size

    for index in range(0, tl.minimum(together, tiles - part * together)):
        _, inside, d, n = _tile(group * tiles + part * together + index, tiles, per_group, BLOCK_D, BLOCK_N)
        on_d = inside < per_group
        on_dn = on_d[:, None] & (n < size)[None, :]
        dn = d[:, None] * size + n[None, :]
        rates = tl.load(a_ptr + dn, mask=on_dn, other=0.0).to(tl.float32) * 1.4426950408889634
        bias = _read_bias(bias_ptr, d, on_d)
        if d_ptr is not None:
            skip = _read_vector(d_ptr, d, on_d)
        if carried_ptr is not None:
            carry = tl.load(carried_ptr + at * channels * size + dn, mask=on_dn, other=0.0)
        else:
            carry = tl.load(dleaving_ptr + row * channels * size + dn, mask=on_dn, other=0.0).to(tl.float32)
        da = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        dskip = tl.zeros((BLOCK_D,), tl.float32)
        dbias = tl.zeros((BLOCK_D,), tl.float32)
        spans_here = ((tl.minimum(length - first, segment) + SPAN - 1) // SPAN).to(tl.int32)
        start = first + spans_here * SPAN
        for _ in range(0, spans_here):
            start -= SPAN
            left = tl.minimum(length - start, SPAN).to(tl.int32)
            x_at, dt_at, b_at = x_ptr + start * stride_x_l, dt_ptr + start * stride_dt_l, b_ptr + start * stride_b_l
            c_at, db_at, dc_at = c_ptr + start * stride_c_l, db_ptr + start * maps, dc_ptr + start * maps
            dy_at, dx_at, ddt_at = dy_ptr + start * channels, dx_ptr + start * channels, ddt_ptr + start * channels
            kind_at = kind_ptr
            if kind_ptr is not None:
                kind_at += start
            if z_ptr is not None:
                z_at, dz_at = z_ptr + start * stride_z_l, dz_ptr + start * channels
            at_span = saved_ptr + (row * spans + start // SPAN) * channels * size + dn
            h = tl.load(at_span, mask=on_dn, other=0.0)
            marks = ()  # states before the chunks of the span, of which the first is read again
            for early in tl.static_range(SPAN // CHUNK - 1):
                h = _through_chunk(
                    h, early * CHUNK, x_at, dt_at, b_at, kind_at, left, per_group, size,
                    stride_x_l, stride_dt_l, stride_b_l, inside, d, n, rates, bias, SOFTPLUS, CHUNK,
                )  # fmt: skip
                marks = marks + (h,)  # noqa: RUF005
            chunks = (left + CHUNK - 1) // CHUNK
            for done in range(0, chunks):
                chunk = chunks - 1 - done
                begin = chunk * CHUNK
                state = tl.load(at_span, mask=on_dn & (n < tl.where(chunk == 0, size, 0))[None, :], other=0.0)
                for i in tl.static_range(1, SPAN // CHUNK):
                    state = tl.where(chunk == i, marks[i - 1], state)
                tokens = ()
                gates = ()
                dys = ()
                dbs = ()
                dcs = ()
                for i in tl.static_range(CHUNK):
                    t = begin + i
                    token = _read_inputs(
                        t, x_at, dt_at, b_at, kind_at, left, per_group, size, stride_x_l, stride_dt_l, stride_b_l,
                        inside, d, n,
                    )  # fmt: skip
                    tokens = tokens + (token,)  # noqa: RUF005
                    dys = dys + (_read_vector(dy_at, t * channels + d, token[5]),)  # noqa: RUF005
                    if z_ptr is not None:
                        gate = tl.load(z_at + (t * stride_z_l + d), mask=token[5], other=0.0)
                        gates = gates + (gate,)  # noqa: RUF005
                    others = n < tl.where((t < left) & (index > 0), size, 0)
                    dbs = dbs + (tl.load(db_at + (t * maps + n), mask=others, other=0.0),)  # noqa: RUF005
                    dcs = dcs + (tl.load(dc_at + (t * maps + n), mask=others, other=0.0),)  # noqa: RUF005
                states = (state,)  # before each token of the chunk, and after the last one
                for i in tl.static_range(CHUNK):
                    state = _advance(state, tokens[i], rates, bias, SOFTPLUS)
                    states = states + (state,)  # noqa: RUF005
                for back in tl.static_range(CHUNK):
                    t = begin + (CHUNK - 1 - back)
                    token = tokens[CHUNK - 1 - back]
                    live, starts, x, p = token[0], token[1], token[2].to(tl.float32), dys[CHUNK - 1 - back]
                    # Step sizes and maps are read again, so that no registers hold those of a chunk, or its decays.
                    again = tl.load(dt_at + (t * stride_dt_l + d), mask=token[5], other=0.0)
                    raw, dt = _step_size(again, bias, live, SOFTPLUS)
                    b = _read_vector(b_at, t * stride_b_l + n, token[6])
                    c = _read_vector(c_at, t * stride_c_l + n, token[6])
                    within = inside < tl.where(t < left, per_group, 0)
                    after = states[CHUNK - back]
                    if z_ptr is not None:
                        z = gates[CHUNK - 1 - back].to(tl.float32)
                        sigmoid = tl.sigmoid(z)
                        y = tl.sum(after * c[None, :], axis=1)
                        if d_ptr is not None:
                            y += skip * x
                        dz = p * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                        tl.store(dz_at + (t * channels + d), dz.to(dz_ptr.dtype.element_ty), mask=within)
                        p *= z * sigmoid
                    g = p[:, None] * c[None, :] + carry
                    carry = tl.where(starts, 0.0, _decay(dt, rates) * g)
                    e = carry * states[CHUNK - 1 - back]
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
                    tl.store(dx_at + (t * channels + d), dx.to(dx_ptr.dtype.element_ty), mask=within)
                    tl.store(ddt_at + (t * channels + d), ddt.to(ddt_ptr.dtype.element_ty), mask=within)
                    db = dbs[CHUNK - 1 - back] + tl.sum(g * (dt * x)[:, None], axis=0)
                    dc = dcs[CHUNK - 1 - back] + tl.sum(after * p[:, None], axis=0)
                    within_n = n < tl.where(t < left, size, 0)
                    tl.store(db_at + (t * maps + n), db, mask=within_n)
                    tl.store(dc_at + (t * maps + n), dc, mask=within_n)
        if place == 0:
            tl.store(dentering_ptr + row * channels * size + dn, carry, mask=on_dn)
        tl.store(da_ptr + at * channels * size + dn, da, mask=on_dn)
        if dd_ptr is not None:
            tl.store(dd_ptr + at * channels + d, dskip, mask=on_d)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + at * channels + d, dbias, mask=on_d)
        tl.debug_barrier()  # the next tile adds to the sums that this one has written
