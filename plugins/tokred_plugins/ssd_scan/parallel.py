"""The scan with every chunk side by side, for few sequences and heads: three short kernels.

``ssd_chunk_state`` leaves what each chunk adds to the state, ``ssd_pass`` adds these up into the
state at each chunk's start, and ``ssd_chunk_scan`` gives y from that, head after head. States pass
through the L2 cache; what ``kernel.py`` saves of them it pays for in steps one after another.
"""

# ruff: noqa: ANN001, ANN201, RUF005  Triton functions; Triton has no starred tuples
from __future__ import annotations

import triton
import triton.language as tl

from tokred_plugins.ssd_scan.kernel import decays, padded_outputs


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_chunk_state_kernel(
    xbc, zxbcdt, dt_bias, a_log, pads, length, chunks, steps, added,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, Z: tl.constexpr,
    DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr,
):
    C: tl.constexpr = H * P + 2 * G * N
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pad = tl.load(pads + batch)
    # Offsets inside one sequence fit 32 bits (see calls); the sequence's own start may not.
    xbc += batch.to(tl.int64) * length * C
    zxbcdt += batch.to(tl.int64) * length * Z + (Z - H) + head
    steps += (batch.to(tl.int64) * H + head) * (chunks * Q * 2)
    added += ((batch.to(tl.int64) * chunks + chunk) * H + head) * (P * N)
    p, n = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_N)[None, :]
    b_cols = H * P + head // (H // G) * N + n
    x_cols = head * P + p
    rows = chunk * Q + tl.arange(0, Q)
    # Rows beyond the end, or of padding, read a neighbour in place of a mask: dt is zero there.
    at = tl.minimum(rows, length - 1)
    raw = tl.load(zxbcdt + at * Z)
    b = tl.load(xbc + at[:, None] * C + b_cols, mask=n < N, other=0)
    x = tl.load(xbc + at[:, None] * C + x_cols, mask=p < P, other=0)
    bias, log = tl.load(dt_bias + head), tl.load(a_log + head)
    # Again where there is padding: had the first loads looked, all would have waited for it.
    if pad > chunk * Q:
        at = tl.minimum(tl.maximum(rows, pad), length - 1)
        inside = (pad < length) & (n < N)
        b = tl.load(xbc + at[:, None] * C + b_cols, mask=inside, other=0)
        x = tl.load(xbc + at[:, None] * C + x_cols, mask=(pad < length) & (p < P), other=0)
    real = (rows >= pad) & (rows < length)
    step, rate = decays(raw, bias, log, real, DT_MIN, DT_MAX)
    running = tl.cumsum(rate, axis=0)
    pair = tl.join(step, running)
    tl.store(steps + 2 * rows[:, None] + tl.arange(0, 2)[None, :], pair)
    weight = tl.exp2(tl.sum(rate, axis=0) - running) * step
    weighted = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
    state = tl.dot(tl.trans(weighted), b, input_precision=PRECISION)
    rows_p = tl.arange(0, BLOCK_P)[:, None]
    tl.store(added + rows_p * N + n, state, mask=(rows_p < P) & (n < N))


