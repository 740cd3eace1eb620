"""The gate of the norm after the scan, and sums over a head's channels."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.ssd_scan.hopper.walk import CHUNK, HEAD_DIM, TILE, Walk, two_floats


def ask_for_z(ahead: int, end: str) -> Iterator[str]:
    """Of a chunk so many after this one, where there is one, into ``place``; one thread."""
    yield f"add.u32 t, chunk, {ahead};"
    yield f"setp.lt.u32 p, t, {end};"
    yield "and.pred p, p, leads;"
    yield f"mul.lo.u32 column, head, {HEAD_DIM};"
    yield f"mul.lo.u32 row, t, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    yield "mad.lo.u32 bar, place, 8, gate;"
    yield f"mad.lo.u32 at, place, {TILE}, outs;"
    yield f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {TILE};"
    yield f"@p {ptx.LOAD} [at], [map_z, {{column, row}}], [bar];"


def next_place() -> Iterator[str]:
    yield "xor.b32 place, place, 1;"
    yield "setp.eq.u32 p, place, 0;"
    yield "@p xor.b32 gate_parity, gate_parity, 1;"


def silu(z: str) -> Iterator[str]:
    """z / (1 + exp(-z)), in the register of z; far below zero that is z / infinity."""
    yield f"mul.f32 near, {z}, {ptx.float_literal(-math.log2(math.e))};"
    yield "ex2.approx.ftz.f32 near, near;"
    yield f"add.f32 near, near, {ptx.float_literal(1.0)};"
    yield "rcp.approx.ftz.f32 near, near;"
    yield f"mul.f32 {z}, {z}, near;"


def gates(dtype: str, which: int) -> Iterator[str]:
    """silu(z) in the place of scores, which are no longer needed, while products run."""
    yield f"mad.lo.u32 out, place, {TILE}, outs;"
    yield "mad.lo.u32 bar, place, 8, gate;"
    yield from ptx.wait("bar", f"Z_WAIT{which}", "gate_parity")
    for across in range(4):
        yield f"add.u32 at, out, to{across};"
        regs = ", ".join(f"two{i}" for i in range(4))
        yield f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{regs}}}, [at];"
        for i in range(4):
            yield from two_floats(f"two{i}", dtype)
            for j, gate in enumerate("fg"):
                yield from silu(gate)
                yield f"mov.f32 score{8 * across + 2 * i + j}, {gate};"


def gated_results(walk: Walk) -> Iterator[str]:
    """out = out * silu(z), and this thread's sums of squares; before, of what is positive."""
    for row in ("upper", "lower"):
        for name in sums(walk):
            yield f"mov.f32 {row}_{name}, 0f00000000;"
    for i in range(32):
        row = ("upper", "lower")[i // 2 % 2]
        yield from add_to_sums(walk, f"sum{i}", f"score{i}", row)


def store_sums(walk: Walk) -> Iterator[str]:
    """What four threads have of the sums of two rows, added up: one shuffle adds a number of each
    of two threads where another is given away, so that each ends with one number of its own."""
    yield "and.b32 v, lane, 1;"
    yield "setp.ne.u32 p, v, 0;"  # the lower row, of both kinds
    for name in sums(walk):
        yield f"selp.f32 f, upper_{name}, lower_{name}, p;"
        yield f"selp.f32 upper_{name}, lower_{name}, upper_{name}, p;"
        yield "shfl.sync.bfly.b32 f, f, 1, 31, -1;"
        yield f"add.f32 upper_{name}, upper_{name}, f;"
    yield "and.b32 u, lane, 2;"
    yield "setp.ne.u32 q, u, 0;"  # what is positive, where that is wanted; else the same again
    given = "upper_squares"
    if walk.scored:
        yield f"mul.f32 upper_relus, upper_relus, {ptx.float_literal(1 / HEAD_DIM)};"
        yield "selp.f32 f, upper_squares, upper_relus, q;"
        yield "selp.f32 upper_squares, upper_relus, upper_squares, q;"
        given = "f"
    yield f"shfl.sync.bfly.b32 f, {given}, 2, 31, -1;"
    yield "add.f32 upper_squares, upper_squares, f;"
    # The row from the first that is no padding; those before it are huge.
    yield f"mul.lo.u32 row, chunk, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    yield "mad.lo.u32 row, warp, 16, row;"
    yield "shr.u32 t, lane, 2;"
    yield "mad.lo.u32 t, v, 8, t;"
    yield "add.u32 row, row, t;"
    yield "mad.lo.u32 u, batch, length, pad;"
    yield "add.u32 u, u, row;"
    yield from at_sums(walk)
    yield "setp.lt.u32 p, row, rows;"
    if walk.scored:
        yield "selp.b64 wide, relus, squares, q;"
        yield "add.u64 from, wide, offset;"
    else:
        yield "add.u64 from, squares, offset;"
        yield "and.b32 v, lane, 2;"
        yield "setp.eq.and.u32 p, v, 0, p;"
    yield "@p st.global.f32 [from], upper_squares;"


def at_sums(walk: Walk) -> Iterator[str]:
    """``offset``: of row ``u`` of all, and this head, in [B, L, H] of float32."""
    yield "mul.wide.u32 offset, head, 4;"
    yield f"mul.wide.u32 wide, u, {4 * walk.heads};"
    yield "add.u64 offset, offset, wide;"


def sums(walk: Walk) -> tuple[str, ...]:
    """Over the channels of a head."""
    return ("squares", "relus") if walk.scored else ("squares",)


def add_to_sums(walk: Walk, y: str, gate: str, row: str) -> Iterator[str]:
    """y = y * gate, added to what the row's sums are of; uses ``f``."""
    if walk.scored:
        yield f"max.f32 f, {y}, 0f00000000;"
        yield f"add.f32 {row}_relus, {row}_relus, f;"
    yield f"mul.f32 {y}, {y}, {gate};"
    yield f"fma.rn.f32 {row}_squares, {y}, {y}, {row}_squares;"
