"""Triton kernels of the SSD recurrence and of its one-token update, which :mod:`.ssd` runs on CUDA tensors.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length, c chunks; D skip, z gate.
With a_t the log-decay, s_t the scale of the input (the step size; 1 if there is none) and, inside a chunk, S_i the
inclusive sum of its a_t, T the sum over the chunk and h the state entering it,

    M_ij = (C_i . B_j) exp(S_i - S_j) s_j  for j <= i,
    y_i  = (sum_j M_ij x_j + exp(S_i) h C_i + D x_i) silu(z_i),      h' = exp(T) h + sum_j exp(T - S_j) s_j x_j (x) B_j.

The forward takes two launches: one walks the chunks with the state in registers and stores the state entering each, the
other computes the outputs of all chunks at once. The backward takes two again: the same walk from the end, over
(dy silu(z), exp(S) C) in place of (x, exp(T - S) s B), gives the gradient of the state leaving each chunk; then one
kernel per chunk recomputes M and the outputs before the gate. Neither a (Q, Q) matrix nor a sum of decays is written to
memory, and nothing of the size of x but y, dx and dz. Everything is summed in a fixed order: there are no atomics.

Two rules depend on the device's number of processors, so results may differ in rounding from device to device but not
from run to run. A row that is long for its number of heads is walked in stretches (:func:`_stretches`), and the
backward processes a row in sections (:func:`_sections`), whose temporary tensors are just large enough to fill the
device.

Offsets are 64-bit up to a chunk's first token and a head, and 32-bit inside the tile from there, which leaves registers
for the tiles.

The step does 5 operations on 8 bytes of state, so its time is that of moving the state to the registers and back: the
state is read once and written once, in one launch. A program takes some rows of P of one head, with all of N; up to
N = 128 a row stays inside a warp, so that its sum has one order whatever the tile, and a result does not depend on the
batch that it is computed in.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, tl, triton
from .tracing import opaque, tracing
from .triton_math import dot, load_gate, narrow, softplus, strides, unit_stride

# The device that an interpreted kernel assumes. With one processor, few tokens already make several sections.
_INTERPRETED_PROCESSORS, _INTERPRETED_CAPABILITY = 1, 9


def ssd_scan_triton(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_decay_t) h_{t-1} + scale_t x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t)`, differentiable.

    Documents and padding are already in the arguments: log-decays of -inf and of 0, zeros in x, B, C and z.

    Args:
        x: (B, L, H, P) inputs, L >= 1, not float64.
        scale: (B, L, H) float32 factors of the inputs, or None for one.
        log_decay: (B, L, H) float32, in [-inf, 0].
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        initial_state: (B, H, P, N) state before the first token; zero if not given.
        chunk_size: preferred chunk length, adjusted to a power of two from 16 to what fits (:func:`_tiles`).

    Returns:
        (B, L, H, P) outputs in the dtype of x and the (B, H, P, N) final state in float32.
    """
    dtype = x.dtype
    if not x.dtype == B.dtype == C.dtype:  # a dot product takes two operands of one dtype
        x, B, C = x.float(), B.float(), C.float()
    if D is not None:
        D = (D[:, None] if D.dim() == 1 else D).float().expand(x.shape[2:])
    if initial_state is not None:
        initial_state = initial_state.float()
    scan = _traced_scan if tracing() else _Scan.apply
    y, state = scan(x, scale, log_decay, B, C, D, z, initial_state, chunk_size)
    return y.to(dtype), state


