"""Triton kernels for the decays of the SSD scan: step sizes, log-decays and their sums in one pass, and its backward.

The sums are what the kernels of :mod:`.ssd_triton` need of the decays. They are computed once, and written with the
tokens of a head next to each other, so that those kernels read them in wide accesses and sum nothing themselves.

Symbols: B batch, L length, H heads, T tokens of a padded row, c chunks, Q chunk length; a span is SPAN = 4 Q tokens.

A log2-decay is split in two parts. The coarse part is a multiple of 2^-8 and at least -256, so a sum over a span of up
to 256 tokens is exact in float32; the fine part is the remainder, at most 2^-9 in magnitude. A difference of two sums
is therefore as accurate as the sum of the terms in between. In a single sum near -4000 the contribution of a mild decay
would be lost. A decay below 2^-256 is zero in float32, and so is every product with it; the bound makes -inf finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import INTERPRETED, tl, triton
from .triton_math import narrow, sigmoid, softplus, strides

# Chunks of a span. With Q <= 64, a span has at most the 256 tokens for which coarse sums are exact.
CHUNKS_OF_SPAN = 4
_HEADS = 8  # of a program


class Decays(NamedTuple):
    """The arguments from which the decays of a scan follow; see :func:`.ssd_triton.ssd_scan_triton`."""

    decay: Tensor
    """(B, L, H) step sizes, or log-decays if `A` is None"""
    A: Tensor | None
    """(H)"""
    dt_bias: Tensor | None
    """(H)"""
    marks: Tensor | None
    """(B, L)"""
    dt_softplus: bool
    lowest: float
    highest: float

    def arguments(self) -> tuple[Any, ...]:
        """Return the leading arguments of both kernels."""
        _, length, heads = self.decay.shape
        tensors = self.decay, self.A, self.dt_bias, self.marks
        return *tensors, self.lowest, self.highest, length, heads, *strides(3, self.decay), *strides(1, *tensors[1:3])


def decay_sums(decays: Decays, chunk: int) -> Tensor:
    """Return the inclusive sums of log2-decays over the spans, and the factors of the inputs.

    Args:
        decays: the decays.
        chunk: tokens of a chunk, a power of two up to 64.

    Returns:
        (B, H, 3, T) float32: coarse sums, fine sums F, and factors s 2^-F with s the step size or 1. T is L rounded up
        to whole spans. Tokens from L on have decay one. With the factors, s_j exp(S_i - S_j) takes one operation less
        for each pair of tokens: it is a power of a difference of coarse sums, times a number of each token.
    """
    batch, length, heads = decays.decay.shape
    span = chunk * CHUNKS_OF_SPAN
    spans = triton.cdiv(length, span)
    sums = decays.decay.new_empty(batch, heads, 3, spans * span, dtype=torch.float32)
    sums_kernel[(batch * spans, triton.cdiv(heads, _HEADS))](
        *decays.arguments(),
        sums,
        spans,
        sums.shape[3],
        SOFTPLUS=decays.dt_softplus,
        SPAN=span,
        BLOCK_H=_HEADS,
        num_warps=4,
    )
    return sums


class DecayGradients:
    """Gradients of the decays, of A and of the bias, section by section.

    Attributes:
        decay: gradient of the decays.

    Args:
        decays: the decays.
        chunk: tokens of a chunk, Q.
        chunks: chunks of a row.
    """

    def __init__(self, decays: Decays, chunk: int, chunks: int) -> None:
        batch, _, heads = decays.decay.shape
        self._decays, self._chunk, self._chunks = decays, chunk, chunks
        self.decay = decays.decay.new_empty(decays.decay.shape)
        self._vectors = decays.A, decays.dt_bias
        self._parts = [
            None if one is None else one.new_empty(batch * chunks, heads, dtype=torch.float32) for one in self._vectors
        ]

    def add(self, flows: Tensor, passed: Tensor, first: int, count: int) -> None:
        """Compute the gradients of the chunks from `first` to `first + count`.

        With F_ij the gradient that flows from a target i to a source j <= i of the same chunk, the gradient of
        log-decay k is the sum of F_ij over j < k <= i, of the reads of the entering state by tokens from k on, of the
        contributions of tokens before k to the leaving state, and of what passes from the entering to the leaving one.

        Args:
            flows: (B, H, 4, S) float32 for each token of the section, S >= `count` Q: sum of F_ij that crosses it, its
                read of the entering state, its contribution to the leaving state, and the gradient of its step size;
                (B, H, 3, S) without step sizes.
            passed: (B, S / Q, H) float32 for each chunk.
            first: first chunk of the section.
            count: chunks of the section.
        """
        batch, heads, _, tokens = flows.shape
        gradients_kernel[(batch * count, triton.cdiv(heads, _HEADS))](
            *self._decays.arguments(),
            flows,
            passed,
            self.decay,
            *self._parts,
            *(self._chunks, first, count, tokens),
            SOFTPLUS=self._decays.dt_softplus,
            Q=self._chunk,
            BLOCK_H=_HEADS,
            EMULATE=INTERPRETED,
            num_warps=4,
        )

    def vectors(self) -> list[Tensor | None]:
        """Return the gradients of A and of the bias, None if not given, after all sections."""
        pairs = zip(self._parts, self._vectors, strict=True)
        return [None if part is None or one is None else part.sum(0).to(one.dtype) for part, one in pairs]


@triton.jit
def _before_limits(raw, bias_ptr, heads, in_heads, bias_head, SOFTPLUS: tl.constexpr):
    """Return step sizes with their bias, and the same after softplus."""
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + heads * bias_head, mask=in_heads, other=0.0).to(tl.float32)[:, None]
    size = raw
    if SOFTPLUS:
        size = softplus(raw)
    return raw, size


@triton.jit
def _limited(size, lowest, highest):
    size = tl.where(size < lowest, lowest, size)  # keeps a NaN, unlike maximum
    return tl.where(size > highest, highest, size)


@triton.jit(do_not_specialize=["length", "spans"])
def sums_kernel(
    decay_ptr, A_ptr, bias_ptr, marks_ptr, lowest, highest, length, heads,
    decay_batch, decay_token, decay_head, A_head, bias_head,
    sums_ptr, spans, tokens,
    SOFTPLUS: tl.constexpr, SPAN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // spans).to(tl.int64)
    token = (tl.program_id(0) % spans).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = head < heads
    real = token < length
    inside = in_heads[:, None] & real[None, :]
    decay_ptr += batch * decay_batch
    a = tl.load(decay_ptr + head[:, None] * decay_head + token[None, :] * decay_token, mask=inside, other=0.0)
    a = a.to(tl.float32)  # (H, SPAN)
    size = tl.full((BLOCK_H, SPAN), 1.0, dtype=tl.float32)
    if A_ptr is not None:
        _, size = _before_limits(a, bias_ptr, head, in_heads, bias_head, SOFTPLUS)
        size = _limited(size, lowest, highest)
        a = size * tl.load(A_ptr + head * A_head, mask=in_heads, other=0.0).to(tl.float32)[:, None]
    a *= 1.4426950408889634
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + batch * length + token, mask=real, other=0)[None, :]
        a = tl.where(mark == 1, -256.0, tl.where(mark == 2, 0.0, a))
        size = tl.where(mark == 2, 0.0, size)
    a = tl.where(a < -256.0, -256.0, a)
    a = tl.where(inside, a, 0.0)
    coarse = tl.floor(a * 256.0 + 0.5) * 0.00390625
    fine = tl.cumsum(a - coarse, 1)
    sums_ptr += (batch * heads + head)[:, None] * 3 * tokens + token[None, :]
    tl.store(sums_ptr, tl.cumsum(coarse, 1), mask=in_heads[:, None])
    tl.store(sums_ptr + tokens, fine, mask=in_heads[:, None])
    tl.store(sums_ptr + 2 * tokens, tl.where(inside, size * tl.exp2(-fine), 0.0), mask=in_heads[:, None])


@triton.jit(do_not_specialize=["length", "chunks", "first", "count"])
def gradients_kernel(
    decay_ptr, A_ptr, bias_ptr, marks_ptr, lowest, highest, length, heads,
    decay_batch, decay_token, decay_head, A_head, bias_head,
    flows_ptr, passed_ptr, gradient_ptr, dA_ptr, dbias_ptr, chunks, first, count, tokens,
    SOFTPLUS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // count).to(tl.int64)
    index = (tl.program_id(0) % count).to(tl.int64)
    row = tl.arange(0, Q)
    token = (first + index) * Q + row
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = head < heads
    real = token < length
    inside = in_heads[:, None] & real[None, :]
    parts = 3
    if A_ptr is not None:
        parts = 4
    place = (batch * heads + head)[:, None] * parts * tokens + (index * Q + row)[None, :]
    flow = tl.load(flows_ptr + place, mask=inside, other=0.0)  # (H, Q)
    read = tl.load(flows_ptr + place + tokens, mask=inside, other=0.0)
    # Of the token before, so that a token's own contribution is never added and subtracted.
    before = inside & (row > 0)[None, :]
    left = tl.load(flows_ptr + place + 2 * tokens - 1, mask=before, other=0.0)
    flow += tl.cumsum(read, 1, reverse=True) + tl.cumsum(left, 1)
    flow += tl.load(passed_ptr + (batch * (tokens // Q) + index) * heads + head, mask=in_heads, other=0.0)[:, None]
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + batch * length + token, mask=real, other=0)[None, :]
        flow = tl.where(mark == 0, flow, 0.0)
        inside &= mark != 2
    flow = tl.where(inside, flow, 0.0)
    gradient = flow
    if A_ptr is not None:
        raw = tl.load(
            decay_ptr + batch * decay_batch + head[:, None] * decay_head + token[None, :] * decay_token,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        raw, free = _before_limits(raw, bias_ptr, head, in_heads, bias_head, SOFTPLUS)
        A = tl.load(A_ptr + head * A_head, mask=in_heads, other=0.0).to(tl.float32)
        gradient = flow * A[:, None] + tl.load(flows_ptr + place + 3 * tokens, mask=inside, other=0.0)
        gradient = tl.where((free < lowest) | (free > highest), 0.0, gradient)
        if SOFTPLUS:
            gradient *= sigmoid(raw)
        part = (batch * chunks + first + index) * heads + head
        # A step size beyond the row may be infinite.
        dA = tl.sum(tl.where(inside, flow * _limited(free, lowest, highest), 0.0), 1)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(dA_ptr + part, dA, mask=in_heads)
        if bias_ptr is not None:
            tl.store(dbias_ptr + part, tl.sum(gradient, 1), mask=in_heads)
    offsets = (batch * length + token)[None, :] * heads + head[:, None]
    written = in_heads[:, None] & real[None, :]
    tl.store(gradient_ptr + offsets, narrow(gradient, gradient_ptr.dtype.element_ty, EMULATE), mask=written)


@triton.jit
def real_tokens(marks_ptr, first, rows, present):
    """Return which of the tokens from `first` on that are `present` are no padding."""
    if marks_ptr is not None:
        present &= tl.load(marks_ptr + first + rows, mask=present, other=0) != 2
    return present


@triton.jit
def sums_before(sums_ptr, tokens, begin, SPAN: tl.constexpr):
    """Return the coarse and the fine sum of the span's tokens before `begin`."""
    later = begin % SPAN > 0
    coarse = tl.load(sums_ptr + begin - 1, mask=later, other=0.0)
    return coarse, tl.load(sums_ptr + tokens + begin - 1, mask=later, other=0.0)
