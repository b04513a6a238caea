"""Triton kernels of the SSD recurrence and of its one-token step, which :mod:`.ssd` runs on CUDA tensors.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length, c chunks; D skip, z gate.
With a_t the log-decay, s_t the scale of the input (the step size, or 1) and, inside a chunk, S_i the inclusive sum of
a_t, T the sum over the chunk and h the state entering it,

    M_ij = (C_i . B_j) exp(S_i - S_j) s_j  for j <= i,
    y_i  = (sum_j M_ij x_j + exp(S_i) h C_i + D x_i) silu(z_i),      h' = exp(T) h + sum_j exp(T - S_j) s_j x_j (x) B_j.

A span is four chunks. The forward has two launches: the first walks over the row with the state in registers and stores
the state entering each span, the second walks over the chunks of all spans in parallel and computes the outputs. If
there will be a backward, the first stores the state entering each chunk. The backward has three: the same walk from
the end, over (dy silu(z), exp(S) C) instead of (x, exp(T - S) s B), gives the gradient of the state leaving each chunk;
then the two kernels of :mod:`.ssd_gradients_triton` recompute M and the outputs before the gate. Step sizes and sums of
decays are computed before, once for all, by :mod:`.ssd_decays_triton`, and so are their gradients afterwards. No (Q, Q)
matrix is written to memory; the only tensors of the size of x are y, dx and dz. There are no atomics: every sum has a
fixed order.

Two rules depend on the number of processors, so results may differ in rounding between devices, but not between runs.
A row that is long for its number of heads is walked in stretches (:func:`_stretches`), and the backward processes a
row in sections (:func:`_sections`), whose temporary tensors are just large enough to fill the device.

Offsets are 64-bit up to a chunk's first token and a head, and 32-bit inside a tile, which saves registers.

The step does 5 operations per 8 bytes of state, so it is limited by memory traffic: one launch reads and writes the
state once. A program takes some rows of P of one head, with all of N. Up to N = 128 a row stays inside a warp, so that
the order of its sum does not depend on the tile, nor a result on the batch.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, tl, triton
from .checks import recorded
from .ssd_decays_triton import CHUNKS_OF_SPAN, DecayGradients, Decays, decay_sums, real_tokens, sums_before
from .ssd_gradients_triton import ChunkGradients, times_vector
from .tracing import launch, opaque, tracing
from .triton_math import dot, load_gate, narrow, softplus, strides, unit_stride

# The device that interpreted kernels assume. With one processor, a few tokens already make several sections.
_INTERPRETED_PROCESSORS, _INTERPRETED_CAPABILITY = 1, 9


def ssd_scan_triton(
    x: Tensor,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    marks: Tensor | None = None,
    final: bool = True,
    chunk_size: int | None = None,
    row_sums: bool = False,
) -> tuple[Tensor, ...]:
    """Compute `h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t)`.

    Differentiable. What the arguments hold at padding is not read.

    Args:
        x: (B, L, H, P) inputs, L >= 1, not float64.
        decay: (B, L, H) step sizes, before bias, softplus and limits; log-decays in [-inf, 0] if `A` is None, and then
            nothing multiplies the inputs.
        A: (H) decay rates, or None.
        B: (B, L, G, N) input maps; G divides H.
        C: (B, L, G, N) output maps.
        D: (H) or (H, P) skip.
        z: (B, L, H, P) gate.
        initial_state: (B, H, P, N) state before the first token, (B, H, P + 1, N) with `row_sums`; zero if not given.
        dt_bias: (H) added to the step sizes.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range to which the step sizes are clamped.
        marks: (B, L) int8: 1 for a token that forgets everything before it, 2 for padding, whose decay is one, else 0.
        final: whether the final state is of interest; if not, it is less accurate in 16 bits.
        chunk_size: preferred chunk length, rounded to a power of two between 16 and what fits (:func:`_tiles`).
        row_sums: compute the outputs of an additional input that is always 1, without skip and gate, whose state is the
            last of P + 1 rows; `A` must be None.

    Returns:
        (B, L, H, P) outputs in the dtype of x; in float32, the (B, H, P or P + 1, N) final state and the (B, L, H) row
        sums, or an empty tensor.
    """
    dtype = x.dtype
    if not x.dtype == B.dtype == C.dtype:  # the operands of a dot product must have one dtype
        x, B, C = x.float(), B.float(), C.float()
    if D is not None:
        D = (D[:, None] if D.dim() == 1 else D).float()
    if initial_state is not None:
        initial_state = initial_state.float()
    scan = _traced_scan if tracing() else _Scan.apply
    # While a graph is traced, it is not known yet whether there will be a backward.
    kept = tracing() or recorded(x, decay, A, B, C, D, z, initial_state, dt_bias)
    options = dt_softplus, *map(float, dt_limit), final, kept, chunk_size, row_sums
    y, *others = scan(x, decay, A, B, C, D, z, initial_state, dt_bias, marks, *options)
    return y.to(dtype), *others


class _Scan(torch.autograd.Function):
    """The Triton scan; saves the inputs, the sums of decays and the states entering the chunks.

    With g the gradient of the state leaving a chunk, o_i = dy_i silu(z_i) and dM_ij = (o_i . x_j) exp(S_i - S_j) s_j:
    dC_i = sum_j dM_ij B_j + exp(S_i) h^T o_i, dB_j = sum_i dM_ij C_i + exp(T - S_j) s_j g^T x_j,
    dx_j = sum_i M_ij o_i + exp(T - S_j) s_j g B_j + D o_j and
    ds_j = sum_i dM_ij / s_j (C_i . B_j) + exp(T - S_j) x_j . g B_j.

    d(log_decay)_k sums every contribution that crosses token k: dM_ij (C_i . B_j) for j < k <= i, the reads of h by
    tokens from k on, the contributions of tokens before k to h', and exp(T) h . g. `ssd._Scan` says why a shorter
    identity is not used.

    Row sums are outputs for x = 1 and have the same gradients, except that of x.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, decay, A, B, C, D, z, initial_state, dt_bias, marks, *ctx.options, final, kept = arguments[:-2]
        ctx.chunk_size, ctx.row_sums = arguments[-2:]
        x, B, C, z = map(unit_stride, (x, B, C, z))
        chunk, _, _ = _tiles(x.shape[3], B.shape[3], x.dtype, ctx.chunk_size)
        chunks = triton.cdiv(x.shape[1], chunk)
        # The backward needs the states entering all chunks, the outputs every fourth.
        interval = 1 if kept and any(ctx.needs_input_grad) else CHUNKS_OF_SPAN
        batch, length, heads, width = x.shape
        states = x.new_empty(batch, triton.cdiv(chunks, interval), heads, width + ctx.row_sums, B.shape[3])
        row_sums = x.new_empty((batch, length, heads) if ctx.row_sums else 0, dtype=torch.float32)
        with torch.cuda.device_of(x):
            sums = decay_sums(Decays(decay, A, dt_bias, marks, *ctx.options), chunk)
            operands = x, sums, B, C, D, z, states
            end = _walk(
                *(x, None, None, sums, marks, B, initial_state, states, 0, chunks, ctx.chunk_size),
                reverse=False,
                interval=interval,
                accurate=final,
            )
            spans = states[:, :: CHUNKS_OF_SPAN // interval]
            y = _output(*operands[:-1], spans, row_sums if ctx.row_sums else None, marks, ctx.chunk_size)
        ctx.save_for_backward(*operands, decay, A, dt_bias, marks)
        ctx.set_materialize_grads(False)
        return y, end, row_sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, drow_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *operands, decay, A, dt_bias, marks = ctx.saved_tensors
        x = operands[0]
        outer = unit_stride(x.new_zeros(x.shape[3]).expand(x.shape) if dy is None else dy)
        if not ctx.row_sums:
            drow_sums = None  # of the empty tensor
        elif drow_sums is None and dfinal_state is not None:
            drow_sums = x.new_zeros(x.shape[:3], dtype=torch.float32)
        decays = Decays(decay, A, dt_bias, marks, *ctx.options)
        results = outer, None if drow_sums is None else drow_sums.contiguous(), dfinal_state
        with torch.cuda.device_of(x):
            gradients = _gradients(*operands, *results, decays, ctx.needs_input_grad[7], ctx.chunk_size)
        dx, ddecay, dA, dB, dC, dD, dz, dinitial_state, dt_bias_gradient = gradients
        if not ctx.needs_input_grad[7]:
            dinitial_state = None
        elif ctx.row_sums and drow_sums is None and dinitial_state is not None:
            dinitial_state = F.pad(dinitial_state, (0, 0, 0, 1))
        return dx, ddecay, dA, dB, dC, dD, dz, dinitial_state, dt_bias_gradient, *[None] * 8


def _empty_results(x: Tensor, decay: Any, A: Any, B: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, row_sums = others
    batch, length, heads, width = x.shape
    shapes = (batch, heads, width + row_sums, B.shape[3]), (batch, length, heads) if row_sums else (0,)
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


_traced_scan = opaque(
    _Scan,
    "scan",
    "Tensor x, Tensor decay, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? initial_state, "
    "Tensor? dt_bias, Tensor? marks, bool dt_softplus, float lowest, float highest, bool final, bool kept, "
    "int? chunk_size, bool row_sums",
    _empty_results,
    results=3,
)


def _tiles(width: int, size: int, dtype: torch.dtype, chunk_size: int | None) -> tuple[int, int, int]:
    """Return the tile sizes (Q, BLOCK_P, BLOCK_N), powers of two of at least 16, as tl.dot requires.

    One tile covers the whole state size. Shared memory holds a chunk's B and C and two (BLOCK_P, BLOCK_N) states, and
    registers hold their gradients, so Q and BLOCK_P shrink as N grows. Q = 64 balances the work inside chunks (grows
    with Q) and on states (with P N / Q) at the usual P = 64, N = 64 to 128 in 16 bits. float32 has no tensor cores at
    full precision and twice the bytes. The sizes were chosen by the compiler's register and shared memory counts for
    compute capabilities 8.0 and 9.0, not by timings.
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
    """Return the number of processors of the device and its major compute capability."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        return properties.multi_processor_count, properties.major
    return _INTERPRETED_PROCESSORS, _INTERPRETED_CAPABILITY


def _stretches(programs: int, chunks: int, processors: int) -> int:
    """Return the number of stretches of a row to walk in parallel, each by `programs` programs.

    Every stretch is walked twice, first for its own contribution and then from the state that it starts with, so two
    stretches gain nothing, while four or more at least halve the time. A processor can run two programs at full speed,
    and a stretch of fewer than four chunks is mostly start-up.
    """
    stretches = min(2 * processors // programs, chunks // 4)
    return stretches if stretches >= 4 else 1


def _sections(programs: int, chunks: int, processors: int) -> int:
    """Return the number of sections in which the backward processes rows whose chunks make `programs` programs.

    The gradients of a section's states and its partial sums of dB and dC take memory in addition to inputs, results and
    saved states. Rounds are of one program per processor, although two fit at once in half precision. Four rounds per
    section keep the device busy. With fewer than twelve rounds there are up to
    three sections of at least two rounds each, which limits the number of launches. Not measured on a device yet.

    With 132 processors, P = 64, N = 128, 16 bits and one row, the ratio of the peak memory of forward and backward to
    the memory of inputs, outputs, all their gradients and all that is saved is at most 1.2 from six rounds on (380 MB
    without a gate) and 1.3 with four. In one section it would be 1.6 with eight or four heads per program (85 MB more)
    and up to 2.6 with one (42 MB more). Sections do not separate rows, so many short rows keep such a ratio.
    """
    rounds = triton.cdiv(programs, processors)
    return min(max(triton.cdiv(rounds, 4), min(3, rounds // 2), 1), chunks)


def _walk(
    value: Tensor,
    z: Tensor | None,
    last_value: Tensor | None,
    sums: Tensor,
    marks: Tensor | None,
    key: Tensor,
    start: Tensor | None,
    states: Tensor,
    first: int,
    count: int,
    chunk_size: int | None,
    reverse: bool,
    interval: int,
    accurate: bool,
) -> Tensor:
    """Walk over the chunks from `first` to `first + count`, backwards if `reverse`.

    Args:
        value: (B, L, H, P) values, multiplied by `silu(z)` if it is given, and unless `reverse` by the step sizes.
        last_value: (B, L, H) contiguous value of the last row, if states have P + 1 rows; 1 if not given.
        sums: sums of decays and step sizes (:func:`decay_sums`).
        marks: (B, L), as in :func:`ssd_scan_triton`.
        key: (B, L, G, N) maps into the state.
        start: (B, H, P or P + 1, N) float32 state to start with; zero if not given.
        states: (B, c, H, P or P + 1, N) output, c >= `count` / `interval`: the states entering the chunks, or leaving
            them if `reverse`.
        interval: chunks between the states that are stored, 1 if `reverse`.
        accurate: add the values to the state with more than the 8 bits of bfloat16, as a result needs it.

    Returns:
        (B, H, P or P + 1, N) float32 state at the end of the walk.
    """
    batch, length, heads, width = value.shape
    groups, size = key.shape[2:]
    rows = states.shape[3]
    chunk, block_p, block_n = _tiles(width, size, key.dtype, chunk_size)
    # A program of a wide tile has 8 warps, so that a thread holds no more of the state than in a narrow one.
    warps = 8 if key.dtype == torch.float32 or block_p > 32 else 4
    tiles = triton.cdiv(width, block_p)
    processors, _ = _device(value)
    stored = triton.cdiv(count, interval)
    stretch = triton.cdiv(stored, _stretches(tiles * heads * batch, count, processors))
    stretches = triton.cdiv(stored, stretch)
    # Long steps have fewer barriers a token, and shrink the state less often.
    step = chunk * min(interval, 2)
    steps = triton.cdiv(count * chunk, step)
    of_state = interval * chunk // step
    end = key.new_empty(batch, heads, rows, size, dtype=torch.float32)
    summaries = passing = end
    if stretches > 1:
        # For every stretch but the last: the state that it leaves if it starts from zero, and its total decay.
        summaries = end.new_empty(batch, stretches - 1, heads, rows, size)
        passing = end.new_empty(batch, stretches - 1, heads)
    for summary in (True, False) if stretches > 1 else (False,):
        walk_kernel[(tiles, heads, batch * (stretches - summary))](
            *(value, z, last_value, key, sums, marks, None if start is None else start.contiguous(), states),
            *(end, summaries, passing),
            *(length, sums.shape[3], first, steps, stretch * of_state, stretches, states.shape[1]),
            *(heads, heads // groups, *strides(3, value, z, key)),
            WIDTH=width,
            ROWS=rows,
            SIZE=size,
            SPAN=chunk * CHUNKS_OF_SPAN,
            STEPS=of_state,
            REVERSE=reverse,
            SUMMARY=summary,
            SPLIT=accurate and key.dtype != torch.float32,
            Q=step,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=warps,
            num_stages=2,
        )
    return end


def _output(*operands: Any) -> Tensor:
    """Return the (B, L, H, P) outputs, computed for every chunk from the state entering its span; write row sums."""
    x, sums, B, C, D, z, states, row_sums, marks, chunk_size = operands
    batch, length, heads, width = x.shape
    D = None if D is None else D.expand(heads, width)
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    _, capability = _device(x)
    # Before compute capability 9, the operands of a product take registers, so that a thread has fewer for the state.
    warps = 8 if x.dtype == torch.float32 or capability < 9 else 4
    y = x.new_empty(x.shape)
    spans = states.shape[1]
    output_kernel[(batch * spans * heads, triton.cdiv(width, block_p))](
        *(x, sums, marks, B, C, D, z, states, y, row_sums, length, sums.shape[3], spans, heads, heads // groups),
        *(*strides(3, x, B, C), *strides(2, D), *strides(3, z), *strides(2, states)),
        SPAN=chunk * CHUNKS_OF_SPAN,
        WIDTH=width,
        ROWS=states.shape[3],
        SIZE=size,
        Q=chunk,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        EMULATE=INTERPRETED,
        num_warps=warps,
        num_stages=1,
    )
    return y


def _gradients(*operands: Any) -> tuple[Tensor | None, ...]:
    """Return gradients of x, decay, A, B, C, D, z, initial state and bias, section by section from the end.

    Without gradients of row sums and of the final state, the gradients of states have P rows.
    """
    x, sums, B, C, D, z, states, dy, drow_sums, dstate, decays, initial, chunk_size = operands
    batch, _, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    chunks = states.shape[1]
    processors, capability = _device(x)
    # As in `_output`; here dB or dC takes registers too.
    block_p = min(block_p, 32 if x.dtype.itemsize == 2 and block_n <= 128 and capability >= 9 else 16)
    # A program sums dB and dC over several heads of a group, which saves recomputations of C B^T and memory for partial
    # sums, as long as enough programs remain to fill the device.
    together = math.gcd(heads // groups, 8)
    while together > 1 and batch * chunks * heads // together < 2 * processors:
        together //= 2
    parts = heads // together
    sections = _sections(batch * chunks * parts, chunks, processors)
    capacity = triton.cdiv(chunks, sections)  # chunks of a section
    # In half precision a thread of four warps holds twice as much as one of eight, and fewer instructions are the same
    # for all warps. For compute capability 8.0, ptxas gives these kernels 32 registers and spills the rest unless the
    # limit is set.
    options: dict[str, Any] = {"num_warps": 4 if x.dtype.itemsize == 2 and capability >= 9 else 8}
    if capability < 9:
        options["maxnreg"] = 255
    of_decays = DecayGradients(decays, chunk, chunks)
    flows = sums.new_empty(batch, heads, 3 if decays.A is None else 4, capacity * chunk)
    passed = sums.new_empty(batch, capacity, heads)
    rows = states.shape[3] if drow_sums is not None else width
    dstates = states.new_empty(batch, capacity, heads, rows, size)
    tiles = {"BLOCK_P": block_p, "BLOCK_N": block_n}
    of_chunks = ChunkGradients(
        (x, sums, decays.marks, B, C, D, z, states),
        *(dy, drow_sums, decays.A is not None, chunk, together, capacity, tiles | options),
    )
    for first in reversed(range(0, chunks, capacity)):
        count = min(capacity, chunks - first)
        dstate = _walk(
            *(dy, z, drow_sums, sums, decays.marks, C, dstate, dstates, first, count, chunk_size),
            reverse=True,
            interval=1,
            accurate=initial,
        )
        of_chunks.add(dstates, flows, passed, first, count)
        of_decays.add(flows, passed, first, count)
    dA, dt_bias = of_decays.vectors()
    of_inputs = of_chunks.dx, of_decays.decay, dA, of_chunks.dB, of_chunks.dC, of_chunks.skip(), of_chunks.dz
    return *of_inputs, dstate, dt_bias


# In each kernel, `sums` are those of `decay_sums`, with three parts of `tokens` tokens for each head. A state has ROWS
# rows: WIDTH, and with row sums one more, the last, which is a vector here. `real` is false at padding, which is read
# as zero; results are written there too.
@triton.jit(do_not_specialize=["length", "first", "count", "stretch", "stretches", "capacity"])
def walk_kernel(
    value_ptr, z_ptr, last_value_ptr, key_ptr, sums_ptr, marks_ptr, start_ptr, states_ptr, end_ptr, summary_ptr,
    passing_ptr, length, tokens, first, count, stretch, stretches, capacity, heads, per_group,
    value_batch, value_token, value_head, z_batch, z_token, z_head, key_batch, key_token, key_group,
    SPAN: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, SUMMARY: tl.constexpr, SPLIT: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    walked = stretches
    if SUMMARY:
        walked = stretches - 1  # nothing starts where the last one ends
    batch = (tl.program_id(2) // walked).to(tl.int64)
    place = tl.program_id(2) % walked
    rows = tl.arange(0, Q)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p = p < WIDTH
    in_n = n < SIZE
    in_state = in_n[:, None] & in_p[None, :]
    inside = n[:, None] + p[None, :] * SIZE  # (P, N) offsets in a head's state
    last = WIDTH * SIZE + n
    writes_last = n < tl.where(tl.program_id(0) == 0, SIZE, 0)
    value_ptr += batch * value_batch + head * value_head
    if z_ptr is not None:
        z_ptr += batch * z_batch + head * z_head
    key_ptr += batch * key_batch + (head // per_group) * key_group
    sums_ptr += (batch * heads + head) * 3 * tokens
    dtype = key_ptr.dtype.element_ty

    row_state = (batch * heads + head) * (ROWS * SIZE)
    passing = batch * (stretches - 1) * heads + head  # of the row's first stretch
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    last_row = tl.zeros((BLOCK_N,), dtype=tl.float32)
    decay = tl.full((), 1.0, dtype=tl.float32)
    if not SUMMARY:
        if start_ptr is not None:
            state = tl.load(start_ptr + row_state + inside, mask=in_state, other=0.0)
            if ROWS > WIDTH:
                last_row = tl.load(start_ptr + row_state + last, mask=in_n, other=0.0)
        for earlier in range(place):
            at = passing + earlier * heads
            left = tl.load(summary_ptr + at * (ROWS * SIZE) + inside, mask=in_state, other=0.0)
            factor = tl.load(passing_ptr + at)
            state = state * factor + left
            if ROWS > WIDTH:
                left_last = tl.load(summary_ptr + at * (ROWS * SIZE) + last, mask=in_n, other=0.0)
                last_row = last_row * factor + left_last
    for step in range(place * stretch, tl.minimum((place + 1) * stretch, count)):
        index = step
        if REVERSE:
            index = count - 1 - step
        if not SUMMARY and index % STEPS == 0:
            at = ((batch * capacity + index // STEPS) * heads + head) * (ROWS * SIZE)
            tl.store(states_ptr + at + inside, narrow(state, dtype, EMULATE), mask=in_state)
            if ROWS > WIDTH:
                tl.store(states_ptr + at + last, narrow(last_row, dtype, EMULATE), mask=writes_last)

        begin = (tl.zeros((), dtype=tl.int64) + first + index) * Q
        present = rows < tl.minimum(length - begin, Q).to(tl.int32)
        real = real_tokens(marks_ptr, batch * length + begin, rows, present)
        before, fine_before = sums_before(sums_ptr, tokens, begin, SPAN)
        now = sums_ptr + begin
        coarse, end, fine_end = tl.load(now + rows), tl.load(now + Q - 1), tl.load(now + tokens + Q - 1)
        whole = tl.exp2((end - before) + (fine_end - fine_before))
        if REVERSE:
            weight = tl.exp2((coarse - before) + (tl.load(now + tokens + rows) - fine_before))
        else:
            weight = tl.load(now + 2 * tokens + rows) * tl.exp2((end - coarse) + fine_end)
        in_value = real[:, None] & in_p[None, :]
        value = tl.load(
            value_ptr + begin * value_token + rows[:, None] * value_token + p[None, :], mask=in_value, other=0.0
        ).to(tl.float32)  # (Q, P)
        if z_ptr is not None:
            _, gate = load_gate(z_ptr + begin * z_token, rows[:, None] * z_token + p[None, :], in_value)
            value *= gate
        key = tl.load(
            key_ptr + begin * key_token + rows[:, None] * key_token + n[None, :],
            mask=real[:, None] & in_n[None, :],
            other=0.0,
        )  # (Q, N)
        weighted = value * weight[:, None]
        state *= whole
        decay *= whole
        if SPLIT:
            # The state accumulates a whole row. Two half-precision terms keep 16 or more bits of the weighted values,
            # instead of 8, which makes the final state as accurate as float32 sums of the inputs.
            high = narrow(weighted, dtype, EMULATE)
            low = narrow(weighted - high.to(tl.float32), dtype, EMULATE)
            state = dot(tl.trans(key), high, state, EMULATE)
            state = dot(tl.trans(key), low, state, EMULATE)
        else:
            state = dot(tl.trans(key), narrow(weighted, dtype, EMULATE), state, EMULATE)
        if ROWS > WIDTH:
            if last_value_ptr is not None:
                at = ((batch * length + begin) * heads + head) + rows * heads
                weight *= tl.load(last_value_ptr + at, mask=real, other=0.0)
            last_row = last_row * whole + times_vector(tl.trans(key), weight, SPLIT, EMULATE)
    if SUMMARY:
        at = passing + place * heads
        tl.store(summary_ptr + at * (ROWS * SIZE) + inside, state, mask=in_state)
        if ROWS > WIDTH:
            tl.store(summary_ptr + at * (ROWS * SIZE) + last, last_row, mask=writes_last)
        tl.store(passing_ptr + at, decay)  # the same from every tile of the head
    elif place == stretches - 1:
        tl.store(end_ptr + row_state + inside, state, mask=in_state)
        if ROWS > WIDTH:
            tl.store(end_ptr + row_state + last, last_row, mask=writes_last)


@triton.jit(do_not_specialize=["length", "spans"])
def output_kernel(
    x_ptr, sums_ptr, marks_ptr, B_ptr, C_ptr, D_ptr, z_ptr, states_ptr, y_ptr, row_sums_ptr,
    length, tokens, spans, heads, per_group,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, D_head, D_width, z_batch,
    z_token, z_head, states_batch, states_span,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # neighbours are heads of one span, which read the same B and C
    head = (program % heads).to(tl.int64)
    span = ((program // heads) % spans).to(tl.int64)
    batch = (program // heads // spans).to(tl.int64)
    group = head // per_group
    rows = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n = n < SIZE
    in_p = p < WIDTH
    begin = span * SPAN
    dtype = x_ptr.dtype.element_ty
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    x_ptr += batch * x_batch + begin * x_token + head * x_head
    y_ptr += ((batch * length + begin) * heads + head) * WIDTH
    if z_ptr is not None:
        z_ptr += batch * z_batch + begin * z_token + head * z_head
    sums_ptr += (batch * heads + head) * 3 * tokens + begin
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_head + p * D_width, mask=in_p, other=0.0)[None, :]
    states_ptr += batch * states_batch + span * states_span + head * (ROWS * SIZE)
    in_state = in_p[:, None] & in_n[None, :]
    # (P, N), entering the span and then each of its chunks
    state = tl.load(states_ptr + p[:, None] * SIZE + n[None, :], mask=in_state, other=0.0).to(tl.float32)
    last_row = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if ROWS > WIDTH:
        last_row = tl.load(states_ptr + WIDTH * SIZE + n, mask=in_n, other=0.0).to(tl.float32)
        row_sums_ptr += (batch * length + begin) * heads + head
    left = tl.minimum(length - begin, SPAN).to(tl.int32)  # tokens of the span
    before = tl.zeros((), dtype=tl.float32)
    fine_before = tl.zeros((), dtype=tl.float32)
    for done in range(0, left, Q):
        present = rows < left - done
        real = real_tokens(marks_ptr, batch * length + begin + done, rows, present)
        in_maps = real[:, None] & in_n[None, :]
        in_x = real[:, None] & in_p[None, :]
        B = tl.load(B_ptr + done * B_token + rows[:, None] * B_token + n[None, :], mask=in_maps, other=0.0)  # (Q, N)
        C = tl.load(C_ptr + done * C_token + rows[:, None] * C_token + n[None, :], mask=in_maps, other=0.0)
        x = tl.load(x_ptr + done * x_token + rows[:, None] * x_token + p[None, :], mask=in_x, other=0.0)  # (Q, P)
        at = sums_ptr + done
        coarse, fine, factor = tl.load(at + rows), tl.load(at + tokens + rows), tl.load(at + 2 * tokens + rows)
        end, fine_end = tl.load(at + Q - 1), tl.load(at + tokens + Q - 1)
        # Masked before exp2: on the other side of the diagonal the differences are positive.
        decay = tl.where(rows[:, None] >= rows[None, :], coarse[:, None] - coarse[None, :], -256.0)
        mix = dot(C, tl.trans(B), None, EMULATE) * tl.exp2(decay) * factor[None, :]  # (Q target, Q source)
        from_start = tl.exp2(coarse - before - fine_before)
        if ROWS > WIDTH:
            row_sums = (tl.sum(mix, 1) + times_vector(C, last_row, False, EMULATE) * from_start) * tl.exp2(fine)
            in_sums = rows < tl.where(tl.program_id(1) == 0, left - done, 0)
            tl.store(row_sums_ptr + done * heads + rows * heads, row_sums, mask=in_sums)
        mix = narrow(mix, dtype, EMULATE)
        y = dot(C, tl.trans(narrow(state, dtype, EMULATE)), None, EMULATE) * from_start[:, None]
        y = dot(mix, x, y, EMULATE) * tl.exp2(fine)[:, None]
        if D_ptr is not None:
            y += x.to(tl.float32) * D
        if z_ptr is not None:
            _, gate = load_gate(z_ptr + done * z_token, rows[:, None] * z_token + p[None, :], in_x)
            y *= gate
        y = narrow(y, y_ptr.dtype.element_ty, EMULATE)
        in_y = present[:, None] & in_p[None, :]
        tl.store(y_ptr + done * (heads * WIDTH) + rows[:, None] * (heads * WIDTH) + p[None, :], y, mask=in_y)

        weight = factor * tl.exp2((end - coarse) + fine_end)
        weighted = x.to(tl.float32) * weight[:, None]
        whole = tl.exp2((end - before) + (fine_end - fine_before))
        state *= whole
        state = dot(tl.trans(narrow(weighted, dtype, EMULATE)), B, state, EMULATE)
        if ROWS > WIDTH:
            last_row = last_row * whole + times_vector(tl.trans(B), weight, False, EMULATE)
        before = end
        fine_before = fine_end


# (states per program, fewest programs for which it is used). A warp takes 512 states, 16 per thread: four concurrent
# loads of 16 bytes. Small programs spread small batches over 132 processors (H100, H200). Triton 3.9 compiles both for
# sm_80 and sm_90 without spilled registers, with 40 to 64 per thread (80 if nothing is aligned); not timed on a device.
_TILES = ((2048, 512), (512, 0))
_STATES_OF_A_WARP = 512


@launch(
    "Tensor(a!) state, Tensor x, Tensor decay, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, float[] dt_limit, Tensor(b!)? row_sums",
    lambda state, x, *_: x.new_empty(x.shape),
)
def ssd_step_triton(
    state: Tensor,
    x: Tensor,
    decay: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    row_sums: Tensor | None,
) -> Tensor:
    """Run one token on checked arguments, without a gradient, and update `state` in place.

    Args:
        state: (B, H, P, N) float32 state, (B, H, P + 1, N) with `row_sums`. All arguments may have any strides; none is
            copied.
        x: (B, H, P) input.
        decay: (B, H) step sizes, or log-decays if `A` is None.
        A: (H) decay rates, or None.
        B: (B, G, N) input map.
        C: (B, G, N) output map.
        D: (H) or (H, P) skip.
        z: (B, H, P) gate.
        dt_bias: (H) added to the step sizes.
        dt_softplus: apply softplus to the step sizes.
        dt_limit: range to which the step sizes are clamped.
        row_sums: (B, H) contiguous float32, filled with the output of an additional input that is always 1, without
            skip and gate, whose state is the last of P + 1 rows; `A` must then be None.

    Returns:
        (B, H, P) output in the dtype of `x`.
    """
    batch, heads, rows, size = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_p, block_n, warps = _tile(batch * heads, rows, size)
    with torch.cuda.device_of(x):
        _step_kernel[triton.cdiv(rows, block_p), heads, batch](
            *(state, x, decay, A, B, C, D, z, dt_bias, y, row_sums),
            *(float(limit) for limit in dt_limit),
            heads // B.shape[1],
            *(*state.stride(), *x.stride(), *decay.stride(), *strides(1, A), *strides(3, B, C)),
            *(*strides(2, D), *strides(3, z), *strides(1, dt_bias)),
            WIDTH=x.shape[2],
            SIZE=size,
            SOFTPLUS=dt_softplus,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            EMULATE=INTERPRETED,
            num_warps=warps,
        )
    return y


def _tile(heads: int, width: int, size: int) -> tuple[int, int, int]:
    """Return (BLOCK_P, BLOCK_N, warps) for the number of heads of all rows of the batch."""
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
    a_ptr,  # or None if the decays are given
    b_ptr, c_ptr,
    d_ptr,  # or None, as the next two
    z_ptr, bias_ptr,
    y_ptr,  # contiguous, as the next
    row_sums_ptr,  # or None
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
    inside_rows = inside_p
    if row_sums_ptr is not None:
        inside_rows = p < WIDTH + 1
    inside = inside_rows[:, None] & inside_n[None, :]
    held = state_ptr + batch * state_batch + head * state_head + p[:, None] * state_p + n[None, :] * state_n
    h = tl.load(held, mask=inside, other=0.0)
    x = tl.load(x_ptr + batch * x_batch + head * x_head + p * x_p, mask=inside_p, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * b_batch + group * b_group + n * b_n, mask=inside_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + batch * c_batch + group * c_group + n * c_n, mask=inside_n, other=0.0).to(tl.float32)

    log_decay = tl.load(decay_ptr + batch * decay_batch + head * decay_head).to(tl.float32)
    u = x
    if row_sums_ptr is not None:
        u = tl.where(inside_p, x, 1.0)
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
    place = batch * tl.num_programs(1) + head
    if row_sums_ptr is not None:
        tl.store(row_sums_ptr + place + p * 0, y, mask=p == WIDTH)
    if d_ptr is not None:
        y += tl.load(d_ptr + head * d_head + p * d_p, mask=inside_p, other=0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_batch + head * z_head + p * z_p, mask=inside_p, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + place * WIDTH + p, narrow(y, y_ptr.dtype.element_ty, EMULATE), mask=inside_p)