class _Scan(torch.autograd.Function):
    """Saves the inputs and the states entering the chunks; decays, scores and M are recomputed.

    With g the gradient of the state leaving a chunk, o_i = dy_i silu(z_i) and dM_ij = (o_i . x_j) exp(S_i - S_j) s_j:
    dC_i = sum_j dM_ij B_j + exp(S_i) h^T o_i, dB_j = sum_i dM_ij C_i + exp(T - S_j) s_j g^T x_j,
    dx_j = sum_i M_ij o_i + exp(T - S_j) s_j g B_j + D o_j and
    ds_j = sum_i dM_ij / s_j (C_i . B_j) + exp(T - S_j) x_j . g B_j.

    d(log_decay)_k is the sum of all that passes from before k to k or later: dM_ij (C_i . B_j) for j < k <= i, what
    the tokens from k on read from h, what those before k leave in h', and exp(T) h . g. The shorter identity
    d(log_decay) = reverse cumulative sum of (y . dy - u . du) is not used: there, everything that does not pass k is
    added and subtracted again, so that its rounding swamps the gradient of a strong decay.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        x, B, C, z = map(unit_stride, (x, B, C, z))
        log_decay = log_decay.contiguous()
        scale = None if scale is None else scale.contiguous()
        chunk, _, _ = _tiles(x.shape[3], B.shape[3], x.dtype, chunk_size)
        chunks = triton.cdiv(x.shape[1], chunk)
        states = x.new_empty(x.shape[0], chunks, *x.shape[2:], B.shape[3])
        with torch.cuda.device_of(x):
            final_state = _walk(
                x, None, scale, log_decay, B, initial_state, states, 0, chunks, chunk_size, reverse=False
            )
            y = _output(x, scale, log_decay, B, C, D, z, states, chunk_size)
        ctx.save_for_backward(x, scale, log_decay, B, C, D, z, states)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, log_decay, B, C, D, z, states = ctx.saved_tensors
        outer = unit_stride(x.new_zeros(x.shape[3]).expand(x.shape) if dy is None else dy)
        arguments = (x, scale, log_decay, B, C, D, z, states, outer, dfinal_state, ctx.chunk_size)
        with torch.cuda.device_of(x):
            *gradients, dinitial_state = _gradients(*arguments)
        return *gradients, dinitial_state if ctx.needs_input_grad[7] else None, None


def _empty_results(x: Tensor, scale: Any, log_decay: Any, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, B.shape[3], dtype=torch.float32)


_traced_scan = opaque(
    _Scan,
    "scan",
    "Tensor x, Tensor? scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? initial_state, "
    "int? chunk_size",
    _empty_results,
)


def _tiles(width: int, size: int, dtype: torch.dtype, chunk_size: int | None) -> tuple[int, int, int]:
    """Return the tile sizes (Q, BLOCK_P, BLOCK_N): powers of two of at least 16, as tl.dot requires.

    The whole state size is one tile. A chunk's B and C are in shared memory together with two (BLOCK_P, BLOCK_N)
    states, and their gradients in registers, so Q and BLOCK_P shrink as N grows. Q = 64 balances the work
    inside chunks (grows with Q) and on states (with P N / Q) at the usual P = 64, N = 64 to 128 in 16 bits. float32
    has no tensor cores at full precision and twice the bytes. Chosen by the compiler's register and shared memory
    counts for compute capabilities 8.0 and 9.0, not by timings.
    """
    block_n = max(16, triton.next_power_of_2(size))
    half = dtype.itemsize == 2
    if half and block_n <= 128:
        largest, block_p = 64, 64
    elif block_n <= (256 if half else 128):
        largest, block_p = 32, 32
    else:
        largest, block_p = 16, 16
    chunk = largest if chunk_size is None else min(largest, max(16, triton.next_power_of_2(chunk_size)))
    return chunk, min(block_p, max(16, triton.next_power_of_2(width))), block_n


def _device(tensor: Tensor) -> tuple[int, int]:
    """Return the number of the device's processors and its major compute capability."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        return properties.multi_processor_count, properties.major
    return _INTERPRETED_PROCESSORS, _INTERPRETED_CAPABILITY


