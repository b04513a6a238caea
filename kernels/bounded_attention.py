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
chunks makes a prompt linear in L, and the result does not depend on how the prompt was cut into calls. Few heads look
far back, so each head has its own number of slots: the memory is ragged, without empty rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import accumulator, check_devices, check_groups, check_seq_idx, check_tensor, empty_batch, without_autocast
from .tracing import host_reads, opaque, tracing


class BoundedMemory(NamedTuple):
    """The rows of keys and values that are left of a document's past, for each key-value head in turn.

    A head's rows are its S slots, in any order, and the last w positions, position p in row S + p % w.

    Attributes:
        keys: (B, N, P).
        values: (B, N, P).
        scores: (B, N) scores without the norm of the value, float32 or float64.
        positions: (B, N) int64 position in the document; negative where a row is empty.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


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
    initial_state: BoundedMemory | None = None,
    seq_idx: Tensor | None = None,
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
        initial_state: memory to go on from; rows must then hold one document each.
        seq_idx: (B, L) document index, non-decreasing, negative at padding. None: each row is one document.

    Returns:
        (B, L, H, P) in the dtype of `q`, zero at padding, and the memory after the last document of each row, with keys
        and values in the dtype of `k`. Products and sums are float32 (float64 for float64 inputs). Gradients reach q, k
        and v, and the keys and values of `initial_state`; the choice of slots has none.

    Raises:
        ValueError: if a shape, dtype, device or number does not fit, or a row continues a memory with two documents.
    """
    _check(q, k, v, window, slots, sinks, chunk_size, decay, initial_state, seq_idx)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums = accumulator(q)
    state = None if initial_state is None else _packed(initial_state, sums)
    options = (window, sinks, slots, chunk_size, _per_head(decay, slots), scale)
    if q.shape[0] == 0:
        rows = sum(slots) + len(slots) * (sinks + window)
        o = empty_batch(tuple(q.shape), q.dtype, q, k, v)
        packed = q.new_zeros(0, rows, 2 * q.shape[-1] + 2, dtype=sums)
    elif tracing():
        o, packed = _traced(q, k, v, state, seq_idx, *options)
    else:
        o, packed = _Bounded.apply(q, k, v, state, seq_idx, *options)  # pyright: ignore[reportGeneralTypeIssues]
    keys, values, scores, positions = packed.split([q.shape[-1], q.shape[-1], 1, 1], dim=-1)
    memory = BoundedMemory(keys.to(k.dtype), values.to(v.dtype), scores[..., 0].detach(), positions[..., 0].long())
    return o, memory


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
) -> Tensor:
    """Run :func:`bounded_attention` for one more token of each row, updating its memory in place, without gradients.

    Args:
        q: (B, H, P) queries.
        k: (B, KV, P) keys.
        v: (B, KV, P) values.
        memory: of that function, of at least one token in each row.
        window, slots, sinks, chunk_size, decay, scale: as there; they are not checked again.

    Returns:
        (B, H, P) in the dtype of `q`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums, members = accumulator(q), q.shape[1] // len(slots)
    near = _near_rows(tuple(slots), sinks, window, q.device)
    now = memory.positions.amax(1) + 1  # (B)
    row = torch.arange(q.shape[0], device=q.device)
    oldest = (now // chunk_size + 1) * chunk_size - window
    out = torch.empty_like(q)
    capacity = [number + sinks for number in slots]
    places = [sum(capacity[: head + 1]) + head * window for head in range(len(slots))]  # first row of each window
    place = now % window
    for head, start in enumerate(places):
        index = row, start + place
        memory.keys[index], memory.values[index] = k[:, head].to(memory.keys), v[:, head].to(memory.values)
        memory.positions[index], memory.scores[index] = now, 0.0
    hidden = memory.positions < oldest.clamp(min=0)[:, None] * near
    decays = _per_head(decay, slots)
    begun, rest = ((now % chunk_size == 0) * chunk_size).to(sums), (chunk_size - 1 - now % chunk_size).to(sums)
    with without_autocast(q):
        for head, start in enumerate(places):
            rows = slice(start - capacity[head], start + window)
            heads = slice(head * members, (head + 1) * members)
            keys, values = memory.keys[:, rows].to(sums), memory.values[:, rows].to(sums)
            scores = (q[:, heads].to(sums) * scale) @ keys.mT
            weights = scores.masked_fill_(hidden[:, None, rows], -math.inf).softmax(-1)
            out[:, heads] = (weights @ values).to(q.dtype)
            received = weights.sum(1)
            if decays[head] < 1:
                memory.scores[:, rows] *= decays[head] ** begun[:, None]
                received = received * decays[head] ** rest[:, None]
            memory.scores[:, rows] += received
    complete = now % chunk_size == chunk_size - 1
    if not complete.is_cpu or bool(complete.any()):
        _evict(memory, places, window, capacity, sinks, oldest, chunk_size, complete)
    return out


def _evict(
    memory: BoundedMemory,
    places: list[int],
    window: int,
    capacity: list[int],
    sinks: int,
    oldest: Tensor,
    chunk_size: int,
    complete: Tensor,
) -> None:
    """Let the chunk_size oldest positions of the window compete for the slots, in the rows that are `complete`."""
    for start, number in zip(places, capacity, strict=True):
        if not number:
            continue
        rows = slice(start - number, start + window)
        positions = memory.positions[:, rows]
        leaving = (positions >= oldest[:, None]) & (positions < oldest[:, None] + chunk_size) & (positions >= 0)
        leaving[:, :number] = positions[:, :number] >= 0
        rank = memory.scores[:, rows] * memory.values[:, rows].to(memory.scores).norm(dim=-1)
        rank = rank.masked_fill(positions < sinks, math.inf).masked_fill(~leaving, -math.inf)
        best = rank.topk(number, dim=-1).indices
        found = leaving.gather(1, best) & complete[:, None]
        best = torch.where(complete[:, None], best, torch.arange(number, device=best.device))
        wide = best[..., None].expand(-1, -1, memory.keys.shape[-1])
        for tensor, index in ((memory.keys, wide), (memory.values, wide), (memory.scores, best)):
            tensor[:, start - number : start] = tensor[:, rows].gather(1, index)
        chosen = positions.gather(1, best)
        memory.positions[:, start - number : start] = torch.where(found | ~complete[:, None], chosen, -1)


@functools.lru_cache(maxsize=1024)
def _near_rows(slots: tuple[int, ...], sinks: int, window: int, device: torch.device) -> Tensor:
    """(N) 1 at rows of the window, 0 at slots."""
    rows = [row for number in slots for row in [0] * (number + sinks) + [1] * window]
    return torch.tensor(rows, device=device)


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
    initial_state: BoundedMemory | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Return the weights of :func:`bounded_attention`, with a column for each position of a row's real tokens.

    For inspection, since it has L x M numbers per head. Arguments as there; column j belongs to the j-th real token of
    the row, whatever its document, those of the initial state first.

    Returns:
        (B, H, L, M) in float32 (float64 for float64 inputs), M the real tokens of the longest row with its cached ones.
    """
    _check(q, k, v, window, slots, sinks, chunk_size, decay, initial_state, seq_idx)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums = accumulator(q)
    B, L, H, _ = q.shape
    if B == 0:
        return empty_batch((B, H, L, L), sums, q, k)
    state = None if initial_state is None else _packed(initial_state, sums)
    plan = _Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
    columns = int((plan.offset + plan.start + plan.count).max()) if plan.documents else L
    matrix = torch.zeros(B * L, H, columns, dtype=sums, device=q.device)
    with without_autocast(q):
        for group in _groups(plan, q, k, v, state, scale):
            for step in group.run(_per_head(decay, slots)):
                place = (step.positions + plan.offset[:, None, None]).clamp(min=0)[:, :, None, None]
                rows = torch.zeros(*step.weights.shape[:-1], columns, dtype=sums, device=q.device)
                rows.scatter_add_(-1, place.expand_as(step.weights), step.weights)
                document, column = step.valid.nonzero(as_tuple=True)
                token = plan.tokens[document, step.first[document] + column]
                for number, head in enumerate(group.heads):
                    for member in range(rows.shape[2]):
                        matrix[token, head * rows.shape[2] + member] = rows[document, number, member, column]
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
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Compute :func:`bounded_attention` by its definition, token by token, differentiated by autograd."""
    B, L, H, P = q.shape
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
                    weights = (q[row, token, heads].to(sums) @ keys[seen].T * scale).softmax(-1)
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


def _packed(memory: BoundedMemory, dtype: torch.dtype) -> Tensor:
    """(B, N, 2 P + 2) keys, values, score and position of each row in one tensor."""
    parts = (memory.keys, memory.values, memory.scores[..., None], memory.positions[..., None])
    return torch.cat([part.to(dtype) for part in parts], dim=-1)


class _Plan:
    """Where the documents of a batch stand, and which positions each of their chunks sees.

    Attributes:
        documents: R documents, those of a row one after the other.
        tokens: (R, T) index of each document's new tokens in the flattened (B, L), 0 beyond their number.
        start: (R) tokens of the document in the memory.
        count: (R) new tokens, at most T.
        offset: (R) real tokens of the row that belong to earlier documents.
        last: (B) last document of each row; -1 of a row without one.
        chunks: number of chunks to run.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        state: Tensor | None,
        seq_idx: Tensor | None,
        window: int,
        sinks: int,
        slots: list[int],
        chunk_size: int,
        device: torch.device,
    ) -> None:
        self.batch, self.length, self.window, self.sinks, self.chunk = batch, length, window, sinks, chunk_size
        self.capacity = [number + sinks for number in slots]
        self.held = state is not None
        rows = torch.arange(batch, device=device)
        if seq_idx is None:
            self.tokens = rows[:, None] * length + torch.arange(length, device=device)
            self.count = torch.full((batch,), length, device=device)
            self.offset, self.last, self.documents = torch.zeros_like(rows), rows, batch
        else:
            self._find_documents(seq_idx.long())
        self.start = torch.zeros_like(self.count)
        if state is not None:
            near = state[:, self.capacity[0] : self.capacity[0] + window, -1]
            self.start = near.amax(1).long() + 1
        self.present = torch.arange(self.tokens.shape[1], device=device) < self.count[:, None]  # (R, T)
        phase = self.start % chunk_size
        most = int((phase + self.count).max()) if device.type == "cpu" else chunk_size - 1 + self.tokens.shape[1]
        self.chunks = -(-most // chunk_size)
        aligned = torch.arange(self.chunks * chunk_size, device=device) - phase[:, None]
        self.valid = (aligned >= 0) & (aligned < self.count[:, None])  # (R, chunks C) queries that are there
        self.aligned = aligned.clamp(0, max(self.tokens.shape[1] - 1, 0))
        self.back = phase[:, None] + torch.arange(self.tokens.shape[1], device=device)  # the inverse

    def _find_documents(self, seq_idx: Tensor) -> None:
        batch, length = seq_idx.shape
        real = seq_idx >= 0
        row, column = real.nonzero(as_tuple=True)
        token = row * length + column
        named = row * (seq_idx.max() + 2) + seq_idx[row, column]
        if self.held:  # a row is one document, and one without new tokens has a memory to return
            lowest = seq_idx.masked_fill(~real, torch.iinfo(seq_idx.dtype).max).amin(1)
            if host_reads(seq_idx) and bool((seq_idx.amax(1) > lowest).any()):
                raise ValueError("seq_idx must hold one document in each row that continues a memory, got more")
            named = row
            self.documents = batch
            self.count = torch.bincount(row, minlength=batch)
            first_row = torch.arange(batch, device=seq_idx.device)
            number = row
        else:
            unique, number, self.count = named.unique_consecutive(return_inverse=True, return_counts=True)
            self.documents = len(unique)
            first_row = row.new_zeros(self.documents).scatter_(0, number, row)
        begin = self.count.cumsum(0) - self.count  # (R) first token of each document among the real ones
        place = torch.arange(len(token), device=token.device) - begin[number]
        width = max(int(self.count.max()) if self.documents else 0, 1)
        self.tokens = token.new_zeros(self.documents, width)
        self.tokens[number, place] = token
        per_row = torch.bincount(row, minlength=batch)
        self.offset = begin - (per_row.cumsum(0) - per_row)[first_row]
        self.last = torch.full((batch,), -1, device=token.device)
        self.last[first_row] = torch.arange(self.documents, device=token.device)  # of equal rows the last one stays

    def near(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the window of each document's `chunk`-th chunk.

        Returns:
            base: (R) its first position.
            positions: (R, w), negative where there is no token.
            relative: (R, w) positions counted from the first new token.
        """
        base = (self.start // self.chunk + chunk) * self.chunk
        oldest = base + self.chunk - self.window
        return base, *self.there(oldest[:, None] + torch.arange(self.window, device=base.device))

    def there(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (R, w) positions, -1 where there is no token, and the same counted from the first new token."""
        relative = positions - self.start[:, None]
        found = (positions >= 0) & (relative < self.count[:, None])
        return positions.masked_fill(~found, -1), relative


class _Step(NamedTuple):
    """One chunk of the documents, for the h heads of a group of J query heads each.

    Attributes:
        first: (R) its first new token, negative where the chunk began in the memory.
        valid: (R, C) queries that are there.
        positions: (R, h, S + w) of the columns, negative where there is none.
        index: (R, h, S + w) of the columns in the group's source.
        weights: (R, h, J, C, S + w) probabilities.
    """

    first: Tensor
    valid: Tensor
    positions: Tensor
    index: Tensor
    weights: Tensor


class _Group:
    """The key-value heads that have S slots each, in one batch of products.

    Their source is the rows of the memory, S slots and w positions, if there is one, and then the new tokens.
    """

    def __init__(
        self, plan: _Plan, heads: list[int], q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float
    ) -> None:
        self.plan, self.heads, self.slots = plan, heads, plan.capacity[heads[0]]
        members = q.shape[2] // k.shape[2]
        sums, width = accumulator(q), q.shape[-1]
        index = torch.tensor(heads, device=q.device)

        def new(x: Tensor) -> Tensor:  # (B, L, KV, P) to (R, h, T, P)
            picked = x.flatten(0, 1)[:, index][plan.tokens].to(sums)
            return picked.masked_fill(~plan.present[..., None, None], 0).transpose(1, 2)

        self.keys, self.values = new(k), new(v)
        queries = q.unflatten(2, (k.shape[2], members)).flatten(0, 1)[:, index][plan.tokens].to(sums) * scale
        queries = queries.masked_fill(~plan.present[..., None, None, None], 0).permute(0, 2, 3, 1, 4)  # (R, h, J, T, P)
        aligned = plan.aligned[:, None, None, :, None].expand(-1, *queries.shape[1:3], -1, width)
        self.queries = queries.gather(3, aligned)
        self.old = 0
        self.scores = self.keys.new_zeros(self.keys.shape[:3])
        self.slot_positions = plan.start.new_full((plan.documents, len(heads), self.slots), -1)
        if state is not None:
            self.old = self.slots + plan.window
            held = torch.stack([state[:, self.rows(head)] for head in heads], dim=1)
            keys, values, scores, positions = held.split([width, width, 1, 1], dim=-1)
            self.keys, self.values = torch.cat([keys, self.keys], dim=2), torch.cat([values, self.values], dim=2)
            self.scores = torch.cat([scores[..., 0], self.scores], dim=2)
            self.slot_positions = positions[:, :, : self.slots, 0].long()
        self.slot_index = torch.zeros_like(self.slot_positions)
        if state is not None:
            self.slot_index = torch.arange(self.slots, device=q.device).expand_as(self.slot_positions)

    def rows(self, head: int) -> slice:
        """The rows of a head in the memory."""
        first = sum(self.plan.capacity[:head]) + head * self.plan.window
        return slice(first, first + self.plan.capacity[head] + self.plan.window)

    def near_index(self, positions: Tensor, relative: Tensor) -> Tensor:
        """(R, w) positions to (R, h, w) places in the source; any where there is no token."""
        index = torch.where(relative >= 0, self.old + relative, self.slots + positions % self.plan.window)
        return index.masked_fill(positions < 0, 0)[:, None].expand(-1, len(self.heads), -1)

    def weights(self, chunk: int, base: Tensor, positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the (R, h, J, C, S + w) probabilities of a chunk and its (R, h, S + w, P) keys and values."""
        plan = self.plan
        part = slice(chunk * plan.chunk, (chunk + 1) * plan.chunk)
        place = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        keys, values = self.keys.gather(2, place), self.values.gather(2, place)
        now = base[:, None] + torch.arange(plan.chunk, device=base.device)  # (R, C)
        seen = (positions >= 0)[:, :, None] & (positions[:, :, None] <= now[:, None, :, None])
        seen = (seen & plan.valid[:, None, part, None])[:, :, None]  # (R, h, 1, C, S + w)
        queries = self.queries[:, :, :, part]
        scores = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])
        return scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0), keys, values

    def run(self, decay: list[float]) -> Iterator[_Step]:
        """Run the chunks in order, choosing what the slots hold in the next."""
        plan, heads = self.plan, len(self.heads)
        norms = self.values.norm(dim=-1)
        fade = self.keys.new_tensor([decay[head] for head in self.heads])[:, None]  # (h, 1)
        fading = fade ** torch.arange(plan.chunk - 1, -1, -1, device=self.keys.device)  # (h, C)
        for chunk in range(plan.chunks):
            base, near, relative = plan.near(chunk)
            near_index = self.near_index(near, relative)
            index = torch.cat([self.slot_index, near_index], dim=2)
            positions = torch.cat([self.slot_positions, near[:, None].expand(-1, heads, -1)], dim=2)
            weights, _, _ = self.weights(chunk, base, positions, index)
            valid = plan.valid[:, chunk * plan.chunk : (chunk + 1) * plan.chunk]
            first = base - plan.start
            yield _Step(first, valid, positions, index, weights)
            if min(decay) < 1:  # once per chunk, in the call that has its first token
                begun = (first >= 0) & (first < plan.count)
                self.scores = torch.where(begun[:, None, None], self.scores * fade**plan.chunk, self.scores)
            received = (weights.sum(2) * fading[..., None]).sum(2)
            self.scores = self.scores.scatter_add(2, index, received)
            if self.slots:
                self._choose(self.scores * norms, base, near[:, : plan.chunk], near_index[:, :, : plan.chunk])

    def _choose(self, rank: Tensor, base: Tensor, leaving: Tensor, leaving_index: Tensor) -> None:
        """Let the (R, C) positions that leave the window compete for the slots, where the chunk is complete."""
        plan = self.plan
        index = torch.cat([self.slot_index, leaving_index], dim=2)
        positions = torch.cat([self.slot_positions, leaving[:, None].expand(-1, len(self.heads), -1)], dim=2)
        rank = rank.gather(2, index).masked_fill(positions < plan.sinks, math.inf).masked_fill(positions < 0, -math.inf)
        best = rank.topk(self.slots, dim=-1).indices
        complete = (base + plan.chunk <= plan.start + plan.count)[:, None, None]
        self.slot_index = torch.where(complete, index.gather(2, best), self.slot_index)
        self.slot_positions = torch.where(complete, positions.gather(2, best), self.slot_positions)

    def last(self) -> tuple[Tensor, Tensor]:
        """Return the (R, h, S + w) places in the source, and positions, of the memory after the last token."""
        plan = self.plan
        newest = (plan.start + plan.count - 1)[:, None]
        near, relative = plan.there(newest - (newest - torch.arange(plan.window, device=newest.device)) % plan.window)
        index = torch.cat([self.slot_index, self.near_index(near, relative)], dim=2)
        return index, torch.cat([self.slot_positions, near[:, None].expand(-1, len(self.heads), -1)], dim=2)


def _groups(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float) -> Iterator[_Group]:
    """Yield the key-value heads grouped by their numbers of slots."""
    for number in sorted(set(plan.capacity)):
        heads = [head for head, capacity in enumerate(plan.capacity) if capacity == number]
        yield _Group(plan, heads, q, k, v, state, scale)


class _Bounded(torch.autograd.Function):
    """Keeps which columns each chunk saw; probabilities are computed again in the backward."""

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
    ) -> tuple[Tensor, Tensor]:
        B, L, H, P = q.shape
        plan = _Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
        members, sums = H // k.shape[2], accumulator(q)
        out = torch.zeros(B * L, k.shape[2], members, P, dtype=sums, device=q.device)
        rows = sum(plan.capacity) + len(slots) * window
        packed = torch.zeros(B, rows, 2 * P + 2, dtype=sums, device=q.device)
        packed[..., -1] = -1
        seen: list[Tensor] = []
        with without_autocast(q):
            for group in _groups(plan, q, k, v, state, scale):
                chunks: list[Tensor] = []
                for step in group.run(decay):
                    place = step.index[..., None].expand(-1, -1, -1, P)
                    values = group.values.gather(2, place)
                    chunks.append((step.weights.flatten(2, 3) @ values).unflatten(2, step.weights.shape[2:4]))
                    seen += [step.index, step.positions]
                _put(out, plan, group.heads, torch.cat(chunks, dim=3))
                index, positions = group.last()
                seen += [index, positions]
                place = index[..., None].expand(-1, -1, -1, P)
                held = [group.keys.gather(2, place), group.values.gather(2, place)]
                held += [group.scores.gather(2, index)[..., None], positions[..., None].to(sums)]
                memory = torch.cat(held, dim=-1).masked_fill((positions < 0)[..., None], 0)
                memory[..., -1] = positions
                present = plan.last >= 0
                for number, head in enumerate(group.heads):
                    packed[present, group.rows(head)] = memory[plan.last[present], number]
        ctx.save_for_backward(q, k, v, state, seq_idx, *seen)
        ctx.options = window, sinks, slots, chunk_size, scale
        ctx.set_materialize_grads(True)
        return out.view(q.shape).to(q.dtype), packed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        do, dpacked = gradients
        q, k, v, state, seq_idx, *seen = ctx.saved_tensors
        window, sinks, slots, chunk_size, scale = ctx.options
        B, L, H, P = q.shape
        plan = _Plan(B, L, state, seq_idx, window, sinks, slots, chunk_size, q.device)
        members, sums = H // k.shape[2], accumulator(q)
        dq = torch.zeros(B * L, k.shape[2], members, P, dtype=sums, device=q.device)
        dk, dv = (torch.zeros(B * L, k.shape[2], P, dtype=sums, device=q.device) for _ in "kv")
        dstate = None if state is None else torch.zeros_like(state)
        found = iter(seen)
        do = do.unflatten(2, (k.shape[2], members)).flatten(0, 1)
        document, column = plan.present.nonzero(as_tuple=True)
        token = plan.tokens[document, column]
        with without_autocast(q):
            for group in _groups(plan, q, k, v, state, scale):
                index_of_heads = torch.tensor(group.heads, device=q.device)
                outer = do[:, index_of_heads][plan.tokens].to(sums).permute(0, 2, 3, 1, 4)  # (R, h, J, T, P)
                aligned = plan.aligned[:, None, None, :, None].expand(-1, *outer.shape[1:3], -1, P)
                outer = outer.gather(3, aligned)
                dkeys, dvalues = torch.zeros_like(group.keys), torch.zeros_like(group.values)
                parts: list[Tensor] = []
                for chunk in range(plan.chunks):
                    index, positions = next(found), next(found)
                    base, _, _ = plan.near(chunk)
                    weights, keys, values = group.weights(chunk, base, positions, index)
                    part = slice(chunk * plan.chunk, (chunk + 1) * plan.chunk)
                    cotangent, weights = outer[:, :, :, part].flatten(2, 3), weights.flatten(2, 3)
                    place = index[..., None].expand(-1, -1, -1, P)
                    dvalues.scatter_add_(2, place, weights.mT @ cotangent)
                    dweights = cotangent @ values.mT
                    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
                    queries = group.queries[:, :, :, part].flatten(2, 3)
                    dkeys.scatter_add_(2, place, dscores.mT @ queries)
                    parts.append((dscores @ keys).unflatten(2, (members, -1)) * scale)
                _put(dq, plan, group.heads, torch.cat(parts, dim=3))
                index, positions = next(found), next(found)
                present = plan.last >= 0
                for number, head in enumerate(group.heads):
                    dmemory = dkeys.new_zeros(plan.documents, index.shape[2], 2 * P)
                    dmemory[plan.last[present]] = dpacked[present, group.rows(head), : 2 * P]
                    dmemory = dmemory.masked_fill((positions[:, number] < 0)[..., None], 0)
                    place = index[:, number, :, None].expand(-1, -1, P)
                    dkeys[:, number].scatter_add_(1, place, dmemory[..., :P])
                    dvalues[:, number].scatter_add_(1, place, dmemory[..., P:])
                    dk[token, head] = dkeys[document, number, group.old + column]
                    dv[token, head] = dvalues[document, number, group.old + column]
                    if dstate is not None:
                        dstate[:, group.rows(head), :P] = dkeys[:, number, : group.old]
                        dstate[:, group.rows(head), P : 2 * P] = dvalues[:, number, : group.old]
        return (
            dq.view(q.shape).to(q.dtype),
            dk.view(k.shape).to(k.dtype),
            dv.view(v.shape).to(v.dtype),
            dstate,
            *[None] * 7,
        )


def _put(out: Tensor, plan: _Plan, heads: list[int], chunks: Tensor) -> None:
    """Put the (R, h, J, chunks C, P) results of aligned queries where their tokens stand in (B L, KV, J, P)."""
    document, column = plan.present.nonzero(as_tuple=True)
    token = plan.tokens[document, column]
    for number, head in enumerate(heads):
        out[token, head] = chunks[document, number, :, plan.back[document, column]]


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
) -> tuple[Tensor, Tensor]:
    rows = sum(slots) + len(slots) * (sinks + window)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], rows, 2 * q.shape[3] + 2, dtype=accumulator(q))


_traced = opaque(
    _Bounded,
    "bounded_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? state, Tensor? seq_idx, int window, int sinks, int[] slots, int chunk_size, "
    "float[] decay, float scale",
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
    if len(_per_head(decay, slots)) != len(slots) or not all(0 < each <= 1 for each in _per_head(decay, slots)):
        raise ValueError(
            f"decay must be above 0 and at most 1, one or one for each of {len(slots)} key-value heads, got {decay}"
        )
    if initial_state is not None:
        rows = sum(slots) + len(slots) * (sinks + window)
        check_tensor("initial_state.keys", initial_state.keys, (B, rows, P), "(B, N, P)")
        check_tensor("initial_state.values", initial_state.values, (B, rows, P), "(B, N, P)")
        check_tensor("initial_state.scores", initial_state.scores, (B, rows), "(B, N)")
    check_devices(q=q, k=k, v=v, seq_idx=seq_idx)
