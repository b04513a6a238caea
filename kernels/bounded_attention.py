"""Softmax attention over a bounded memory: a window, the first tokens, and slots for tokens that earned attention.

Symbols: B batch, L length, H query heads, KV key-value heads, P head width, C chunk size, w window, s sinks, S slots of
a key-value head (its sinks included), N rows of the memory of all key-value heads, the sum of S + w over them.

Tokens of a document are counted from 0 and taken in chunks of C. A query at position t, in chunk c = t // C, sees

    near   the positions from (c + 1) C - w to t: its chunk so far and the w - C tokens before the chunk
    slots  at most S earlier positions

with one softmax over both. At the end of a chunk the C oldest positions of the window leave it and compete with those
in the slots. The first s positions of a document always stay, then those with the largest score: the attention that a
position has received while it was visible, summed over the queries of its group of heads, times the norm of its value.
With `decay` below 1, attention received n tokens ago counts decay^n. A position that loses is dropped for good.

Sources: heavy-hitter eviction (H2O, arXiv 2306.14048), attention sinks (StreamingLLM, arXiv 2309.17453). Eviction by
chunks makes a prompt linear in L, and the result does not depend on how the prompt was cut into calls, except for
which of several positions of equal score stay. Few heads look far back, so each head has its own number of slots: the
memory is ragged, without empty rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bounded_attention_chunks import Chunks, Plan, capped, group_heads
from .bounded_attention_triton import WIDEST_HEAD, bounded_attention_step_triton
from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_integers,
    check_optional,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    empty_batch,
    without_autocast,
)
from .int8_rows import dequantise_rows, quantise_rows
from .tracing import host_reads, launch, opaque, tracing

_POSITIONS = 2**24  # float32 holds all whole numbers up to it


class BoundedMemory(NamedTuple):
    """The rows of keys and values that are left of a document's past, for each key-value head in turn.

    A head's rows are its S slots, in any order, and the last w positions, position p in row S + p % w.

    Attributes:
        keys: (B, N, P); int8 with scales.
        values: (B, N, P); int8 with scales.
        scores: (B, N) scores without the norm of the value, float32 or float64.
        positions: (B, N) int64 position in the document; negative where a row is empty.
        keys_scales, values_scales: (B, N) of quantised rows, see `int8_rows.py`; None of others.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor
    keys_scales: Tensor | None = None
    values_scales: Tensor | None = None

    def quantised(self) -> BoundedMemory:
        """Return the memory with keys and values of 8 bits."""
        (keys, keys_scales), (values, values_scales) = quantise_rows(self.keys), quantise_rows(self.values)
        return BoundedMemory(keys, values, self.scores, self.positions, keys_scales, values_scales)

    def dequantised(self, dtype: torch.dtype) -> BoundedMemory:
        """Return the memory with keys and values of a dtype; itself if it is not quantised."""
        if self.keys_scales is None or self.values_scales is None:
            return self
        keys = dequantise_rows(self.keys, self.keys_scales, dtype)
        values = dequantise_rows(self.values, self.values_scales, dtype)
        return BoundedMemory(keys, values, self.scores, self.positions)


def bounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    slots: list[int],
    sinks: int = 0,
    chunk_size: int = 16,
    decay: float | list[float] = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    initial_state: BoundedMemory | None = None,
    seq_idx: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, BoundedMemory]:
    """Attend to a window and to slots.

    Args:
        q: (B, L, H, P) queries.
        k: (B, L, KV, P) keys; KV divides H.
        v: (B, L, KV, P) values.
        window: w, at least `chunk_size`.
        slots: for each key-value head its number of slots besides the sinks, at least 0.
        sinks: s first positions of a document that are never evicted.
        chunk_size: C, at least 1.
        decay: factor per token on the attention that scores are made of, above 0 and at most 1: one, or one for each
            key-value head.
        scale: factor of the scores of the softmax; P^(-1/2) if not given.
        softcap: c, positive: scaled scores s become c tanh(s / c) before the softmax; None: they stay.
        initial_state: memory to go on from, quantised or not; rows must then hold one document each.
        seq_idx: (B, L) document index, non-decreasing, negative at padding. None: each row is one document.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton chooses the slots and computes the
            outputs of heads with slots, products as three of TF32 each; heads without, and the backward, need no loop
            over chunks and run in torch. P > 256 is not supported.

    Returns:
        (B, L, H, P) in the dtype of `q`, zero at padding, and the memory after the last document of each row, with keys
        and values in the dtype of `k`. Products and sums are float32 (float64 for float64 inputs). Gradients reach q, k
        and v, and the keys and values of `initial_state`; the choice of slots has none.

    Raises:
        ValueError: if a shape, dtype, device, number or `implementation` does not fit, or a row continues a memory with
            two documents.
    """
    _check(q, k, v, window, slots, sinks, chunk_size, decay, softcap, initial_state, seq_idx)
    initial_state = None if initial_state is None else initial_state.dequantised(accumulator(q))
    served = q.shape[-1] <= WIDEST_HEAD
    kernels = choose_implementation(implementation, "bounded_attention", q, served, traceable=True) == "triton"
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums = accumulator(q)
    state = None if initial_state is None else _packed(initial_state, sums)
    options = (window, sinks, slots, chunk_size, _per_head(decay, slots), scale, softcap or 0.0, kernels)
    if q.shape[0] == 0:
        o = empty_batch(tuple(q.shape), q.dtype, q, k, v)
        packed = q.new_zeros(0, _memory_rows(slots, sinks, window), 2 * q.shape[-1] + 2, dtype=sums)
    elif tracing():
        o, packed = _traced(q, k, v, state, seq_idx, *options)
    else:
        o, packed = _Bounded.apply(q, k, v, state, seq_idx, *options)  # pyright: ignore[reportGeneralTypeIssues]
    keys, values, scores, positions = packed.split([q.shape[-1], q.shape[-1], 1, 1], dim=-1)
    # Copies, not views: a view would keep all of `packed` in memory.
    keys, values = keys.to(k.dtype).contiguous(), values.to(v.dtype).contiguous()
    return o, BoundedMemory(keys, values, scores[..., 0].detach().clone(), positions[..., 0].long())


