"""Triton kernels of the SSD recurrence: what :mod:`.ssd` runs on CUDA tensors.

Symbols: B batch, L length, H heads, P head width, N state size, G groups, Q chunk length, c chunks; D skip, z gate.
With a_t the log-decay, s_t the scale of the input (the step size; 1 if there is none) and, inside a chunk, S_i the
inclusive sum of its a_t, T the sum over the chunk and h the state entering it,

    M_ij = (C_i . B_j) exp(S_i - S_j) s_j  for j <= i,
    y_i  = (sum_j M_ij x_j + exp(S_i) h C_i + D x_i) silu(z_i),      h' = exp(T) h + sum_j exp(T - S_j) s_j x_j (x) B_j.

Forward, two launches: one walks the chunks with the state in registers and stores the state entering each, the other
computes all chunks' outputs at once. Backward, two again: the same walk from the end, over (dy silu(z), exp(S) C) in
place of (x, exp(T - S) s B), gives the gradient of the state leaving each chunk; then one kernel per chunk recomputes M
and the outputs before the gate. No (Q, Q) matrix and no decay sum ever goes to memory, and nothing of the size of x but
y, dx and dz. Everything is summed in a fixed order: no atomics.

Two rules look at the device's number of processors, so that results may differ in rounding from device to device but
not from run to run. A row that is long for the few heads there are is walked in stretches (:func:`_stretches`), and the
backward goes through a row in sections (:func:`_sections`), so that what it holds for a moment fills the device, and is
no larger.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, triton
from .ssd_triton_kernels import chunk_gradients_kernel, output_kernel, walk_kernel
from .tracing import opaque, tracing

# What an interpreted kernel is said to run on. With one processor, few tokens already make several sections.
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
        chunk_size: wish for the chunk length, made a power of two between 16 and what fits (:func:`_tiles`).

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
        x, B, C = _unit_stride(x), _unit_stride(B), _unit_stride(C)
        z = None if z is None else _unit_stride(z)
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
        dy = _unit_stride(x.new_zeros(x.shape[3]).expand(x.shape) if dy is None else dy)
        with torch.cuda.device_of(x):
            *gradients, dinitial_state = _gradients(
                x, scale, log_decay, B, C, D, z, states, dy, dfinal_state, ctx.chunk_size
            )
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


def _unit_stride(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; views of a wider projection stay as they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tiles(width: int, size: int, dtype: torch.dtype, chunk_size: int | None) -> tuple[int, int, int]:
    """The tile sizes (Q, BLOCK_P, BLOCK_N): powers of two of at least 16, as tl.dot takes them.

    The whole state size is one tile. A chunk's B and C stand in shared memory together with two (BLOCK_P, BLOCK_N)
    states, and their gradients in registers, so Q and BLOCK_P shrink as a row of N grows. Q = 64 balances the work
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
    """The number of the device's processors and its major compute capability."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        return properties.multi_processor_count, properties.major
    return _INTERPRETED_PROCESSORS, _INTERPRETED_CAPABILITY


def _stretches(programs: int, chunks: int, processors: int) -> int:
    """The number of stretches in which a row's chunks are walked side by side, by so many programs each.

    Every stretch is walked twice, first for what it leaves of its own and then from the state that it starts with, so
    two stretches would gain nothing; from four on, the walk takes half the time or less. A processor runs two programs
    at no loss, and below four chunks a stretch is mostly start-up.
    """
    stretches = min(2 * processors // programs, chunks // 4)
    return stretches if stretches >= 4 else 1


def _sections(programs: int, chunks: int, processors: int) -> int:
    """The number of sections in which the backward goes through rows whose chunks make so many programs.

    The gradients of a section's states, and its partial sums of dB and dC, are what stands in memory beside inputs,
    results and saved states. A program takes all registers of a processor (255 for each of 256 threads), so programs
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
            value,
            value if z is None else z,
            key,
            log_decay,
            log_decay if scale is None else scale,
            end if start is None else start.contiguous(),
            states,
            end,
            summaries,
            passing,
            length,
            first,
            count,
            stretch,
            stretches,
            states.shape[1],
            heads,
            heads // groups,
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
    """The (B, L, H, P) outputs, every chunk from the state entering it."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk, block_p, block_n = _tiles(width, size, x.dtype, chunk_size)
    _, capability = _device(x)
    # Where the operands of a product do not stay in shared memory, they take the registers of wider tiles.
    block_p = block_p if capability >= 9 else min(block_p, 32)
    y = x.new_empty(x.shape)
    output_kernel[(batch * states.shape[1] * heads,)](
        x,
        log_decay,
        log_decay if scale is None else scale,
        B,
        C,
        x if D is None else D,
        x if z is None else z,
        states,
        y,
        length,
        states.shape[1],
        heads,
        heads // groups,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *((0, 0) if D is None else D.stride()),
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
    """The gradients of x, scale, log_decay, B, C, D, z and the initial state, section by section from the end."""
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
            x,
            log_decay,
            log_decay if scale is None else scale,
            B,
            C,
            x if D is None else D,
            x if z is None else z,
            states,
            dy,
            dstates,
            dx,
            dlog_decay,
            dlog_decay if dscale is None else dscale,
            dB_parts,
            dC_parts,
            dx if dD is None else dD,
            dx if dz is None else dz,
            length,
            chunks,
            first,
            count,
            capacity,
            heads,
            heads // groups,
            *x.stride()[:3],
            *B.stride()[:3],
            *C.stride()[:3],
            *((0, 0) if D is None else D.stride()),
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