@triton.jit(do_not_specialize=["chunks"])
def ssd_pass_kernel(
    added, steps, initial_state, chunks, starts, state,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < P * N
    steps += (batch * H + head) * (chunks * Q * 2)
    added += (batch * chunks * H + head) * (P * N) + e
    starts += (batch * chunks * H + head) * (P * N) + e
    if initial_state is None:
        running = tl.zeros((BLOCK,), tl.float32)
    else:
        slot = (batch * H + head) * (P * N) + e
        running = tl.load(initial_state + slot, mask=inside, other=0).to(tl.float32)
    for first in range(0, chunks, AHEAD):
        more = ()
        lasts = ()
        for i in tl.static_range(AHEAD):
            chunk = first + i
            there = chunk < chunks
            more = more + (
                tl.load(added + chunk * (H * P * N), mask=inside & there, other=0),
            )
            lasts = lasts + (tl.load(steps + (chunk + 1) * (Q * 2) - 1, mask=there, other=0),)
        for i in tl.static_range(AHEAD):
            chunk = first + i
            out = running.to(starts.dtype.element_ty)
            tl.store(starts + chunk * (H * P * N), out, mask=inside & (chunk < chunks))
            running = running * tl.exp2(lasts[i]) + more[i]
    tl.store(state + (batch * H + head) * (P * N) + e, running, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_chunk_scan_kernel(
    xbc, d, pads, initial_state, steps, starts, length, chunks, y,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    C: tl.constexpr = H * P + 2 * G * N
    first_head, tile, batch = tl.program_id(0) * HEADS, tl.program_id(1), tl.program_id(2)
    chunk = tile // (Q // ROWS)
    pad = tl.load(pads + batch)
    xbc += batch.to(tl.int64) * length * C
    y += batch.to(tl.int64) * length * (H * P)
    steps += (batch.to(tl.int64) * H + first_head) * (chunks * Q * 2)
    starts += ((batch.to(tl.int64) * chunks + chunk) * H + first_head) * (P * N)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_n, in_p = (n < N)[None, :], (p < P)[None, :]
    b_cols = H * P + first_head // (H // G) * N + n
    c_cols = b_cols + G * N
    rows = tile * ROWS + tl.arange(0, ROWS)
    keys = chunk * Q + tl.arange(0, Q)
    row_at = tl.minimum(rows, length - 1)[:, None] * C
    key_at = tl.minimum(keys, length - 1)[:, None] * C
    c = tl.load(xbc + row_at + c_cols[None, :], mask=in_n, other=0)
    b = tl.load(xbc + key_at + b_cols[None, :], mask=in_n, other=0)
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)  # one group, all its heads
    # Whatever lies on padding counts for nothing.
    scores = tl.where((rows[:, None] >= keys[None, :]) & (keys >= pad)[None, :], scores, 0.0)
    written = ((rows >= pad) & (rows < length))[:, None] & in_p
    # Keys of padding or beyond the end read a neighbour in place of a mask: dt is zero there.
    key_at = tl.minimum(tl.maximum(keys, pad), length - 1)[:, None] * C
    pairs = tl.arange(0, 2)[None, :]
    for h in range(0, HEADS):
        cols = ((first_head + h) * P + p)[None, :]
        x = tl.load(xbc + key_at + cols, mask=in_p, other=0)
        start = tl.load(
            starts + h * (P * N) + p[:, None] * N + n[None, :],
            mask=(p < P)[:, None] & in_n, other=0,
        )
        # Loaded in pairs: Triton would otherwise load each once for every layout it needs.
        mine = steps + h * (chunks * Q * 2)
        step, past = tl.split(tl.load(mine + 2 * keys[:, None] + pairs))
        if ROWS == Q:
            run, own = past, x
        else:
            _, run = tl.split(tl.load(mine + 2 * rows[:, None] + pairs))
            own = tl.load(xbc + row_at + cols, mask=in_p, other=0)
        out = tl.dot(c, tl.trans(start), input_precision=PRECISION)
        out *= tl.exp2(run)[:, None]
        # dt stays apart from the exponent, where a long decay would swamp it. Above the
        # diagonal, where nothing counts, the exponent must not overflow.
        decay = tl.exp2(tl.minimum(run[:, None] - past[None, :], 0.0))
        mixed = (scores * (decay * step[None, :])).to(x.dtype)
        out = tl.dot(mixed, x, acc=out, input_precision=PRECISION)
        out += own.to(tl.float32) * tl.load(d + first_head + h)
        at = y + rows[:, None] * (H * P) + cols
        tl.store(at, out.to(y.dtype.element_ty), mask=written)
    padded_outputs(
        xbc, d, initial_state, y, batch, tile * ROWS,
        tl.minimum(pad, tl.minimum((tile + 1) * ROWS, length)), first_head,
        p, n, c_cols, H, P, N, C, ROWS, HEADS, PRECISION,
    )
