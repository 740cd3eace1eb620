"""The four warps that do not multiply: one asks for operands, one for each head computes steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.ssd_scan.hopper.parts import next_part, parts
from tokred_plugins.ssd_scan.hopper.split import others
from tokred_plugins.ssd_scan.hopper.walk import (
    CHUNK,
    ENDS,
    HEAD_DIM,
    PAIRS,
    STAGES,
    STATES,
    STEPS,
    TILE,
    Walk,
    of_head,
)

_SERIES = 8  # terms: (1/3)^16 / 17 is 1e-9


def ask(walk: Walk) -> Iterator[str]:
    """The first warp's first thread asks for operands, as stages become empty; the next warps
    compute steps."""
    yield f"setmaxnreg.dec.sync.aligned.u32 {ptx.FEW_REGISTERS};"
    if walk.shares:
        yield "barrier.cluster.arrive;"  # they wait for no other block
    yield "mov.u32 parity, 1;"  # nothing was ever in a stage: that phase counts as over
    yield "setp.ge.u32 p, thread, 32;"
    yield "@p bra STEPS;"
    yield "setp.ne.u32 p, thread, 0;"
    yield f"@p {_idle(walk)};"
    if walk.split > 1:
        yield "barrier.cluster.arrive;"
    yield from ptx.acquire("map_x")
    yield from parts(walk, "ASK_PART")
    yield "ASK:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield "@p bra ASKED_PART;"
    yield "mad.lo.u32 bar, stage, 8, empty;"
    yield from ptx.wait("bar", "ASK_WAIT")
    yield "mad.lo.u32 bar, stage, 8, full;"
    delivered = (4 + walk.together) * TILE
    expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar]"
    if walk.split > 1:  # C is not for what is added to the state
        yield "setp.eq.u32 p, index, 0;"
        yield f"@p {expect}, {delivered - 2 * TILE};"
        yield f"@!p {expect}, {delivered};"
    else:
        yield f"{expect}, {delivered};"
    yield f"mad.lo.u32 at, stage, {walk.stage_bytes}, base;"
    yield f"mul.lo.u32 row, chunk, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    width = walk.heads * HEAD_DIM
    for matrix in (walk.groups, 0):  # C, then B
        for tile in (0, 64):
            yield f"mad.lo.u32 column, group, {STATES}, {width + matrix * STATES + tile};"
            guard = "@!p " if walk.split > 1 and matrix else ""
            yield f"{guard}{ptx.LOAD} [at], [map_x, {{column, row}}], [bar];"
            yield f"add.u32 at, at, {TILE};"
    yield f"mul.lo.u32 column, head, {HEAD_DIM};"
    for _ in range(walk.together):
        yield f"{ptx.LOAD} [at], [map_x, {{column, row}}], [bar];"
        yield f"add.u32 at, at, {TILE};"
        yield f"add.u32 column, column, {HEAD_DIM};"
    yield from ptx.next_stage(STAGES)
    yield "add.u32 chunk, chunk, 1;"
    yield "bra ASK;"
    yield "ASKED_PART:"
    yield from others(walk, "ASK_TAKEN")
    yield from next_part(walk, "ASK_PART")
    yield "bra ASKED;"
    yield from _compute_steps(walk)
    yield "ASKED:"
    if walk.cluster > 1:
        yield "barrier.cluster.wait;"


def _idle(walk: Walk) -> str:
    """What threads do that have nothing to do: a cluster's barrier waits for none that is gone."""
    return "ret" if walk.split > 1 else "bra ASKED"