def bounded_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: BoundedMemory,
    *,
    window: int,
    slots: list[int],
    sinks: int = 0,
    chunk_size: int = 16,
    decay: float | list[float] = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Run :func:`bounded_attention` for one more token of each row, updating its memory in place, without gradients.

    Args:
        q: (B, H, P) queries.
        k: (B, KV, P) keys.
        v: (B, KV, P) values.
        memory: of that function, of at least one token in each row.
        window, slots, sinks, chunk_size, decay, scale, softcap: as there; they are not checked again.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support P > 256 and memories
            that are not contiguous.

    Returns:
        (B, H, P) in the dtype of `q`.

    Raises:
        ValueError: if a shape, dtype, device or `implementation` is invalid.
    """
    _check_step(q, k, v, memory, slots, _memory_rows(slots, sinks, window))
    # Asked only where it matters: torch on a CPU runs this for every layer and token.
    served = not (q.is_cuda or implementation == "triton") or _step_in_triton(q, memory)
    chosen = choose_implementation(implementation, "bounded_attention_step", q, served, traceable=True)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = (tuple(slots), sinks, window, chunk_size, tuple(_per_head(decay, slots)), scale, softcap)
    with torch.no_grad():
        return _step(q, k, v, *memory, *options, chosen == "triton")


@launch(
    "Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) scores, Tensor(d!) positions, "
    "Tensor(e!)? keys_scales, Tensor(f!)? values_scales, int[] slots, int sinks, int window, int chunk_size, "
    "float[] decays, float scale, float? softcap, bool kernels",
    lambda q, *_: q.new_empty(q.shape),
)
def _step(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Run a step whose arguments are checked, in the order above."""
    memory = BoundedMemory(*arguments[:6])
    slots, sinks, window, chunk_size, decays, scale, softcap, kernels = arguments[6:]
    sums = accumulator(q)
    rows = _rows(tuple(slots), sinks, window, chunk_size, tuple(decays), q.shape[1], sums, q.device)
    if kernels and q.numel():
        return bounded_attention_step_triton(q, k, v, memory, rows, window, sinks, scale, softcap or 0.0)
    now = _next_position(memory.positions)
    age, oldest = now % chunk_size, (now // chunk_size + 1) * chunk_size - window
    index = rows.windows + now % window
    if memory.keys_scales is None or memory.values_scales is None:
        written = (memory.keys, k), (memory.values, v)
    else:
        (keys, values), (keys_scales, values_scales) = quantise_rows(torch.stack([k, v]))
        written = (
            *((memory.keys, keys), (memory.values, values)),
            *((memory.keys_scales, keys_scales), (memory.values_scales, values_scales)),
        )
    _write(index, memory.positions, memory.scores, now, written)
    first = max(oldest, 0) if isinstance(oldest, int) else oldest.clamp(min=0)
    hidden = memory.positions < rows.near * first
    with without_autocast(q):
        # All heads with all rows in one product, although each has its own rows: it is shorter than a loop over heads.
        bias = rows.others + rows.seen.masked_fill(hidden, -math.inf)[:, None]
        queries, keys, values = q.to(sums) * scale, memory.keys.to(sums), memory.values.to(sums)
        if memory.keys_scales is None or memory.values_scales is None:
            if softcap is None:
                weights = torch.baddbmm(bias, queries, keys.mT).softmax(-1)
            else:
                weights = capped(torch.bmm(queries, keys.mT), softcap).add_(bias).softmax(-1)
            shares = weights
        else:
            # The scales are factors of the (H, N) scores and weights, not of the (N, P) rows.
            scores = torch.bmm(queries, keys.mT)
            if softcap is None:
                scores = torch.addcmul(bias, scores, memory.keys_scales.to(sums)[:, None])
            else:
                scores = capped(scores.mul_(memory.keys_scales.to(sums)[:, None]), softcap).add_(bias)
            weights = scores.softmax(-1)
            shares = weights * memory.values_scales.to(sums)[:, None]
        out = torch.bmm(shares, values).to(q.dtype)
        received = weights.sum(1)
    if min(decays) < 1:
        if not (isinstance(age, int) and age):  # later tokens of a chunk have the factor 1
            memory.scores.mul_(rows.begun[age].view(-1, len(rows.near)))
        received *= rows.rest[age].view(-1, len(rows.near))
    memory.scores.add_(received)
    complete = age == chunk_size - 1
    if isinstance(complete, bool):
        if complete:
            _evict(memory, rows, window, sinks, oldest, None)
    elif not complete.is_cpu or bool(complete.any()):
        _evict(memory, rows, window, sinks, oldest, complete)
    return out


def _check_step(q: Tensor, k: Tensor, v: Tensor, memory: BoundedMemory, slots: list[int], rows: int) -> None:
    keys, values, scores, positions, keys_scales, values_scales = memory
    # The fast path: this runs once per layer and decoded token.
    size, device = scores.shape, q.device
    if (
        q.dim() == 3
        and slots
        and q.shape[1] % len(slots) == 0
        and k.shape == v.shape == (q.shape[0], len(slots), q.shape[2])
        and keys.shape == values.shape == (q.shape[0], rows, q.shape[2])
        and size == positions.shape == (q.shape[0], rows)
        and q.dtype == k.dtype == v.dtype
        and keys.dtype == values.dtype == (q.dtype if keys_scales is None else torch.int8)
        and positions.dtype == torch.int64
        and q.is_floating_point()
        and scores.is_floating_point()
        and (keys_scales is None) == (values_scales is None)
        and (keys_scales is None or values_scales is None or keys_scales.shape == values_scales.shape == size)
        and all(part is None or part.device == device for part in (k, v, *memory))
    ):
        return
    check_tensor("q", q, (None, None, None), "(B, H, P)")
    B, H, P = q.shape
    check_tensor("k", k, (B, None, P), "(B, KV, P)")
    check_groups("k", k.shape[1], H)
    check_tensor("v", v, tuple(k.shape), "(B, KV, P)")
    if k.shape[1] != len(slots):
        raise ValueError(f"slots must be {k.shape[1]} numbers, one for each key-value head, got {slots}")
    _check_memory(memory, (B, rows), P)
    check_devices(q=q, k=k, v=v, **memory._asdict())


def _check_memory(memory: BoundedMemory, rows: tuple[int, int], width: int, prefix: str = "") -> None:
    """Check the tensors of a memory of (B, N) rows, whose names in messages begin with `prefix`."""
    keys, values, scores, positions, keys_scales, values_scales = memory
    check_rows = check_tensor if keys_scales is None else check_integers
    check_rows(f"{prefix}keys", keys, (*rows, width), "(B, N, P)")
    check_rows(f"{prefix}values", values, (*rows, width), "(B, N, P)")
    check_tensor(f"{prefix}scores", scores, rows, "(B, N)")
    check_integers(f"{prefix}positions", positions, rows, "(B, N)")
    if (keys_scales is None) != (values_scales is None):
        raise ValueError(f"{prefix}keys_scales and {prefix}values_scales must both be given or both be None, got one")
    check_optional(f"{prefix}keys_scales", keys_scales, rows, "(B, N)")
    check_optional(f"{prefix}values_scales", values_scales, rows, "(B, N)")


def _step_in_triton(q: Tensor, memory: BoundedMemory) -> bool:
    """Return whether the Triton kernels support a step."""
    whole = all(part is None or part.is_contiguous() for part in memory)
    return q.shape[-1] <= WIDEST_HEAD and whole


def _next_position(positions: Tensor) -> Any:
    """Return the (B, 1) positions of the next tokens, or their number if they are equal and no device has to be read.

    Arithmetic with numbers takes a tenth of the time.
    """
    latest = positions.amax(1, keepdim=True)
    if host_reads(positions):
        numbers = set(latest.flatten().tolist())
        if len(numbers) == 1:
            return numbers.pop() + 1
    return latest + 1


def _write(index: Tensor, positions: Tensor, scores: Tensor, now: Any, written: Any) -> None:
    """Write a token into the (KV) or (B, KV) rows `index`: its position, a score of zero and pairs (tensor, new)."""
    if index.ndim == 1:
        positions.index_fill_(1, index, now)
        scores.index_fill_(1, index, 0.0)
        for tensor, new in written:
            tensor.index_copy_(1, index, new.to(tensor.dtype))
        return
    batch = torch.arange(len(index), device=index.device)[:, None]
    positions[batch, index], scores[batch, index] = now, 0.0
    for tensor, new in written:
        tensor[batch, index] = new.to(tensor.dtype)


def _evict(memory: BoundedMemory, rows: _Rows, window: int, sinks: int, oldest: Any, complete: Tensor | None) -> None:
    """Let the C oldest positions of the window compete for the slots.

    Of a head's slots and of those positions, C are dropped. Positions that win are copied to slots that lose, so at
    most C slots of a head change.

    Args:
        memory: memory, changed in place.
        rows: constants.
        window: w.
        sinks: s.
        oldest: first position that leaves, a number or (B, 1); below 0 if none does yet.
        complete: (B, 1) mask of rows whose chunk is complete; None: all are.
    """
    chunk_size, capacity = len(rows.steps), rows.slots.shape[1]
    if not rows.slots.numel() or (isinstance(oldest, int) and oldest + chunk_size <= 0):
        return
    norms = memory.values.to(memory.scores.dtype).norm(dim=-1)
    if memory.values_scales is not None:
        norms *= memory.values_scales
    # What is not a number stays, as nothing can be said against it.
    rank = (memory.scores * norms).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    rank.masked_fill_(memory.positions < sinks, math.inf)
    rank.masked_fill_(memory.positions < 0, torch.finfo(rank.dtype).min)  # slots without a token lose to all tokens
    batch = torch.arange(len(rank), device=rank.device)[:, None, None]
    leaving = oldest + rows.steps  # (C) or (B, C) positions
    absent = leaving < 0 if complete is None else (leaving < 0) | ~complete
    leaving = rows.windows[rows.with_slots, None] + (leaving % window)[..., None, :]
    leaving = leaving.expand(len(rank), -1, -1)  # (B, KV', C) rows
    slots = rows.slots.expand(len(rank), -1, -1)  # (B, KV', S') rows
    # Padding ranks last among what is dropped, and absent tokens first: they never reach a slot.
    ranks = [rank[batch, slots].masked_fill_(rows.padding, math.nan)]
    ranks.append(rank[batch, leaving].masked_fill_(absent[..., None, :], -math.inf))
    dropped = torch.cat(ranks, dim=2).topk(chunk_size, largest=False, sorted=False).indices.sort().values
    lost = (dropped[..., None] == rows.steps + capacity).any(2)
    # Winners first, which pairs them with the slots that are dropped; a position that loses is paired with its own row.
    source = leaving.gather(2, lost.byte().argsort(dim=2, stable=True))
    target = torch.cat([slots, leaving], dim=2).gather(2, dropped)
    for tensor in memory:
        if tensor is not None:
            tensor[batch, target] = tensor[batch, source]


class _Rows(NamedTuple):
    """Constants of a step, for the rows of the memory.

    Attributes:
        windows: (KV) first row of the window of each key-value head.
        slots: (KV', S') rows of the slots of the heads that have some, padded to the largest number by any row.
        padding: (KV', S') mask of padding in `slots`.
        with_slots: (KV') numbers of those heads.
        steps: (C) 0 to C - 1.
        near: (N) 1 at rows of a window, 0 at slots.
        seen: (N) zeros.
        others: (H, N) minus infinity at the rows of other heads, 0 at a head's own.
        begun: (C, N) factor of the scores at the i-th token of a chunk.
        rest: (C, N) factor of the attention that this token gives.
    """

    windows: Tensor
    slots: Tensor
    padding: Tensor
    with_slots: Tensor
    steps: Tensor
    near: Tensor
    seen: Tensor
    others: Tensor
    begun: Tensor
    rest: Tensor


@functools.lru_cache(maxsize=1024)
def _rows(
    slots: tuple[int, ...],
    sinks: int,
    window: int,
    chunk_size: int,
    decays: tuple[float, ...],
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Rows:
    with torch.inference_mode(False):  # a later call may record gradients
        capacity = torch.tensor([number + sinks for number in slots], device=device)
        sizes = capacity + window
        windows = sizes.cumsum(0) - window
        with_slots = capacity.nonzero()[:, 0]
        column, row = torch.arange(int(capacity.max()), device=device), torch.arange(int(sizes.sum()), device=device)
        padding = column >= capacity[with_slots, None]
        table = ((windows - capacity)[with_slots, None] + column).masked_fill_(padding, 0)
        owner = torch.arange(len(slots), device=device).repeat_interleave(sizes)
        near = (row >= windows[owner]).long()
        head = torch.arange(heads, device=device) // (heads // len(slots))
        others = torch.zeros(heads, len(owner), dtype=dtype, device=device)
        others.masked_fill_(head[:, None] != owner, -math.inf)
        decay = torch.tensor(decays, dtype=dtype, device=device)[owner]
        steps = torch.arange(chunk_size, device=device)
        begun = torch.where(steps[:, None] == 0, decay**chunk_size, 1.0)
        rest = decay ** (chunk_size - 1 - steps[:, None])
        return _Rows(windows, table, padding, with_slots, steps, near, torch.zeros_like(decay), others, begun, rest)


def bounded_attention_matrix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    slots: list[int],
    sinks: int = 0,
    chunk_size: int = 16,
    decay: float | list[float] = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    initial_state: BoundedMemory | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Return the weights of :func:`bounded_attention`, with a column for each position of a row's real tokens.

    For inspection, since it has L x M numbers per head. Arguments as there; column j belongs to the j-th real token of
    the row, whatever its document, those of the initial state first.

    Returns:
        (B, H, L, M) in float32 (float64 for float64 inputs), M the real tokens of the longest row with its cached ones.
    """
    _check(q, k, v, window, slots, sinks, chunk_size, decay, softcap, initial_state, seq_idx)
    initial_state = None if initial_state is None else initial_state.dequantised(accumulator(q))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums = accumulator(q)
    B, L, H, _ = q.shape
    if B == 0:
        return empty_batch((B, H, L, L), sums, q, k)
    state = None if initial_state is None else _packed(initial_state, sums)
    plan = Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
    columns = int((plan.offset + plan.start + plan.count).max()) if plan.documents else L
    if L == 0:
        return empty_batch((B, H, L, columns), sums, q, k)
    members = H // k.shape[2]
    matrix = torch.zeros(B * L, k.shape[2], members, columns, dtype=sums, device=q.device)
    with without_autocast(q):
        for heads in group_heads(plan, members, kernels=False):
            chunks = Chunks(plan, heads, q, k, v, state, scale, softcap)
            with torch.no_grad():
                for _ in chunks.run(_per_head(decay, slots), kernels=False):
                    pass
            of_head = torch.tensor(heads, device=q.device)
            for part, index, weights, _ in chunks.blocks():
                place = chunks.positions_of(index) + plan.offset[:, None, None]  # (m, R, h, S' + w)
                place = place.clamp(0, columns - 1)[:, :, :, None]
                weights = weights.view(*place.shape[:3], members * chunk_size, index.shape[2])
                rows = weights.new_zeros(*weights.shape[:-1], columns)
                rows.scatter_add_(-1, place.expand_as(weights), weights)
                chunk, query = plan.place // chunk_size, plan.place % chunk_size
                here = (chunk >= part.start) & (chunk < part.stop)
                rows = rows.unflatten(3, (members, chunk_size)).movedim(4, 2)  # (m, R, C, h, J, columns)
                found = rows[chunk[here] - part.start, plan.document[here], query[here]]
                matrix[plan.token[here, None], of_head] = found
    return matrix.view(B, L, H, columns).transpose(1, 2)


def bounded_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    slots: list[int],
    sinks: int = 0,
    chunk_size: int = 16,
    decay: float | list[float] = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Compute :func:`bounded_attention` by its definition, token by token, differentiated by autograd."""
    _check(q, k, v, window, slots, sinks, chunk_size, decay, softcap, None, seq_idx)
    B, L, H, P = q.shape
    if B == 0:
        return empty_batch(tuple(q.shape), q.dtype, q, k, v)
    groups = H // k.shape[2]
    scale = 1 / math.sqrt(P) if scale is None else scale
    sums = accumulator(q)
    outputs: list[Tensor] = []
    for row in range(B):
        documents = torch.zeros(L, dtype=torch.long) if seq_idx is None else seq_idx[row]
        out = [q.new_zeros(H, P, dtype=sums)] * L
        for document in documents[documents >= 0].unique().tolist():
            tokens = (documents == document).nonzero()[:, 0].tolist()
            for head, capacity in enumerate(slots):
                keys, values = k[row, tokens, head].to(sums), v[row, tokens, head].to(sums)
                kept: list[int] = []
                received, fade = [0.0] * len(tokens), _per_head(decay, slots)[head]
                for t, token in enumerate(tokens):
                    chunk = t // chunk_size
                    oldest = (chunk + 1) * chunk_size - window
                    seen = kept + list(range(max(oldest, 0), t + 1))
                    received = [fade * value for value in received]
                    heads = slice(head * groups, (head + 1) * groups)
                    products = q[row, token, heads].to(sums) @ keys[seen].T * scale
                    weights = (products if softcap is None else softcap * (products / softcap).tanh()).softmax(-1)
                    out[token] = torch.cat(
                        [out[token][: heads.start], weights @ values[seen], out[token][heads.stop :]]
                    )
                    for column, position in enumerate(seen):
                        received[position] += float(weights[:, column].sum().detach())
                    if (t + 1) % chunk_size == 0:
                        leaving = range(max(oldest, 0), max(oldest + chunk_size, 0))
                        rank = {p: received[p] * float(values[p].norm().detach()) for p in [*kept, *leaving]}
                        first = [position for position in rank if position < sinks]
                        others = sorted((p for p in rank if p >= sinks), key=lambda p: -rank[p])
                        kept = sorted(first + others[: capacity + sinks - len(first)])
        outputs.append(torch.stack(out))
    return torch.stack(outputs).to(q.dtype)


def _per_head(decay: float | list[float], slots: list[int]) -> list[float]:
    """Return the decay of each key-value head."""
    return decay if isinstance(decay, list) else [decay] * len(slots)


def _memory_rows(slots: list[int], sinks: int, window: int) -> int:
    """Return N."""
    return sum(slots) + len(slots) * (sinks + window)


def _packed(memory: BoundedMemory, dtype: torch.dtype) -> Tensor:
    """(B, N, 2 P + 2) keys, values, score and position of each row in one tensor."""
    parts = (memory.keys, memory.values, memory.scores[..., None], memory.positions[..., None])
    return torch.cat([part.to(dtype) for part in parts], dim=-1)


class _Bounded(torch.autograd.Function):
    """Keeps which rows each chunk saw; probabilities are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        seq_idx: Tensor | None,
        window: int,
        sinks: int,
        slots: list[int],
        chunk_size: int,
        decay: list[float],
        scale: float,
        softcap: float,
        kernels: bool,
    ) -> tuple[Tensor, Tensor]:
        B, L, H, P = q.shape
        plan = Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
        members, sums = H // k.shape[2], accumulator(q)
        out = q.new_zeros(B, L, k.shape[2], members, P)
        packed = q.new_zeros(B, _memory_rows(slots, sinks, window), 2 * P + 2, dtype=sums)
        packed[..., -1] = -1
        seen: list[Tensor] = []
        groups: list[tuple[list[int], list[int]]] = []
        with without_autocast(q):
            for heads in group_heads(plan, members, kernels):
                chunks = Chunks(plan, heads, q, k, v, state, scale, softcap)
                for part, outputs in chunks.run(decay, kernels):
                    plan.put(out, heads, part, outputs)
                memory, rows = chunks.memory()
                present = plan.last >= 0
                for number, head in enumerate(heads):
                    packed[present, plan.rows(head)] = plan.narrow(memory[:, number], head)[plan.last[present]]
                seen += [chunks.seen, rows]
                groups.append((heads, chunks.used))
        ctx.save_for_backward(q, k, v, state, seq_idx, *seen)
        ctx.options = window, sinks, slots, chunk_size, scale, softcap
        ctx.groups = groups
        ctx.set_materialize_grads(True)
        return out.view(q.shape), packed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        do, dpacked = gradients
        q, k, v, state, seq_idx, *seen = ctx.saved_tensors
        window, sinks, slots, chunk_size, scale, softcap = ctx.options
        B, L, H, P = q.shape
        plan = Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
        dq = q.new_zeros(B, L, k.shape[2], H // k.shape[2], P)
        dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)  # contiguous: `put_lines` writes to flattened views
        dstate = None if state is None else torch.zeros_like(state)
        do, present = do.reshape(dq.shape), plan.last >= 0
        with without_autocast(q):
            for number, (heads, used) in enumerate(ctx.groups):
                chunks = Chunks(plan, heads, q, k, v, state, scale, softcap)
                chunks.seen, chunks.used = seen[2 * number], used
                dlines = torch.zeros_like(chunks.lines)
                for part, dqueries in chunks.backward(plan.align(do, heads, dlines.dtype), dlines):
                    plan.put(dq, heads, part, dqueries.mul_(scale))
                rows = seen[2 * number + 1]
                for index, head in enumerate(heads):
                    dmemory = dlines.new_zeros(plan.documents, rows.shape[2], 2 * P)
                    own = plan.widen(dpacked[present, plan.rows(head), : 2 * P], head, chunks.slots)
                    dmemory[plan.last[present]] = own
                    dmemory.masked_fill_((rows[:, index] < 0)[..., None], 0)
                    place = rows[:, index, :, None].clamp(min=0).expand(-1, -1, 2 * P)
                    dlines[:, index].scatter_add_(1, place, dmemory)
                plan.put_lines(dk, heads, dlines[:, :, chunks.old :, :P])
                plan.put_lines(dv, heads, dlines[:, :, chunks.old :, P:])
                if dstate is not None:
                    held = chunks.held_lines()[:, :, None].expand(-1, -1, 2 * P)
                    for index, head in enumerate(heads):
                        own = plan.narrow(dlines[:, index].gather(1, held), head)
                        dstate[:, plan.rows(head), : 2 * P] = own
        return dq.view(q.shape), dk, dv, dstate, *[None] * 9


def _empty_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    window: int,
    sinks: int,
    slots: list[int],
    chunk_size: int,
    decay: list[float],
    scale: float,
    softcap: float,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    rows = _memory_rows(slots, sinks, window)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], rows, 2 * q.shape[3] + 2, dtype=accumulator(q))


_traced = opaque(
    _Bounded,
    "bounded_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? state, Tensor? seq_idx, int window, int sinks, int[] slots, int chunk_size, "
    "float[] decay, float scale, float softcap, bool kernels",
    _empty_results,
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    slots: list[int],
    sinks: int,
    chunk_size: int,
    decay: float | list[float],
    softcap: float | None,
    initial_state: BoundedMemory | None,
    seq_idx: Tensor | None,
) -> None:
    check_tensor("q", q, (None, None, None, None), "(B, L, H, P)")
    B, L, H, P = q.shape
    check_tensor("k", k, (B, L, None, P), "(B, L, KV, P)")
    check_groups("k", k.shape[2], H)
    check_tensor("v", v, tuple(k.shape), "(B, L, KV, P)")
    check_seq_idx(seq_idx, B, L)
    for name, value, least in (("chunk_size", chunk_size, 1), ("window", window, chunk_size), ("sinks", sinks, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if len(slots) != k.shape[2] or min(slots) < 0:
        raise ValueError(f"slots must be {k.shape[2]} numbers of at least 0, one for each key-value head, got {slots}")
    decays = _per_head(decay, slots)
    if len(decays) != len(slots) or not all(0 < each <= 1 for each in decays):
        raise ValueError(
            f"decay must be above 0 and at most 1, one or one for each of {len(slots)} key-value heads, got {decay}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if initial_state is not None:
        rows = B, _memory_rows(slots, sinks, window)
        _check_memory(initial_state, rows, P, "initial_state.")
        check_devices(q=q, **{f"initial_state.{name}": part for name, part in initial_state._asdict().items()})
        positions = initial_state.positions
        if B and host_reads(positions) and (latest := int(positions.max())) + L >= _POSITIONS:
            raise ValueError(
                f"initial_state.positions must be below {_POSITIONS - L} for {L} more tokens, since positions are held "
                f"in float32 while a prompt is read, got {latest}"
            )
    check_devices(q=q, k=k, v=v, seq_idx=seq_idx)
