"""The chunks of attention over a bounded memory: which rows each of them sees, its outputs and its gradients.

Symbols beside those of `bounded_attention.py`: R documents, n chunks, h key-value heads of a group, J query heads of
each, G = R h, S slots of the head of the group that has most.

All documents are laid on one grid of chunks. For each document and head there is a table of lines, a key and a value
each: first the slots of the memory it goes on from, if any, then its positions from w before its first chunk on. The
window of a chunk is a slice of the table.

What is near does not depend on the choice of slots, so scores and sums of all windows are computed at once. Only the
slots need a loop over chunks. They are rows of a pool that has C rows more, which are free: those that leave the window
are written to the free rows, and the C rows with the lowest scores become free. Lines that the slots held are noted,
and with them the backward computes many chunks at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .bounded_attention_triton import bounded_attention_chunks_triton
from .checks import accumulator
from .tracing import host_reads

_PADDING = 20_000  # scores of a chunk that may be computed in vain to save a loop over chunks
_BLOCK = 2**19  # numbers of keys and values that the backward gathers at once


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Cap scores softly in place, c tanh(s / c); without a cap, None or 0, return them as they are."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


class Plan:
    """Where the documents of a batch stand on the grid of chunks.

    Attributes:
        documents: R documents, those of a row one after the other.
        start: (R) tokens of the document in the memory.
        count: (R) new tokens.
        offset: (R) real tokens of the row that belong to earlier documents.
        last: (B) last document of each row; -1 of a row without one.
        chunks: n, number of chunks to run.
        first: (R) first position of the table of lines, w before the first chunk.
        document, token, place: for each new token its document, its index in the flattened (B, L) and its place on
            the document's grid.
        whole: whether each row is one document that begins here.
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
        if not length:
            seq_idx = None  # without a token there is no document to tell apart
        self.window, self.sinks, self.chunk, self.length = window, sinks, chunk_size, length
        self.capacity = [number + sinks for number in slots]
        self.held, self.whole = state is not None, state is None and seq_idx is None
        row = torch.arange(batch, device=device)
        if seq_idx is None:
            self.count = torch.full((batch,), length, device=device)
            self.offset, self.last, self.documents = torch.zeros_like(row), row, batch
            self.token = torch.arange(batch * length, device=device)
            self.document, column = row.repeat_interleave(length), torch.arange(length, device=device).repeat(batch)
        else:
            column = self._find_documents(seq_idx.long())
        self.start = torch.zeros_like(self.count)
        if state is not None:
            near = state[:, self.capacity[0] : self.capacity[0] + window, -1]
            self.start = near.amax(1).long() + 1
        phase = self.start % chunk_size
        most = length if self.whole else chunk_size - 1 + length
        if device.type == "cpu" and not self.whole:
            most = int((phase + self.count).max()) if self.documents else 0
        self.chunks = max(-(-most // chunk_size), 1)
        self.first = self.start - phase - window
        self.place = phase[self.document] + column

    def _find_documents(self, seq_idx: Tensor) -> Tensor:
        """Set the documents and their tokens; return the column of each token in its document."""
        batch, length = seq_idx.shape
        real = seq_idx >= 0
        row, column = real.nonzero(as_tuple=True)
        self.token = row * length + column
        named = row * (seq_idx.max() + 2) + seq_idx[row, column]
        if self.held:  # a row is one document, and one without new tokens has a memory to return
            lowest = seq_idx.masked_fill(~real, torch.iinfo(seq_idx.dtype).max).amin(1)
            if host_reads(seq_idx) and bool((seq_idx.amax(1) > lowest).any()):
                raise ValueError("seq_idx must hold one document in each row that continues a memory, got more")
            self.documents = batch
            self.count = torch.bincount(row, minlength=batch)
            first_row = torch.arange(batch, device=seq_idx.device)
            self.document = row
        else:
            unique, self.document, self.count = named.unique_consecutive(return_inverse=True, return_counts=True)
            self.documents = len(unique)
            first_row = row.new_zeros(self.documents).scatter_(0, self.document, row)
        begin = self.count.cumsum(0) - self.count  # (R) first token of each document among the real ones
        per_row = torch.bincount(row, minlength=batch)
        self.offset = begin - (per_row.cumsum(0) - per_row)[first_row]
        in_row = torch.bincount(first_row, minlength=batch)
        self.last = (in_row.cumsum(0) - 1).masked_fill(in_row == 0, -1)
        return torch.arange(len(row), device=seq_idx.device) - begin[self.document]

    def align(self, x: Tensor, heads: list[int], dtype: torch.dtype) -> Tensor:
        """(B, L, KV, J, P) to (n, R, h, J, C, P), zero where there is no token."""
        J, P = x.shape[3:]
        shape = self.chunks, self.documents, len(heads), J, self.chunk, P
        aligned = torch.empty(shape, dtype=dtype, device=x.device) if self.whole else x.new_zeros(shape, dtype=dtype)
        grid = aligned.permute(1, 0, 4, 2, 3, 5)  # (R, n, C, h, J, P)
        if self.whole:
            full, rest = divmod(self.length, self.chunk)
            x = x[:, :, _index(heads)]
            grid[:, full:] = 0
            # Autograd refuses further changes of a tensor whose empty part was set.
            if full:
                grid[:, :full] = x[:, : full * self.chunk].unflatten(1, (full, self.chunk))
            if rest:
                grid[:, full:, :rest] = x[:, None, full * self.chunk :]
        else:
            place = self.document, self.place // self.chunk, self.place % self.chunk
            grid[place] = x.flatten(0, 1)[self.token][:, _index(heads)].to(dtype)
        return aligned

    def put(self, out: Tensor, heads: list[int], part: slice, aligned: Tensor) -> None:
        """Write the (m, R, h, J, C, P) results of the chunks of `part` to their tokens in (B, L, KV, J, P)."""
        grid = aligned.permute(1, 0, 4, 2, 3, 5).flatten(1, 2).to(out.dtype)
        begin, end = part.start * self.chunk, part.stop * self.chunk
        if self.whole:
            out[:, begin:end, _index(heads)] = grid[:, : self.length - begin]
        else:
            here = (self.place >= begin) & (self.place < end)
            of_head = torch.tensor(heads, device=out.device)
            out.flatten(0, 1)[self.token[here, None], of_head] = grid[self.document[here], self.place[here] - begin]

    def put_lines(self, out: Tensor, heads: list[int], lines: Tensor) -> None:
        """Write the (R, h, w + n C, P) lines of new tokens to (B, L, KV, P)."""
        grid = lines.transpose(1, 2)[:, self.window :].to(out.dtype)
        if self.whole:
            out[:, :, _index(heads)] = grid[:, : self.length]
        else:
            of_head = torch.tensor(heads, device=out.device)
            out.flatten(0, 1)[self.token[:, None], of_head] = grid[self.document, self.place]

    def rows(self, head: int) -> slice:
        """The rows of a head in the memory."""
        first = sum(self.capacity[:head]) + head * self.window
        return slice(first, first + self.capacity[head] + self.window)

    def narrow(self, x: Tensor, head: int) -> Tensor:
        """(B, S + w, ...) to the rows that the head has in the memory."""
        slots = x.shape[1] - self.window
        return torch.cat([x[:, : self.capacity[head]], x[:, slots:]], dim=1)

    def widen(self, x: Tensor, head: int, slots: int) -> Tensor:
        """The inverse of :meth:`narrow`, with rows of zeros."""
        none = x.new_zeros(x.shape[0], slots - self.capacity[head], *x.shape[2:])
        return torch.cat([x[:, : self.capacity[head]], none, x[:, self.capacity[head] :]], dim=1)


class Chunks:
    """The queries and the table of lines of a group of heads.

    Attributes:
        queries: (n, R, h, J, C, P), scaled.
        lines: (R, h, old + w + n C, 2 P) keys and values; `old` is S with a memory to go on from, else 0.
        used: for each chunk how many rows of the pool may hold a line. Set by :meth:`run`, as the next.
        seen: (n, G, S or fewer) lines in the slots at each chunk, the last ones negative where slots are empty.
    """

    def __init__(
        self,
        plan: Plan,
        heads: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.plan, self.heads, self.softcap = plan, heads, softcap
        self.slots = max(plan.capacity[head] for head in heads)
        self.old = 0 if state is None else self.slots
        self.width = width = q.shape[-1]
        sums = accumulator(q)
        self.queries = plan.align(q.unflatten(2, (k.shape[2], -1)), heads, sums).mul_(scale)
        length = self.old + plan.window + plan.chunks * plan.chunk
        self.lines = q.new_zeros(plan.documents, len(heads), length, 2 * width, dtype=sums)
        begin, by_position = self.old + plan.window, self.lines.transpose(1, 2)
        for x, part in ((k, slice(0, width)), (v, slice(width, 2 * width))):
            x = x[:, :, _index(heads)]
            if plan.whole:
                by_position[:, begin : begin + plan.length, :, part] = x
            else:
                by_position[plan.document, begin + plan.place, :, part] = x.flatten(0, 1)[plan.token].to(sums)
        self.positions = plan.first[:, None] + torch.arange(length - self.old, device=q.device)
        self.scores = self.lines.new_zeros(self.lines.shape[:3])
        self.used: list[int] = []
        self.slot_positions = self.positions.new_full((plan.documents, len(heads), self.old), -1)
        if state is not None:
            held = torch.stack([plan.widen(state[:, plan.rows(head)], head, self.slots) for head in heads], dim=1)
            index = self.held_lines()[:, None].expand(held.shape[:3])
            self.lines.scatter_(2, index[..., None].expand(-1, -1, -1, 2 * width), held[..., : 2 * width])
            self.scores.scatter_(2, index, held[..., -2])
            for number, head in enumerate(heads):  # other slots stay without a position
                own = plan.capacity[head]
                self.slot_positions[:, number, :own] = held[:, number, :own, -1].long()

    def held_lines(self) -> Tensor:
        """(R, S + w) line of each row of the memory that the documents go on from."""
        slots = torch.arange(self.slots, device=self.lines.device).expand(self.plan.documents, -1)
        return torch.cat([slots, self.window_lines(self.plan.start - 1)[0]], dim=1)

    def positions_of(self, index: Tensor) -> Tensor:
        """(m, G, S') lines to the (m, R, h, S') positions, any where the line is negative."""
        R, h, length = self.scores.shape
        positions = torch.cat([self.slot_positions, self.positions[:, None].expand(R, h, -1)], dim=2)
        place = index.clamp(min=0).unflatten(1, (R, h))
        return positions.expand(len(index), R, h, length).gather(3, place)

    def window_lines(self, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (R, w) lines, and positions, of the rows of a window whose (R) newest position is given."""
        row = torch.arange(self.plan.window, device=newest.device)
        position = newest[:, None] - (newest[:, None] - row) % self.plan.window
        return self.old + position - self.plan.first[:, None], position

    def run(self, decay: list[float], kernels: bool) -> Iterator[tuple[slice, Tensor]]:
        """Run the chunks in order, choosing what the slots hold; yield the (m, R, h, J, C, P) outputs of m chunks.

        With `kernels` in Triton, unless no head of the group has slots.
        """
        if self.slots == self.plan.sinks:
            yield from self._run_without_slots(decay)
            return
        if kernels:
            yield self._run_in_triton(decay)
            return
        plan, width = self.plan, self.width
        n, R, h, J, C, P = self.queries.shape
        G, w = R * h, plan.window
        lines, queries = self.lines.flatten(0, 1), self.queries.view(n, G, J * C, P)
        fading, fades = self._fading([decay[head] for head in self.heads])
        self.pool = pool = _Pool(self)
        scores = pool.table_marks[0]
        seen = lines.new_full((n, 2, G, pool.rows), -math.inf)
        windows = self._windows(lines)
        step = max(1, _BLOCK // (max(G, 1) * (J * C * P + w * 2 * P)))
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            near, log_sums = self._near(part, windows)
            shares = torch.ones_like(log_sums)  # of the window in each query's attention
            outputs = queries.new_zeros(len(near), G, J * C, P)
            for chunk in range(part.start, part.stop):
                share, used = shares[chunk - first], pool.used
                self.used.append(used)
                if used:
                    seen[chunk, :, :, :used] = pool.marks[3:, :, :used]
                    products = capped(torch.bmm(queries[chunk], pool.keys[:, :used].mT), self.softcap)
                    products.add_(pool.bias[:, None, :used])
                    weights = torch.cat([products, log_sums[chunk - first]], dim=-1).softmax(-1)
                    share.copy_(weights[..., used:])
                    weights = weights[..., :used]
                    torch.bmm(weights, pool.values[:, :used], out=outputs[chunk - first])
                    if fades is not None:
                        pool.scores.mul_(fades[chunk])
                    pool.scores[:, :used].add_(torch.bmm(fading[chunk], weights)[:, 0])
                begin = self.old + (chunk + 1) * C
                received = scores[:, begin : begin + w]
                if fades is not None:
                    received.mul_(fades[chunk])
                received.add_(torch.bmm(fading[chunk] * share.mT, near[chunk - first])[:, 0])
                if pool.rows and (self.old or (chunk + 2) * C > w):
                    pool.choose(slice(begin, begin + C))
            outputs.flatten(0, 1).baddbmm_(near.mul_(shares).flatten(0, 1), windows[part, ..., width:].flatten(0, 1))
            yield part, outputs.view(part.stop - part.start, R, h, J, C, P)
        lines_seen = seen[:, 1].masked_fill_(seen[:, 0] < 0, -1).int()
        self.seen = lines_seen.sort(dim=2, descending=True).values[:, :, : self.slots]  # without the free rows

    def _run_in_triton(self, decay: list[float]) -> tuple[slice, Tensor]:
        """Do what :meth:`run` does in one launch."""
        plan, slots = self.plan, self.slots
        n, R, h, J, C, P = self.queries.shape
        fading, fades = self._fading([decay[head] for head in self.heads])
        fading = fading.reshape(n, R * h, J * C).contiguous()
        fades = None if fades is None else fades.reshape(n, R * h).contiguous()
        table_marks = self.marks()
        capacity = torch.tensor([plan.capacity[head] for head in self.heads], device=self.lines.device)
        held = torch.full((R * h, slots), -1, dtype=torch.int32, device=self.lines.device)
        if self.old:
            line = torch.arange(slots, device=held.device, dtype=torch.int32)
            held = torch.where(table_marks[3, :, :slots] < 0, held, line)
        chunks = (plan.start - plan.first - plan.window + plan.count + C - 1) // C
        outputs, seen = bounded_attention_chunks_triton(
            *(self.queries, self.lines, table_marks, fading, fades, plan.first, chunks, capacity, held, self.old),
            *(plan.window, self.softcap or 0.0),
        )
        self.seen = seen[:-1].sort(dim=2, descending=True).values[:, :, :slots]
        # As many as have left the window, at most.
        self.used = [slots if self.old else min(max((chunk + 1) * C - plan.window, 0), slots) for chunk in range(n)]
        last = seen[-1].long()
        marks = table_marks.gather(2, last.clamp(min=0).expand(5, -1, -1))
        marks[3].masked_fill_(last < 0, -math.inf)
        self.pool = _Held(table_marks, marks)
        return slice(0, n), outputs.view(n, R, h, J, C, P)

    def _run_without_slots(self, decay: list[float]) -> Iterator[tuple[slice, Tensor]]:
        """Do what :meth:`run` does for heads without slots: only sinks stay, so that nothing has to be chosen."""
        plan, width = self.plan, self.width
        n, R, h, J, C, P = self.queries.shape
        G, w, s = R * h, plan.window, plan.sinks
        lines, queries = self.lines.flatten(0, 1), self.queries.view(n, G, J * C, P)
        fading, fades = self._fading([decay[head] for head in self.heads])
        sinks, left = self._sinks()
        there = lines.gather(1, sinks[..., None].expand(-1, -1, 2 * width))
        windows = self._windows(lines)
        received = lines.new_empty(n, G, s + w)
        step = max(1, _BLOCK // (max(G, 1) * (J * C * P + w * 2 * P)))
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            near, log_sums = self._near(part, windows)
            far = capped(torch.matmul(queries[part], there[..., :width].mT), self.softcap)
            far.masked_fill_(~left[part, :, None], -math.inf)
            weights = torch.cat([far, log_sums], dim=-1).softmax(-1)
            far, share = weights[..., :s], weights[..., s:]
            near.mul_(share)
            received[part, :, :s] = torch.matmul(fading[part], far)[:, :, 0]
            received[part, :, s:] = torch.matmul(fading[part], near)[:, :, 0]
            outputs = torch.matmul(far, there[..., width:]).flatten(0, 1)
            outputs.baddbmm_(near.flatten(0, 1), windows[part, ..., width:].flatten(0, 1))
            yield part, outputs.view(part.stop - part.start, R, h, J, C, P)
        self.used = [s] * n
        self.seen = torch.where(left, sinks, -1).int()
        self.pool = _Sinks(self, sinks, received, fades)

    def _sinks(self) -> tuple[Tensor, Tensor]:
        """Return the (G, s) lines of the sinks, and (n, G, s) whether they have left the window before each chunk."""
        plan, device = self.plan, self.lines.device
        position = torch.arange(plan.sinks, device=device)
        by_position = (self.old + position - plan.first[:, None])[:, None].expand(-1, len(self.heads), -1)
        held = self.slot_positions[:, :, None] == position[:, None]  # (R, h, s, old)
        line = torch.where(held.any(3), held.byte().argmax(3), by_position) if self.old else by_position
        begin = plan.first[:, None] + plan.chunk * (1 + torch.arange(plan.chunks, device=device))  # (R, n) of windows
        left = (position < begin.T[..., None]) & (position < (plan.start + plan.count)[:, None])  # (n, R, s)
        line = line.clamp(min=0, max=self.lines.shape[2] - 1)  # any for one that is not there
        return line.flatten(0, 1), left[:, :, None].expand(-1, -1, len(self.heads), -1).flatten(1, 2)

    def _windows(self, lines: Tensor) -> Tensor:
        """(G, lines, 2 P) to (n, G, w, 2 P) keys and values of the windows of all chunks."""
        plan = self.plan
        return lines[:, self.old + plan.chunk :].unfold(1, plan.window, plan.chunk).permute(1, 0, 3, 2)

    @functools.cached_property
    def near_bias(self) -> Tensor:
        """(n, R, C, w) 0 where a query sees a position of the window, and minus infinity elsewhere."""
        plan = self.plan
        query, column = (torch.arange(number, device=plan.start.device) for number in (plan.chunk, plan.window))
        causal = column <= query[:, None] + plan.window - plan.chunk
        begun = (self.positions >= 0)[:, plan.chunk :].unfold(1, plan.window, plan.chunk).transpose(0, 1)
        return torch.where(causal & begun[:, :, None], 0.0, -math.inf).to(self.lines.dtype)

    def _near(self, part: slice, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (m, G, J C, w) softmax over the windows of m chunks, and (m, G, J C, 1) logarithms of its sums."""
        m, (_, R, h, J, C, P) = part.stop - part.start, self.queries.shape
        keys = windows[part, ..., : self.width].flatten(0, 1)
        scores = torch.bmm(self.queries[part].view(m * R * h, J * C, P), keys.mT)
        scores = capped(scores, self.softcap).view(m, R, h, J, C, scores.shape[-1])  # R may be 0
        scores += self.near_bias[part, :, None, None]
        # A query beyond its document may see nothing; its result is not used, but must be finite.
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        scores = scores.sub_(top).exp_()
        total = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        scores /= total
        return scores.view(m, R * h, J * C, scores.shape[-1]), top.add_(total.log_()).view(m, R * h, J * C, 1)

    def _fading(self, decay: list[float]) -> tuple[Tensor, Tensor | None]:
        """Return (n, G, 1, J C) factors of the attention that a query gives, and (n, G, 1) of that given before."""
        plan, dtype = self.plan, self.lines.dtype
        n, R, h, J, C, _ = self.queries.shape
        fade = torch.tensor(decay, dtype=dtype, device=plan.start.device)
        chunk, query = (torch.arange(number, device=fade.device) for number in (n, C))
        place = plan.start[:, None] - plan.first[:, None] - plan.window  # (R, 1) phase
        there = chunk[:, None, None] * C + query - place  # (n, R, C) token of each query
        valid = (there >= 0) & (there < plan.count[:, None])
        factors = fade[:, None] ** (C - 1 - query) * valid[:, :, None]
        factors = factors[:, :, :, None].expand(n, R, h, J, C).reshape(n, R * h, 1, J * C)
        if min(decay) == 1:
            return factors, None
        begun = valid[:, :, :1]  # once per chunk, in the call that has its first token
        return factors, torch.where(begun, fade**C, 1.0).reshape(n, R * h, 1)

    def marks(self) -> Tensor:
        """(5, G, lines) what the choice asks of each line.

        Its score, the norm of its value, what is added to their product (infinity if it always stays, minus infinity
        if it is none), what is added to its scores in the softmax (minus infinity if it is none), and its number.
        """
        plan = self.plan
        R, h, length = self.scores.shape
        # Lines that leave the window with a chunk that is not complete stay out of the slots.
        complete = (plan.start + plan.count) // plan.chunk * plan.chunk
        near = torch.where(self.positions < (complete + plan.chunk - plan.window)[:, None], self.positions, -1)
        positions = torch.cat([self.slot_positions, near[:, None].expand(-1, h, -1)], dim=2)
        marks = self.lines.new_zeros(5, R, h, length)
        marks[0], marks[1] = self.scores, self.lines[..., self.width :].norm(dim=-1)
        marks[2].masked_fill_(positions < plan.sinks, math.inf)
        marks[2:4].masked_fill_(positions < 0, -math.inf)
        marks[4] = torch.arange(length, device=positions.device)
        return marks.flatten(1, 2)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return the memory after the last token, and which lines it is made of.

        Returns:
            (R, h, S + w, 2 P + 2) keys, values, scores and positions, and (R, h, S + w) lines, negative for none.
        """
        plan, shape = self.plan, self.scores.shape[:2]
        scores, _, _, bias, source = self.pool.marks.unflatten(1, shape)
        line_scores = self.pool.table_marks[0].unflatten(0, shape)
        hidden = bias < 0
        order = hidden.byte().argsort(dim=2, stable=True)[:, :, : self.slots]
        slots = source.long().masked_fill(hidden, -1).gather(2, order)
        missing = self.slots - slots.shape[2]
        slots, scores = (torch.nn.functional.pad(x, (0, missing), value=-1) for x in (slots, scores.gather(2, order)))
        near, near_positions = self.window_lines(plan.start + plan.count - 1)
        near = near.masked_fill(near_positions < 0, -1)[:, None].expand(*shape, -1)
        index = torch.cat([slots, near], dim=2)
        place = index.clamp(min=0)
        parts = [
            self.lines.gather(2, place[..., None].expand(-1, -1, -1, 2 * self.width)),
            torch.cat([scores, line_scores.gather(2, place[:, :, self.slots :])], dim=2)[..., None],
            self.positions_of(index.flatten(0, 1)[None])[0, ..., None].to(self.lines.dtype),
        ]
        memory = torch.cat(parts, dim=-1).masked_fill_((index < 0)[..., None], 0)
        memory[..., -1].masked_fill_(index < 0, -1)
        return memory, index

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Compute the probabilities of all chunks again, some chunks at a time.

        Yields:
            The chunks, m in number; the (m, G, S' + w) lines that they see, in slots and in the window; their
            (m G, J C, S' + w) probabilities; and their (m G, S' + w, 2 P) keys and values.
        """
        plan, width = self.plan, self.width
        n, R, h, J, C, _ = self.queries.shape
        lines, G, w = self.lines.flatten(0, 2), R * h, plan.window
        hidden = torch.finfo(lines.dtype).min  # not infinity: a query beyond its document may see nothing
        near_bias = self.near_bias.clamp(min=hidden)
        step = max(1, _BLOCK // (max(G, 1) * (self.seen.shape[2] + w) * 2 * width))
        column = torch.arange(w, device=lines.device) + self.old + C
        head = torch.arange(G, device=lines.device)[:, None] * self.lines.shape[2]
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            m, S = part.stop - part.start, min(self.used[part.stop - 1], self.slots)
            slots = self.seen[part, :, :S].long()
            chunk = torch.arange(part.start, part.stop, device=lines.device)[:, None, None]
            index = torch.cat([slots, (chunk * C + column).expand(m, G, w)], dim=2)
            table = lines.index_select(0, (index.clamp(min=0) + head).flatten()).view(m * G, S + w, 2 * width)
            scores = torch.bmm(self.queries[part].view(m * G, J * C, width), table[..., :width].mT)
            scores = capped(scores, self.softcap).view(m, R, h, J, C, S + w)
            scores[..., :S].masked_fill_((slots < 0).view(m, R, h, 1, 1, S), hidden)
            scores[..., S:] += near_bias[part, :, None, None]
            yield part, index, scores.softmax(-1).view(m * G, J * C, S + w), table

    def backward(self, outer: Tensor, dlines: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Add the gradients of the lines to `dlines`; yield the (m, R, h, J, C, P) gradients of the queries."""
        width, G = self.width, self.scores.shape[0] * self.scores.shape[1]
        by_line = dlines.flatten(0, 2)
        head = torch.arange(G, device=outer.device)[:, None] * self.lines.shape[2]
        for part, index, weights, table in self.blocks():
            shape = len(table), weights.shape[1], width
            queries, cotangent = self.queries[part].view(shape), outer[part].view(shape)
            dtable = torch.empty_like(table)
            dtable[..., width:] = torch.bmm(weights.mT, cotangent)
            dweights = torch.bmm(cotangent, table[..., width:].mT).mul_(weights)
            dscores = dweights.sub_(weights.mul_(dweights.sum(-1, keepdim=True)))
            if self.softcap:
                slope = (torch.bmm(queries, table[..., :width].mT) / self.softcap).tanh_().square_()
                dscores = dscores.addcmul_(dscores, slope, value=-1.0)
            dtable[..., :width] = torch.bmm(dscores.mT, queries)
            by_line.index_add_(0, (index.clamp(min=0) + head).flatten(), dtable.flatten(0, 1))
            yield part, torch.bmm(dscores, table[..., :width]).view_as(self.queries[part])


class _Pool:
    """The rows of the slots, and C rows that are free.

    Attributes:
        rows: their number.
        used: those of them that may hold a line: all with a memory to go on from, otherwise as many as are needed.
        keys, values: (G, rows, P).
        scores, bias: (G, rows), as in the marks.
        marks: (5, G, rows) marks of the lines (:meth:`Chunks.marks`); the bias hides the rows that are free.
    """

    def __init__(self, chunks: Chunks) -> None:
        plan, old, C = chunks.plan, chunks.old, chunks.plan.chunk
        self.table, self.table_marks = chunks.lines.flatten(0, 1), chunks.marks()
        G, device = len(self.table), self.table.device
        self.chunk, self.rows = C, chunks.slots + C if chunks.slots else 0
        if not old:
            self.rows = min(self.rows, (plan.chunks + 1) * C)
        self.used = self.rows if old else 0
        self.lines = self.table.new_zeros(G, self.rows, 2 * chunks.width)
        self.marks = self.table.new_zeros(5, G, self.rows)
        self.marks[2:4] = -math.inf
        self.lines[:, :old], self.marks[:, :, :old] = self.table[:, :old], self.table_marks[:, :, :old]
        # Rows beyond those of a head with fewer slots than the others never become free, and are not seen.
        row, first = torch.arange(self.rows, device=device), 0 if old else C
        capacity = torch.tensor([plan.capacity[head] for head in chunks.heads], device=device)
        beyond = (row >= first + capacity[:, None]) & (row < first + chunks.slots)
        self.marks[2].masked_fill_(beyond.repeat(plan.documents, 1), math.inf)
        self.keys, self.values = self.lines[..., : chunks.width], self.lines[..., chunks.width :]
        self.scores, self.norms, self.always, self.bias = (self.marks[number] for number in range(4))
        self.begin = torch.arange(G, device=device)[:, None] * self.rows
        self.free = (self.begin + row[old : old + C]).flatten()

    def choose(self, leaving: slice) -> None:
        """Let the C lines that leave the window compete for the slots; those that lose are free from then on."""
        self.lines.flatten(0, 1).index_copy_(0, self.free, self.table[:, leaving].flatten(0, 1))
        self.marks.flatten(1, 2).index_copy_(1, self.free, self.table_marks[:, :, leaving].flatten(1, 2))
        self.used = used = min(self.used + self.chunk, self.rows) if self.used else min(2 * self.chunk, self.rows)
        rank = torch.addcmul(self.always[:, :used], self.scores[:, :used], self.norms[:, :used])
        self.free = (rank.topk(self.chunk, largest=False, sorted=False).indices + self.begin).flatten()
        self.bias.view(-1).index_fill_(0, self.free, -math.inf)


class _Held(NamedTuple):
    """What the slots hold at the end of a run in Triton, with the attributes of :class:`_Pool` that are read then."""

    table_marks: Tensor
    marks: Tensor


class _Sinks:
    """The sinks of heads without slots at the end of a run, with the attributes of :class:`_Pool` that are read then.

    Args:
        chunks: after its run.
        sinks: (G, s) lines.
        received: (n, G, s + w) attention that sinks and window received in each chunk.
        fades: (n, G, 1) factors of the attention received before, or None.
    """

    def __init__(self, chunks: Chunks, sinks: Tensor, received: Tensor, fades: Tensor | None) -> None:
        plan, (n, _, columns) = chunks.plan, received.shape
        self.table_marks = chunks.marks()
        scores = self.table_marks[0]
        if fades is not None:
            through = fades.flip(0).cumprod(0).flip(0)  # of a chunk and all after it
            scores.mul_(through[0])
            received[:-1].mul_(through[1:])
        chunk = torch.arange(n, device=sinks.device)[:, None]
        column = torch.arange(columns - plan.sinks, device=sinks.device)
        line = chunks.old + (chunk + 1) * plan.chunk + column
        scores.index_add_(1, line.flatten(), received[..., plan.sinks :].transpose(0, 1).flatten(1))
        scores.scatter_add_(1, sinks, received[..., : plan.sinks].sum(0))
        self.marks = self.table_marks.gather(2, sinks.expand(5, -1, -1))
        complete = (plan.start + plan.count) // plan.chunk * plan.chunk
        last = torch.minimum(complete + plan.chunk - plan.window, plan.start + plan.count)
        position = torch.arange(plan.sinks, device=sinks.device)
        kept = (position < last[:, None]).repeat_interleave(len(chunks.heads), 0)
        self.marks[3] = torch.where(kept, 0.0, -math.inf)


def group_heads(plan: Plan, members: int, kernels: bool) -> list[list[int]]:
    """Group the key-value heads of similar numbers of slots: they share a loop, padded to the largest number.

    Heads without slots stand by themselves: they need no loop. In Triton heads share a launch if one has at most twice
    the slots of another.
    """
    order = sorted(range(len(plan.capacity)), key=lambda head: -plan.capacity[head])
    groups: list[list[int]] = []
    for head in order:
        if groups:
            padded = sum(plan.capacity[groups[-1][0]] - plan.capacity[other] for other in [*groups[-1], head])
            alike = (plan.capacity[head] == plan.sinks) == (plan.capacity[groups[-1][0]] == plan.sinks)
            shared = kernels and plan.capacity[groups[-1][0]] <= 2 * plan.capacity[head]
            if alike and (shared or padded * plan.documents * members * plan.chunk <= _PADDING):
                groups[-1].append(head)
                continue
        groups.append([head])
    return [sorted(group) for group in groups]


def _index(heads: list[int]) -> slice | list[int]:
    """The heads as a slice, which makes a view, if they follow each other."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] == len(heads) - 1 else heads