def _compute_steps(walk: Walk) -> Iterator[str]:
    """dt, its running decay, and what they make of each token, by a warp for each head; a thread
    has two tokens of a chunk, those of the next are on their way."""
    yield "STEPS:"
    yield "shr.u32 warp, thread, 5;"
    yield "sub.u32 warp, warp, 1;"
    yield f"setp.ge.u32 p, warp, {walk.together};"
    yield f"@p {_idle(walk)};"
    if walk.split > 1:
        yield "barrier.cluster.arrive;"
    yield "setp.eq.u32 leads, lane, 0;"
    yield from parts(walk, "STEPS_PART")
    yield "add.u32 head, head, warp;"
    yield from of_head("bias", "dt_bias", walk.dt_bias_dtype)
    yield from of_head("rate", "a_log", walk.a_log_dtype)
    log2_e = math.log2(math.e)
    yield f"mul.f32 rate, rate, {ptx.float_literal(log2_e)};"
    yield "ex2.approx.ftz.f32 rate, rate;"
    yield f"mul.f32 rate, rate, {ptx.float_literal(-log2_e)};"
    # This thread's first number of the chunk: row first * Q + 2 lane of the sequence.
    yield f"mul.lo.u32 row, chunk, {CHUNK};"
    yield "mad.lo.u32 row, lane, 2, row;"
    yield "mad.lo.u32 u, batch, length, row;"
    yield f"mul.wide.u32 offset, u, {2 * walk.packed};"
    yield "add.u64 from, zxbcdt, offset;"
    yield f"add.u32 t, head, {walk.packed - walk.heads};"
    yield "mul.wide.u32 offset, t, 2;"
    yield "add.u64 from, from, offset;"
    yield "sub.s32 row, row, pad;"
    yield f"mov.u64 apart, {2 * walk.packed * CHUNK};"  # from one chunk to the next
    yield from _load_raw(walk)
    yield "STEP:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield "@p bra STEPPED;"
    for i in range(2):
        yield f"add.f32 raw{i}, next{i}, bias;"
    yield "mov.u32 t, row;"
    yield f"add.u32 row, row, {CHUNK};"
    yield "add.u64 from, from, apart;"
    yield from _load_raw(walk)
    for i in range(2):
        yield from softplus(f"dt{i}", f"raw{i}")
        yield f"max.f32 dt{i}, dt{i}, {ptx.float_literal(walk.dt_min)};"
        yield f"min.f32 dt{i}, dt{i}, {ptx.float_literal(walk.dt_max)};"
        yield f"add.u32 u, t, {i};"
        yield "setp.lt.u32 p, u, rows;"  # rows of padding are huge
        yield f"selp.f32 dt{i}, dt{i}, 0f00000000, p;"
        yield f"mul.f32 run{i}, dt{i}, rate;"
    # Sums over the threads before, and this one's.
    yield "add.f32 run1, run0, run1;"
    yield "mov.f32 total, run1;"
    for apart in (1, 2, 4, 8, 16):
        yield f"shfl.sync.up.b32 f, total, {apart}, 0, -1;"
        yield f"setp.ge.u32 p, lane, {apart};"
        yield "@p add.f32 total, total, f;"
    yield "shfl.sync.up.b32 f, total, 1, 0, -1;"
    yield "setp.eq.u32 p, lane, 0;"
    yield "selp.f32 f, 0f00000000, f, p;"
    yield "add.f32 run0, f, run0;"
    yield "mov.f32 run1, total;"
    yield "mad.lo.u32 bar, stage, 8, empty;"
    yield from ptx.wait("bar", "STEP_WAIT")
    yield f"mad.lo.u32 at, stage, {walk.stage_bytes}, base;"
    yield f"mad.lo.u32 at, warp, {STEPS}, at;"
    yield f"add.u32 at, at, {(4 + walk.together) * TILE};"
    yield "mad.lo.u32 t, lane, 16, at;"
    yield "st.shared.v4.f32 [t], {dt0, run0, dt1, run1};"
    yield "mad.lo.u32 t, lane, 8, at;"
    yield "shfl.sync.idx.b32 f, total, 31, 31, -1;"
    yield from _left("f")
    yield f"st.shared.v2.f32 [t + {PAIRS}], {{even_weight, odd_weight}};"
    for i in range(3):
        yield f"shfl.sync.idx.b32 f, run0, {8 * (i + 1)}, 31, -1;"
        yield from _left("f")
        yield f"setp.lt.u32 p, lane, {8 * (i + 1)};"
        at = PAIRS + ENDS + 4 * CHUNK * i
        yield f"@p st.shared.v2.f32 [t + {at}], {{even_weight, odd_weight}};"
    yield "bar.warp.sync -1;"
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    yield from ptx.next_stage(STAGES)
    yield "add.u32 chunk, chunk, 1;"
    yield "bra STEP;"
    yield "STEPPED:"
    yield from others(walk, "STEP_TAKEN")
    yield from next_part(walk, "STEPS_PART")


def _load_raw(walk: Walk) -> Iterator[str]:
    """``next``: what the projection says of dt for the two tokens from ``row`` on."""
    for i, number in enumerate(("half", "other")):
        yield f"add.u32 u, row, {i};"
        yield "setp.lt.u32 p, u, rows;"
        yield f"mov.b16 {number}, 0;"
        yield f"@p ld.global.b16 {number}, [from + {2 * walk.packed * i}];"
        yield f"cvt.f32.{ptx.KIND[walk.dtype]} next{i}, {number};"


def softplus(target: str, x: str) -> Iterator[str]:
    """log(1 + exp(x)) = max(x, 0) + 2 artanh(s), s = u / (2 + u), u = exp(-|x|).

    s is at most 1/3, so that a few terms of its series do: the logarithm of the hardware is off by
    a constant, which is all there is of a small dt.
    """
    yield f"abs.f32 f, {x};"
    yield f"mul.f32 f, f, {ptx.float_literal(-math.log2(math.e))};"
    yield "ex2.approx.ftz.f32 f, f;"
    yield f"add.f32 g, f, {ptx.float_literal(2.0)};"
    yield "rcp.approx.ftz.f32 g, g;"
    yield "mul.f32 f, f, g;"
    yield "mul.f32 g, f, f;"
    yield f"mov.f32 series, {ptx.float_literal(2 / (2 * _SERIES - 1))};"
    for term in reversed(range(_SERIES - 1)):
        yield f"mov.f32 decay, {ptx.float_literal(2 / (2 * term + 1))};"
        yield "fma.rn.f32 series, series, g, decay;"
    yield f"max.f32 g, {x}, 0f00000000;"
    yield f"fma.rn.f32 {target}, series, f, g;"


def _left(until: str) -> Iterator[str]:
    """dt of both tokens by what is left of it where the running decay is ``until``."""
    for i, weight in enumerate(("even_weight", "odd_weight")):
        yield f"sub.f32 decay, {until}, run{i};"
        yield "ex2.approx.ftz.f32 decay, decay;"
        yield f"mul.f32 {weight}, decay, dt{i};"
