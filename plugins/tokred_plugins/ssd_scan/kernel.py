"""The scan where sequences and heads fill the GPU: one program each, chunk after chunk.

``ssd_steps`` leaves dt and its running decay. ``ssd_scan`` keeps the running state in registers:
a chunk's state never reaches memory. README.md counts bytes and operations.
"""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decays(raw, bias, a_log, real, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr):
    """dt, zero on padding, and its log2 decay dt A log2(e)."""
    x = raw.to(tl.float32) + bias
    # softplus = max(x, 0) + log1p(exp(-|x|)), and log1p(u) = log(w) u / (w - 1) with w = 1 + u.
    u = tl.exp(-tl.abs(x))
    w = 1 + u
    small = w == 1
    dt = tl.maximum(x, 0.0) + tl.where(small, u, tl.log(w) * (u / tl.where(small, 1.0, w - 1)))
    dt = tl.minimum(tl.maximum(dt, DT_MIN), DT_MAX)
    dt = tl.where(real, dt, 0.0)
    return dt, dt * (-tl.exp(a_log) * 1.4426950408889634)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_steps_kernel(
    zxbcdt, dt_bias, a_log, pads, length, chunks, steps,
    H: tl.constexpr, Z: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):
    batch = tl.program_id(2)
    pad = tl.load(pads + batch)
    heads = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(1) * Q + tl.arange(0, Q)
    real = (rows >= pad) & (rows < length)
    inside = heads < H
    raw = tl.load(
        zxbcdt + batch.to(tl.int64) * length * Z + rows[:, None] * Z + (Z - H) + heads[None, :],
        mask=real[:, None] & inside[None, :], other=0,
    )
    bias = tl.load(dt_bias + heads, mask=inside, other=0)
    log = tl.load(a_log + heads, mask=inside, other=0)
    step, decay = decays(raw, bias[None, :], log[None, :], real[:, None], DT_MIN, DT_MAX)
    slot = (batch.to(tl.int64) * H + heads[None, :]) * (chunks * Q) + rows[:, None]
    pair = tl.join(step, tl.cumsum(decay, axis=0))
    slot = 2 * slot[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(steps + slot, pair, mask=inside[None, :, None])


@triton.jit
def add_chunk(state, b, x, dt, total, last, PRECISION: tl.constexpr):
    """state exp2(last) + b^T (x weighted by what is left of it at the chunk's end)."""
    weight = tl.exp2(last - total) * dt
    weighted = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
    return tl.dot(tl.trans(b), weighted, acc=state * tl.exp2(last), input_precision=PRECISION)


@triton.jit
def start_states(
    initial_state, batch, first_head,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, p, n, HEADS: tl.constexpr,
):
    """The initial states, one [N, P] a head."""
    states = ()
    for h in tl.static_range(HEADS):
        if initial_state is None:
            state = tl.zeros((n.shape[0], p.shape[0]), tl.float32)
        else:
            slot = batch.to(tl.int64) * H + first_head + h
            tile = initial_state + slot * N * P + p[None, :] * N + n[:, None]
            inside = (n < N)[:, None] & (p < P)[None, :]
            state = tl.load(tile, mask=inside, other=0).to(tl.float32)
        states = states + (state,)
    return states


@triton.jit
def padded_outputs(
    xbc, d, initial_state, y, batch, start, end, first_head, p, n, c_cols,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
    HEADS: tl.constexpr, PRECISION: tl.constexpr,
):
    """y on padding: the state is still the initial one there, and x counts for D x alone."""
    for at in range(start, end, Q):
        rows = at + tl.arange(0, Q)
        inside = (rows < end)[:, None] & (p < P)[None, :]
        for h in range(0, HEADS):
            head = first_head + h
            cols = (head * P + p)[None, :]
            x = tl.load(xbc + rows[:, None] * C + cols, mask=inside, other=0)
            out = x.to(tl.float32) * tl.load(d + head)
            if initial_state is not None:
                in_c = (rows < end)[:, None] & (n < N)[None, :]
                c = tl.load(xbc + rows[:, None] * C + c_cols[None, :], mask=in_c, other=0)
                slot = batch.to(tl.int64) * H + head
                tile = initial_state + slot * N * P + p[None, :] * N + n[:, None]
                state = tl.load(tile, mask=(n < N)[:, None] & (p < P)[None, :], other=0)
                out += tl.dot(c, state.to(c.dtype), input_precision=PRECISION)
            tl.store(y + rows[:, None] * (H * P) + cols, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_kernel(
    xbc, d, pads, initial_state, steps, length, chunks, y, state,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):
    C: tl.constexpr = H * P + 2 * G * N
    first_head = tl.program_id(0) * HEADS
    batch = tl.program_id(2)
    pad = tl.load(pads + batch)
    xbc += batch.to(tl.int64) * length * C
    y += batch.to(tl.int64) * length * (H * P)
    steps += (batch.to(tl.int64) * H + first_head) * (chunks * Q * 2)
    p, n, q = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, Q)
    b_cols = H * P + first_head // (H // G) * N + n
    c_cols = b_cols + G * N
    states = start_states(initial_state, batch, first_head, H, P, N, p, n, HEADS)
    # Chunks of padding alone leave the state as it is. In others, rows of padding or beyond the
    # end read a neighbour in place of a mask, which costs more: dt is zero there.
    first = tl.where(pad < length, tl.maximum(pad, 0) // Q, chunks)
    in_n, in_p = (n < N)[None, :], (p < P)[None, :]
    for chunk in range(first, chunks):
        rows = chunk * Q + q
        at = tl.minimum(tl.maximum(rows, pad), length - 1)[:, None] * C
        c = tl.load(xbc + at + c_cols[None, :], mask=in_n, other=0)
        b = tl.load(xbc + at + b_cols[None, :], mask=in_n, other=0)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)  # one group, all its heads
        for h in tl.static_range(HEADS):
            cols = ((first_head + h) * P + p)[None, :]
            x = tl.load(xbc + at + cols, mask=in_p, other=0)
            # Loaded in pairs: Triton would otherwise load each once for every layout it needs.
            mine = steps + h * (chunks * Q * 2)
            step, run = tl.split(tl.load(mine + 2 * rows[:, None] + tl.arange(0, 2)[None, :]))
            # dt stays apart from the exponent, where a long decay would swamp it.
            mixed = scores * (tl.exp2(run[:, None] - run[None, :]) * step[None, :])
            mixed = tl.where(q[:, None] >= q[None, :], mixed, 0.0).to(x.dtype)
            out = tl.dot(c, states[0].to(c.dtype), input_precision=PRECISION)
            out *= tl.exp2(run)[:, None]
            out = tl.dot(mixed, x, acc=out, input_precision=PRECISION)
            out += x.to(tl.float32) * tl.load(d + first_head + h)
            real = ((rows >= pad) & (rows < length))[:, None]
            tile = y + rows[:, None] * (H * P) + cols
            tl.store(tile, out.to(y.dtype.element_ty), mask=real & in_p)
            last = tl.load(mine + (chunk + 1) * (Q * 2) - 1)
            # The oldest entry is this head's: the tuple turns once round a chunk.
            states = states[1:] + (add_chunk(states[0], b, x, step, run, last, PRECISION),)
    padded_outputs(
        xbc, d, initial_state, y, batch, 0, tl.minimum(pad, length), first_head,
        p, n, c_cols, H, P, N, C, Q, HEADS, PRECISION,
    )
    for h in tl.static_range(HEADS):
        slot = batch.to(tl.int64) * H + first_head + h
        tile = state + slot * N * P + p[None, :] * N + n[:, None]
        tl.store(tile, states[h], mask=(n < N)[:, None] & (p < P)[None, :])