def _stretches(programs: int, chunks: int, processors: int) -> int:
    """Return the number of stretches of a row that are walked in parallel, each by `programs` programs.

    Every stretch is walked twice, first for its own contribution and then from the state that it starts with, so two
    stretches would gain nothing; from four on, the walk takes half the time or less. A processor runs two programs at
    no loss, and a stretch of fewer than four chunks is mostly start-up.
    """
    stretches = min(2 * processors // programs, chunks // 4)
    return stretches if stretches >= 4 else 1


def _sections(programs: int, chunks: int, processors: int) -> int:
    """Return the number of sections in which the backward processes rows whose chunks make `programs` programs.

    The gradients of a section's states and its partial sums of dB and dC take memory beside inputs, results and saved
    states. A program takes all registers of a processor (255 for each of 256 threads), so programs
    come in rounds of one per processor. Four rounds keep the device busy from section to section; fewer than twelve are
    divided by up to three, but a section keeps two, so that launches stay few. Not measured on a device yet.

    With 132 processors, P = 64, N = 128, 16 bits and one row, the peak of forward and backward, over inputs, outputs,
    all their gradients and the saved states, is at most 1.2 from six rounds on (380 MB without a gate) and 1.28 with
    four. Undivided, it is 1.6 with eight or four heads to a program, 85 MB above, and up to 2.6 with one, 42 MB above.
    Rows are not separated: many of a few chunks each keep such a ratio.
    """
    rounds = triton.cdiv(programs, processors)
    return min(max(triton.cdiv(rounds, 4), min(3, rounds // 2), 1), chunks)


def _walk(
    value: Tensor,
    z: Tensor | None,
    scale: Tensor | None,
    log_decay: Tensor,
    key: Tensor,
    start: Tensor | None,
    states: Tensor,
    first: int,
    count: int,
    chunk_size: int | None,
    reverse: bool,
) -> Tensor:
    """Walk over chunks `first` to `first + count`, or back from there if `reverse`.

    Args:
        value: (B, L, H, P), multiplied by `silu(z)` if there is a gate, and by `scale` if there is one.
        key: (B, L, G, N).
        start: (B, H, P, N) float32 state to start with, None for zero.
        states: (B, c, H, P, N), c >= `count`: takes the states entering the chunks, or leaving them if `reverse`.

    Returns:
        (B, H, P, N) float32 state at the end of the walk.
    """
    batch, length, heads, width = value.shape
    groups, size = key.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, key.dtype, chunk_size)
    # Smaller state tiles than elsewhere: this launch has only B H (P / BLOCK_P) programs to fill the device with.
    block_p = min(block_p, 32)
    tiles = triton.cdiv(width, block_p)
    processors, _ = _device(value)
    stretch = triton.cdiv(count, _stretches(tiles * heads * batch, count, processors))
    stretches = triton.cdiv(count, stretch)
    end = key.new_empty(batch, heads, width, size, dtype=torch.float32)
    summaries = passing = end
    if stretches > 1:
        # Of every stretch but the last: what it leaves when it starts with nothing, and its whole decay.
        summaries = end.new_empty(batch, stretches - 1, heads, width, size)
        passing = end.new_empty(batch, stretches - 1, heads)
    for summary in (True, False) if stretches > 1 else (False,):
        walk_kernel[(tiles, heads, batch * (stretches - summary))](
            *(value, value if z is None else z, key, log_decay, log_decay if scale is None else scale),
            *(end if start is None else start.contiguous(), states, end, summaries, passing, length, first),
            *(count, stretch, stretches, states.shape[1], heads, heads // groups),
            *value.stride()[:3],
            *(value if z is None else z).stride()[:3],
            *key.stride()[:3],
            WIDTH=width,
            SIZE=size,
            REVERSE=reverse,
            SUMMARY=summary,
            HAS_START=start is not None,
            HAS_SCALE=scale is not None,
            HAS_Z=z is not None,
            SPLIT=key.dtype != torch.float32,
            Q=chunk,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=4 if key.dtype != torch.float32 else 8,
            num_stages=2,
        )
    return end


def _output(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    states: Tensor,
    chunk_size: int | None,
) -> Tensor:
    """Return the (B, L, H, P) outputs, computing every chunk from the state entering it."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    _, capability = _device(x)
    # Where the operands of a product do not stay in shared memory, they take the registers of wider tiles.
    block_p = block_p if capability >= 9 else min(block_p, 32)
    y = x.new_empty(x.shape)
    output_kernel[(batch * states.shape[1] * heads,)](
        *(x, log_decay, log_decay if scale is None else scale, B, C, x if D is None else D),
        *(x if z is None else z, states, y, length, states.shape[1], heads, heads // groups),
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *strides(D, 2),
        *(x if z is None else z).stride()[:3],
        WIDTH=width,
        SIZE=size,
        HAS_SCALE=scale is not None,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        Q=chunk,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        EMULATE=INTERPRETED,
        num_warps=4 if x.dtype != torch.float32 else 8,
        num_stages=1,
    )
    return y


def _gradients(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dstate: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor | None, ...]:
    """Return gradients of x, scale, log_decay, B, C, D, z and the initial state, section by section from the end."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    chunks = states.shape[1]
    processors, capability = _device(x)
    # As there; and here dB and dC take registers too.
    block_p = min(block_p, 32 if x.dtype.itemsize == 2 and block_n <= 128 and capability >= 9 else 16)
    # A program adds up dB and dC over some heads of a group, which saves that many recomputations of C B^T and as
    # much memory for partial sums, as long as there are programs enough.
    together = math.gcd(heads // groups, 8)
    while together > 1 and batch * chunks * heads // together < 2 * processors:
        together //= 2
    parts = heads // together
    sections = _sections(batch * chunks * parts, chunks, processors)
    capacity = triton.cdiv(chunks, sections)  # chunks of a section
    # For compute capability 8.0, ptxas takes 32 registers for this kernel and spills the rest unless told the limit.
    limit = {"maxnreg": 255} if capability < 9 else {}
    dx = x.new_empty(x.shape)
    dscale = None if scale is None else torch.empty_like(scale)
    dlog_decay = torch.empty_like(log_decay)
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dz = None if z is None else z.new_empty(z.shape)
    dD = None if D is None else x.new_empty(batch, chunks, heads, width, dtype=torch.float32)
    dstates = states.new_empty(batch, capacity, heads, width, size)
    dB_parts = x.new_empty(batch, capacity * chunk, parts, size, dtype=torch.float32)
    dC_parts = torch.empty_like(dB_parts)
    for first in reversed(range(0, chunks, capacity)):
        count = min(capacity, chunks - first)
        dstate = _walk(dy, z, None, log_decay, C, dstate, dstates, first, count, chunk_size, reverse=True)
        chunk_gradients_kernel[(batch * count * parts,)](
            *(x, log_decay, log_decay if scale is None else scale, B, C, x if D is None else D),
            *(x if z is None else z, states, dy, dstates, dx, dlog_decay),
            *(dlog_decay if dscale is None else dscale, dB_parts, dC_parts, dx if dD is None else dD),
            *(dx if dz is None else dz, length, chunks, first, count, capacity, heads, heads // groups),
            *x.stride()[:3],
            *B.stride()[:3],
            *C.stride()[:3],
            *strides(D, 2),
            *(x if z is None else z).stride()[:3],
            *dy.stride()[:3],
            TOGETHER=together,
            WIDTH=width,
            SIZE=size,
            HAS_SCALE=scale is not None,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            Q=chunk,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=8,
            num_stages=1,
            **limit,
        )
        part = slice(first * chunk, min((first + count) * chunk, length))
        tokens = part.stop - part.start
        for whole, sums in ((dB, dB_parts), (dC, dC_parts)):
            whole[:, part] = sums[:, :tokens].unflatten(2, (groups, -1)).sum(3)
    return dx, dscale, dlog_decay, dB, dC, None if dD is None else dD.sum((0, 1)), dz, dstate


@triton.jit
def _decay_sums(log_decay_ptr, offsets, mask):
    """Return inclusive sums, in two parts, of a chunk's log2-decays.

    A decay of less than 2^-256 is zero in float32, and so is every product with it; the bound makes -inf finite. The
    first part sums multiples of 2^-9 up to 64 * 256, which float32 holds exactly; the second sums rests of at most
    2^-10. So a difference of two sums is as good as the sum of the terms between: with one sum, at -4000, what a mild
    decay adds would be lost.
    """
    a = tl.load(log_decay_ptr + offsets, mask=mask, other=0.0) * 1.4426950408889634
    a = tl.where(a < -256.0, -256.0, a)  # keeps a NaN, unlike maximum
    coarse = tl.floor(a * 512.0 + 0.5) * 0.001953125
    return tl.cumsum(coarse, 0), tl.cumsum(a - coarse, 0)


@triton.jit
def _to_end(coarse, fine, rows, Q: tl.constexpr):
    """Return the decays from each token to the chunk's end, and the one over the whole chunk."""
    last = rows == Q - 1
    coarse_end = tl.sum(tl.where(last, coarse, 0.0), 0)
    fine_end = tl.sum(tl.where(last, fine, 0.0), 0)
    return tl.exp2((coarse_end - coarse) + (fine_end - fine)), tl.exp2(coarse_end + fine_end)


@triton.jit
def _between(coarse, fine, rows, BY_SOURCE: tl.constexpr):
    """Return (Q target, Q source) decays from tokens to later ones, zero above the diagonal; or the transpose."""
    sums = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    counts = rows[:, None] >= rows[None, :]
    if BY_SOURCE:
        sums = -sums
        counts = rows[:, None] <= rows[None, :]
    # Masked before exp2: on the other side of the diagonal the differences are positive.
    return tl.exp2(tl.where(counts, sums, -256.0))


@triton.jit(do_not_specialize=["length", "first", "count", "stretch", "stretches", "capacity"])
def walk_kernel(
    value_ptr, z_ptr, key_ptr, log_decay_ptr, scale_ptr, start_ptr, states_ptr, end_ptr, summary_ptr, passing_ptr,
    length, first, count, stretch, stretches, capacity, heads, per_group,
    value_batch, value_token, value_head, z_batch, z_token, z_head, key_batch, key_token, key_group,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr, HAS_START: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_Z: tl.constexpr, SPLIT: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    walked = stretches
    if SUMMARY:
        walked = stretches - 1  # no one starts where the last ends
    batch = (tl.program_id(2) // walked).to(tl.int64)
    place = tl.program_id(2) % walked
    rows = tl.arange(0, Q)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p = p < WIDTH
    in_n = n < SIZE
    in_state = in_n[:, None] & in_p[None, :]
    inside = n[:, None] + p[None, :] * SIZE  # (P, N) offsets in a head's state
    value_ptr += batch * value_batch + head * value_head
    z_ptr += batch * z_batch + head * z_head
    key_ptr += batch * key_batch + (head // per_group) * key_group
    dtype = key_ptr.dtype.element_ty

    row_state = (batch * heads + head) * (WIDTH * SIZE)
    passing = batch * (stretches - 1) * heads + head  # of the row's first stretch
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    decay = tl.full((), 1.0, dtype=tl.float32)
    if not SUMMARY:
        if HAS_START:
            state = tl.load(start_ptr + row_state + inside, mask=in_state, other=0.0)
        for before in range(place):
            at = passing + before * heads
            left = tl.load(summary_ptr + at * (WIDTH * SIZE) + inside, mask=in_state, other=0.0)
            state = state * tl.load(passing_ptr + at) + left
    for step in range(place * stretch, tl.minimum((place + 1) * stretch, count)):
        index = step
        if REVERSE:
            index = count - 1 - step
        if not SUMMARY:
            at = ((batch * capacity + index) * heads + head) * (WIDTH * SIZE)
            tl.store(states_ptr + at + inside, narrow(state, dtype, EMULATE), mask=in_state)

        begin = (tl.zeros((), dtype=tl.int64) + first + index) * Q
        present = rows < tl.minimum(length - begin, Q).to(tl.int32)
        scalars = (batch * length + begin) * heads + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        weight, whole = _to_end(coarse, fine, rows, Q)
        if REVERSE:
            weight = tl.exp2(coarse + fine)
        if HAS_SCALE:
            weight *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)
        in_value = present[:, None] & in_p[None, :]
        value = tl.load(
            value_ptr + begin * value_token + rows[:, None] * value_token + p[None, :], mask=in_value, other=0.0
        ).to(tl.float32)  # (Q, P)
        if HAS_Z:
            _, gate = load_gate(z_ptr + begin * z_token, rows[:, None] * z_token + p[None, :], in_value)
            value *= gate
        key = tl.load(
            key_ptr + begin * key_token + rows[:, None] * key_token + n[None, :],
            mask=present[:, None] & in_n[None, :],
            other=0.0,
        )  # (Q, N)
        weighted = value * weight[:, None]
        state *= whole
        decay *= whole
        if SPLIT:
            # The state adds up a whole row. Two half-precision terms keep 16 or more bits of the weighted values,
            # where rounding them once would leave 8: the final state is as good as float32 sums of the given inputs.
            high = narrow(weighted, dtype, EMULATE)
            low = narrow(weighted - high.to(tl.float32), dtype, EMULATE)
            state = dot(tl.trans(key), high, state, EMULATE)
            state = dot(tl.trans(key), low, state, EMULATE)
        else:
            state = dot(tl.trans(key), weighted, state, EMULATE)
    if SUMMARY:
        at = passing + place * heads
        tl.store(summary_ptr + at * (WIDTH * SIZE) + inside, state, mask=in_state)
        tl.store(passing_ptr + at, decay)  # the same from every tile of the head
    elif place == stretches - 1:
        tl.store(end_ptr + row_state + inside, state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def output_kernel(
    x_ptr, log_decay_ptr, scale_ptr, B_ptr, C_ptr, D_ptr, z_ptr, states_ptr, y_ptr,
    length, chunks, heads, per_group,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, D_head, D_width, z_batch,
    z_token, z_head,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # neighbours are heads of one chunk, which read the same B and C
    head = program % heads
    chunk = (program // heads) % chunks
    batch = program // heads // chunks
    group = head // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_n = n < SIZE
    begin = chunk * Q
    present = rows < tl.minimum(length - begin, Q).to(tl.int32)
    in_maps = present[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    scalars = first_row + head
    coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
    mix = dot(C, tl.trans(B), None, EMULATE) * _between(coarse, fine, rows, False)  # (Q target, Q source)
    if HAS_SCALE:
        mix *= tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)[None, :]
    mix = narrow(mix, dtype, EMULATE)
    from_start = tl.exp2(coarse + fine)[:, None]
    x_ptr += batch * x_batch + begin * x_token + head * x_head
    D_ptr += head * D_head
    z_ptr += batch * z_batch + begin * z_token + head * z_head
    y_ptr += scalars * WIDTH
    states_ptr += program * (WIDTH * SIZE)
    for first in range(0, WIDTH, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        in_p = p < WIDTH
        in_x = present[:, None] & in_p[None, :]
        state = tl.load(
            states_ptr + p[:, None] * SIZE + n[None, :], mask=in_p[:, None] & in_n[None, :], other=0.0
        )  # (P, N)
        x = tl.load(x_ptr + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
        y = dot(C, tl.trans(state), None, EMULATE) * from_start
        y = dot(mix, x, y, EMULATE)
        if HAS_D:
            y += x.to(tl.float32) * tl.load(D_ptr + p * D_width, mask=in_p, other=0.0)[None, :]
        if HAS_Z:
            _, gate = load_gate(z_ptr, rows[:, None] * z_token + p[None, :], in_x)
            y *= gate
        y = narrow(y, y_ptr.dtype.element_ty, EMULATE)
        tl.store(y_ptr + rows[:, None] * (heads * WIDTH) + p[None, :], y, mask=in_x)


@triton.jit(do_not_specialize=["length", "chunks", "first", "count", "capacity"])
def chunk_gradients_kernel(
    x_ptr, log_decay_ptr, scale_ptr, B_ptr, C_ptr, D_ptr, z_ptr, states_ptr, dy_ptr, dstates_ptr, dx_ptr,
    dlog_decay_ptr, dscale_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr,
    length, chunks, first, count, capacity, heads, per_group,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, D_head, D_width, z_batch,
    z_token, z_head, dy_batch, dy_token, dy_head,
    TOGETHER: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    parts = heads // TOGETHER
    part = program % parts
    index = (program // parts) % count
    batch = program // parts // count
    chunk = first + index
    group = part * TOGETHER // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_n = n < SIZE
    begin = chunk * Q
    present = rows < tl.minimum(length - begin, Q).to(tl.int32)
    in_maps = present[:, None] & in_n[None, :]
    first_row = (batch * length + begin) * heads
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    B = tl.load(B_ptr + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
    # This kernel is short of registers. What is computed elementwise enters products on the right, by way of shared
    # memory, where the left would have it a second time in the layout of an operand; and products are added up with a
    # factor each, because one product that starts from another makes the compiler lay both out twice over the warps.
    scores = dot(B, tl.trans(C), None, EMULATE)  # (Q source, Q target)
    dB = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    dC = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    x_ptr += batch * x_batch + begin * x_token
    z_ptr += batch * z_batch + begin * z_token
    dy_ptr += batch * dy_batch + begin * dy_token
    for place in range(TOGETHER):
        head = part * TOGETHER + place
        scalars = first_row + head
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        to_end, whole = _to_end(coarse, fine, rows, Q)
        from_start = tl.exp2(coarse + fine)
        scale = tl.full((Q,), 1.0, dtype=tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + scalars + rows * heads, mask=present, other=0.0)
        mix = narrow(scores * _between(coarse, fine, rows, True), dtype, EMULATE)

        dmix = tl.zeros((Q, Q), dtype=tl.float32)  # x_j . dy_i
        read = tl.zeros((Q,), dtype=tl.float32)  # by each token from the state entering
        left = tl.zeros((Q,), dtype=tl.float32)  # by each token in the state leaving, without its scale
        passed = tl.zeros((BLOCK_P,), dtype=tl.float32)  # from the one to the other
        of_head = (batch * chunks + chunk) * heads + head
        state_ptr = states_ptr + of_head * (WIDTH * SIZE)
        dstate_ptr = dstates_ptr + ((batch * capacity + index) * heads + head) * (WIDTH * SIZE)
        for begin_p in range(0, WIDTH, BLOCK_P):
            p = begin_p + tl.arange(0, BLOCK_P)
            in_p = p < WIDTH
            in_x = present[:, None] & in_p[None, :]
            in_state = in_p[:, None] & in_n[None, :]
            inside = p[:, None] * SIZE + n[None, :]
            dense = scalars * WIDTH + rows[:, None] * (heads * WIDTH) + p[None, :]
            x = tl.load(x_ptr + head * x_head + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
            dy = tl.load(dy_ptr + head * dy_head + rows[:, None] * dy_token + p[None, :], mask=in_x, other=0.0)
            state = tl.load(state_ptr + inside, mask=in_state, other=0.0)  # (P, N)
            carried = dot(C, tl.trans(state), None, EMULATE) * from_start[:, None]  # (Q, P), a term of y
            if HAS_D:
                D = tl.load(D_ptr + head * D_head + p * D_width, mask=in_p, other=0.0)
            through = dy.to(tl.float32)  # what reaches the output before the gate
            if HAS_Z:
                smooth, gate = load_gate(z_ptr + head * z_head, rows[:, None] * z_token + p[None, :], in_x)
                slope = through * (smooth + gate * (1.0 - smooth))
                dz = carried * slope
                scaled = narrow(x.to(tl.float32) * scale[:, None], dtype, EMULATE)
                dz += dot(tl.trans(mix), scaled, None, EMULATE) * slope
                if HAS_D:
                    dz += x.to(tl.float32) * D[None, :] * slope
                tl.store(dz_ptr + dense, narrow(dz, dz_ptr.dtype.element_ty, EMULATE), mask=in_x)
                through *= gate
                dy = narrow(through, dtype, EMULATE)
            dmix = dot(x, tl.trans(dy), dmix, EMULATE)
            read += tl.sum(carried * through, 1)
            weighted = narrow(through * from_start[:, None], dtype, EMULATE)
            dC = dot(tl.trans(state), tl.trans(weighted), dC, EMULATE)

            dstate = tl.load(dstate_ptr + inside, mask=in_state, other=0.0)
            passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            du = dot(B, tl.trans(dstate), None, EMULATE) * to_end[:, None]  # (Q, P), the gradient of scale * x
            left += tl.sum(du * x.to(tl.float32), 1)
            weighted = narrow(x.to(tl.float32) * (to_end * scale)[:, None], dtype, EMULATE)
            dB = dot(tl.trans(dstate), tl.trans(weighted), dB, EMULATE)

            dx = dot(mix, dy, None, EMULATE) * scale[:, None] + du * scale[:, None]
            if HAS_D:
                dx += through * D[None, :]
                skipped = tl.sum(through * x.to(tl.float32), 0)
                tl.store(dD_ptr + of_head * WIDTH + p, skipped, mask=in_p)
            tl.store(dx_ptr + dense, narrow(dx, dtype, EMULATE), mask=in_x)

        # Loaded and summed again: kept, the decays between tokens would take up registers all along the loop.
        coarse, fine = _decay_sums(log_decay_ptr + scalars, rows * heads, present)
        dmix *= _between(coarse, fine, rows, True)
        flow = dmix * scores
        if HAS_SCALE:
            tl.store(dscale_ptr + scalars + rows * heads, tl.sum(flow, 1) + left, mask=present)
            dmix *= scale[:, None]
            flow *= scale[:, None]
            left *= scale
        half = narrow(dmix, dtype, EMULATE)
        dC = dot(tl.trans(B), half, dC, EMULATE)
        dB = dot(tl.trans(C), tl.trans(half), dB, EMULATE)

        # What passes from before k to k or later: from token to token, into the state leaving, from the one entering.
        flow = tl.cumsum(flow, 1, reverse=True) + left[:, None]
        crossing = tl.sum(tl.where(rows[:, None] < rows[None, :], flow, 0.0), 0)
        crossing += tl.cumsum(read, 0, reverse=True) + whole * tl.sum(passed, 0)
        tl.store(dlog_decay_ptr + scalars + rows * heads, crossing, mask=present)

    # (B, capacity Q, parts, N)
    partial = ((batch * capacity + index) * Q * parts + part) * SIZE
    offsets = rows[None, :] * (parts * SIZE) + n[:, None]
    in_partial = in_n[:, None] & present[None, :]
    tl.store(dB_ptr + partial + offsets, dB, mask=in_partial)
    tl.store(dC_ptr + partial + offsets, dC, mask=in_partial)


# States of a program, and the number of programs from which on it is used. A warp takes 512 states, 16 for a thread:
# four loads of 16 bytes, on their way at once. Small programs are for small batches, which the large ones would not
# spread over 132 processors (H100, H200). Triton 3.9 compiles both without spilled registers, with 40 to 64 a thread
# (80 where nothing is aligned), on sm_80 and sm_90; neither is measured on a device.
_TILES = ((2048, 512), (512, 0))
_STATES_OF_A_WARP = 512


def ssd_step_triton(
    state: Tensor,
    x: Tensor,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run one token on checked arguments, without a gradient; `state` is updated in place.

    Args:
        state: (B, H, P, N) float32 state. Any strides, as for all arguments: none is copied.
        x: (B, H, P) input.
        decay: (B, H) step sizes, or logarithms of the decay if there is no `A`.
        A: (H) decay rates, or None.
        B: (B, G, N) input map.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to the step sizes.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range that the step sizes are clamped to.

    Returns:
        (B, H, P) output in the dtype of `x`.
    """
    batch, heads, width, size = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_p, block_n, warps = _tile(batch * heads, width, size)
    with torch.cuda.device_of(x):
        _step_kernel[triton.cdiv(width, block_p), heads, batch](
            *(state, x, decay, A, B, C, D, z, dt_bias, y),
            *(float(limit) for limit in dt_limit),
            heads // B.shape[1],
            *state.stride(),
            *x.stride(),
            *decay.stride(),
            *strides(A, 1),
            *B.stride(),
            *C.stride(),
            *strides(D, 2),
            *strides(z, 3),
            *strides(dt_bias, 1),
            WIDTH=width,
            SIZE=size,
            SOFTPLUS=dt_softplus,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=warps,
        )
    return y


def _tile(heads: int, width: int, size: int) -> tuple[int, int, int]:
    """Return (BLOCK_P, BLOCK_N, warps) for a number of heads, counted over all rows of the batch."""
    block_n = triton.next_power_of_2(size)
    block_p = 1
    for states, fewest in _TILES:
        block_p = min(max(states // block_n, 1), triton.next_power_of_2(width))
        if heads * triton.cdiv(width, block_p) >= fewest:
            break
    return block_p, block_n, min(max(block_p * block_n // _STATES_OF_A_WARP, 1), 8)


@triton.jit
def _step_kernel(
    state_ptr, x_ptr, decay_ptr,
    a_ptr,  # None: the decays are given
    b_ptr, c_ptr,
    d_ptr,  # or None, as the next two
    z_ptr, bias_ptr,
    y_ptr,  # contiguous
    lowest, highest, per_group,
    state_batch, state_head, state_p, state_n, x_batch, x_head, x_p, decay_batch, decay_head, a_head, b_batch,
    b_group, b_n, c_batch, c_group, c_n, d_head, d_p, z_batch, z_head, z_p, bias_head,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = head // per_group
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside_p, inside_n = p < WIDTH, n < SIZE
    inside = inside_p[:, None] & inside_n[None, :]
    held = state_ptr + batch * state_batch + head * state_head + p[:, None] * state_p + n[None, :] * state_n
    h = tl.load(held, mask=inside, other=0.0)
    x = tl.load(x_ptr + batch * x_batch + head * x_head + p * x_p, mask=inside_p, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * b_batch + group * b_group + n * b_n, mask=inside_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + batch * c_batch + group * c_group + n * c_n, mask=inside_n, other=0.0).to(tl.float32)

    log_decay = tl.load(decay_ptr + batch * decay_batch + head * decay_head).to(tl.float32)
    u = x
    if a_ptr is not None:
        dt = log_decay
        if bias_ptr is not None:
            dt += tl.load(bias_ptr + head * bias_head).to(tl.float32)
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(dt < lowest, lowest, dt)  # keeps a NaN, unlike maximum
        dt = tl.where(dt > highest, highest, dt)
        log_decay = dt * tl.load(a_ptr + head * a_head).to(tl.float32)
        u = dt * x
    h = h * tl.exp(log_decay) + u[:, None] * b[None, :]
    tl.store(held, h, mask=inside)

    y = tl.sum(h * c[None, :], axis=1)
    if d_ptr is not None:
        y += tl.load(d_ptr + head * d_head + p * d_p, mask=inside_p, other=0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_batch + head * z_head + p * z_p, mask=inside_p, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    place = (batch * tl.num_programs(1) + head) * WIDTH + p
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty, EMULATE), mask=inside_p)
