"""The device code of :mod:`.selective_scan_triton`, whose docstrings give the symbols and the formulas."""

from __future__ import annotations

from ._triton import tl, triton
from .triton_math import softplus


@triton.jit
def _decay(dt, rates):
    """The (BLOCK_D, BLOCK_N) factor on the state, of the (BLOCK_D) step sizes and of A log2(e). Another discretisation
    changes this alone, as long as the gradient of its logarithm is A for dt and dt for A."""
    return tl.exp2(dt[:, None] * rates)


@triton.jit
def _read_kind(kind_ptr, t, length):
    """Whether token t is a real one, and whether a document starts there."""
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
    """What softplus takes, and the step size: 0 at padding and beyond the row's end, where the state stays."""
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
    """The state after token t from the one before, the token's inputs, and the masks of what else it has."""
    live, first = _read_kind(kind_ptr, t, length)
    # A bound, not `on_d & live`: under the interpreter a vector and a scalar mask give an integer.
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
            if start % SPAN == 0:  # nested: the one above is decided when the kernel is compiled
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
    first_span, span_count, section,  # the spans to go through, and the most tokens of so many
    dy_ptr,  # (B, L, D), like all gradients contiguous
    dleaving_ptr,  # (B, D, N), at the state after them
    saved_ptr,  # (B, spans, D, N)
    scratch_ptr,  # (B, SPAN / CHUNK, D, N)
    dx_ptr,  # (B, L, D)
    ddt_ptr,  # (B, L, D)
    da_ptr,  # (B, D, N), like dd and dbias the sum so far
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
        tl.debug_barrier()  # a thread may read from the scratch what another one wrote
        for _chunk in range(0, chunks):
            begin -= CHUNK
            at -= channels * size
            h = tl.load(at, mask=on_dn, other=0.0)
            states = (h,)  # before the chunk's tokens, and after the last one
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
        tl.debug_barrier()  # nor does a thread write the next span's while another one still reads
    tl.store(dentering_ptr + row * channels * size + dn, carry, mask=on_dn)
    tl.store(da_ptr + row * channels * size + dn, da, mask=on_dn)
    if dd_ptr is not None:
        tl.store(dd_ptr + row * channels + d, dskip, mask=on_d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + row * channels + d, dbias, mask=on_d)
