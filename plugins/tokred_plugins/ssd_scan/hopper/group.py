"""A group of four warps: how a walk begins and ends, and rows that are not walked."""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.ssd_scan.hopper.chunk import copy_state, one_chunk
from tokred_plugins.ssd_scan.hopper.gate import add_to_sums, ask_for_z, at_sums, silu, sums
from tokred_plugins.ssd_scan.hopper.parts import next_part, parts
from tokred_plugins.ssd_scan.hopper.split import before, between, fresh_state
from tokred_plugins.ssd_scan.hopper.walk import (
    COPY,
    GATES,
    HEAD_DIM,
    STATES,
    TILE,
    Walk,
    of_head,
    two_floats,
)

# Of the state, this thread's pairs of numbers, from its first on.
_STATE_PLACES = [
    (32 * i + row * 8 * 4 * STATES, f"{{kept{4 * i + 2 * row}, kept{4 * i + 2 * row + 1}}}")
    for i in range(16) for row in (0, 1)
]


def by_group(walk: Walk, which: int) -> Iterator[str]:
    """One head, or parts of several, by a group of four warps."""
    yield from begin(walk, which)
    yield from places()
    if not walk.finishes:
        yield from ptx.acquire("map_y", *(["map_z"] if walk.gated else []))
    yield f"add.u32 copy, base, {walk.copies_at + which * COPY};"
    yield from before(walk, which) if walk.split > 1 else parts(walk, f"PART{which}")
    yield f"add.u32 head, head, {which};"
    if walk.gated and not walk.finishes:
        yield from first_z(walk)
    yield from of_head("skip", "d", walk.d_dtype)
    if walk.split > 1:
        yield from between(walk, which)
    else:
        yield from fresh_state()
    if walk.shares:
        yield from _take_state(walk, which)
    yield from copy_state(walk)
    yield "fence.proxy.async.shared::cta;"
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    if walk.split > 1 and walk.borrows:
        yield f"add.u32 bar, base, {walk.taken_at};"
        yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    yield f"CHUNK{which}:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield f"@p bra WALKED{which};"
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield from ptx.wait("bar", f"CHUNK_WAIT{which}")
    yield from one_chunk(walk, which)
    yield "add.u32 chunk, chunk, 1;"
    yield f"bra CHUNK{which};"
    yield f"WALKED{which}:"
    if walk.split > 1:  # the last piece ends with the final state
        yield f"setp.ne.u32 p, rank, {walk.split - 1};"
        yield f"@p bra LEFT{which};"
    yield from _store_state(walk)
    if walk.split > 1:
        yield f"LEFT{which}:"
    if walk.shares:
        yield "setp.eq.u32 p, turn, 1;"
        yield "@p barrier.cluster.arrive;"
        yield "setp.eq.u32 p, turn, 2;"
        yield f"@p bra PADDED{which};"
    yield from _padding(walk, which)
    if walk.shares:
        yield from next_part(walk, f"PART{which}")
        yield "setp.ne.u32 p, turn, 2;"  # that waited before
        yield "@p barrier.cluster.wait;"
    if not walk.finishes:
        yield "@leads cp.async.bulk.wait_group 0;"


def begin(walk: Walk, which: int) -> Iterator[str]:
    """What a group needs: who its threads are, from where results leave, and where z comes."""
    yield f"setmaxnreg.inc.sync.aligned.u32 {ptx.many_registers(walk.groups_of_warps - 1)};"
    yield "and.b32 thread, thread, 127;"
    yield "shr.u32 warp, thread, 5;"
    yield "setp.eq.u32 leads, thread, 0;"
    yield "setp.eq.u32 always, zero, 0;"
    yield "mov.u32 parity, 0;"
    yield f"add.u32 out, base, {walk.out_at + which * walk.places * TILE};"
    if walk.gated:
        yield f"add.u32 gate, base, {walk.gates_at + GATES * which};"
        yield "mov.u32 outs, out;"
        yield "mov.u32 place, 0;"
        yield "mov.u32 gate_parity, 0;"


def first_z(walk: Walk) -> Iterator[str]:
    """Of the first two chunks of a part."""
    for ahead in (0, 1):
        yield from ask_for_z(ahead, walk.end)
        yield "xor.b32 place, place, 1;"


def places() -> Iterator[str]:
    """Where this thread's rows of eight numbers are in a tile, scattered over its banks.

    ``to`` for results and states by stmatrix, and x as sums hold it, from the tile's address;
    ``x_across`` for x turned, as left operands hold it.
    """
    # to<i>: row 16 warp + lane % 16, places 2 i + lane / 16, changed by row % 8.
    yield "shl.b32 t, warp, 4;"
    yield "and.b32 u, lane, 15;"
    yield "add.u32 t, t, u;"
    yield f"mul.lo.u32 t, t, {ptx.ROW_BYTES};"
    yield "shr.u32 u, lane, 4;"
    yield "and.b32 v, lane, 7;"
    for i in range(4):
        yield f"add.u32 to{i}, u, {2 * i};"
        yield f"xor.b32 to{i}, to{i}, v;"
        yield f"mad.lo.u32 to{i}, to{i}, 16, t;"
    # x turned: rows (tokens) lane % 8 + 8 (lane / 16), place 2 warp + lane / 8 % 2.
    yield "shr.u32 t, lane, 4;"
    yield "mad.lo.u32 t, t, 8, v;"
    yield f"mul.lo.u32 t, t, {ptx.ROW_BYTES};"
    yield "bfe.u32 u, lane, 3, 1;"
    yield "mad.lo.u32 u, warp, 2, u;"
    yield "xor.b32 u, u, v;"
    yield "mad.lo.u32 x_across, u, 16, t;"


def _take_state(walk: Walk, which: int) -> Iterator[str]:
    """For the second half of a walk: the state that the other block left, once it has.

    The barrier of the cluster says so: all threads arrive there as they begin, but those that are
    to leave a state, when they have.
    """
    yield "setp.eq.u32 p, index, 0;"
    yield "setp.ne.and.u32 p, turn, 1, p;"
    yield "@p barrier.cluster.arrive;"
    yield "setp.ne.u32 p, turn, 2;"
    yield f"@p bra FRESH{which};"
    yield "barrier.cluster.wait;"
    yield from _find_state(walk)
    for address, numbers in _STATE_PLACES:
        yield f"ld.global.v2.f32 {numbers}, [from + {address}];"
    yield f"FRESH{which}:"


def _store_state(walk: Walk) -> Iterator[str]:
    """The state [B, H, P, N], float32: the final one, or the one to go on from."""
    yield from _find_state(walk)
    for address, numbers in _STATE_PLACES:
        yield f"st.global.v2.f32 [from + {address}], {numbers};"


def _find_state(walk: Walk) -> Iterator[str]:
    """``from``: where this thread's numbers of the state are."""
    yield f"mad.lo.u32 t, batch, {walk.heads}, head;"
    yield f"mul.wide.u32 offset, t, {4 * HEAD_DIM * STATES};"
    yield "add.u64 from, state, offset;"
    yield "shr.u32 u, lane, 2;"
    yield "mad.lo.u32 u, warp, 16, u;"
    yield "and.b32 v, lane, 3;"
    yield f"mul.lo.u32 u, u, {4 * STATES};"
    yield "mad.lo.u32 u, v, 8, u;"
    yield "cvt.u64.u32 offset, u;"
    yield "add.u64 from, from, offset;"


def _padding(walk: Walk, which: int) -> Iterator[str]:
    """y of rows of padding: D x, eight columns a thread, sixteen rows at a time and block."""
    width = walk.heads * HEAD_DIM
    yield "shr.u32 row, thread, 3;"
    if walk.split > 1:
        yield "mad.lo.u32 row, rank, 16, row;"
    yield "and.b32 column, thread, 7;"
    yield "shl.b32 column, column, 3;"
    yield f"mad.lo.u32 column, head, {HEAD_DIM}, column;"
    yield f"PADDING{which}:"
    yield "shr.u32 t, lane, 3;"
    yield "sub.u32 t, row, t;"  # the warp's first row: its threads stay together
    yield "setp.ge.u32 p, t, pad;"
    yield f"@p bra PADDED{which};"
    yield "setp.lt.u32 p, row, pad;"
    yield "mad.lo.u32 u, batch, length, row;"
    read = [("xbc", walk.columns, "two")]
    if walk.gated:
        read.append(("zxbcdt", walk.packed, "gated"))
    for pointer, columns, name in (*read, ("y", width, "")):
        yield f"mul.wide.u32 offset, u, {2 * columns};"
        yield f"add.u64 from, {pointer}, offset;"
        yield "mul.wide.u32 offset, column, 2;"
        yield "add.u64 from, from, offset;"
        if name:
            regs = ", ".join(f"{name}{i}" for i in range(4))
            yield f"@p ld.global.v4.b32 {{{regs}}}, [from];"
    if walk.gated:
        for name in sums(walk):
            yield f"mov.f32 upper_{name}, 0f00000000;"
    for i in range(4):
        yield from two_floats(f"two{i}", walk.dtype)
        for x, y in (("f", "even_weight"), ("g", "odd_weight")):
            yield f"mul.f32 {y}, {x}, skip;"
        if walk.gated:
            yield from two_floats(f"gated{i}", walk.dtype)
            yield from silu("f")
            yield from silu("g")
            yield "mov.f32 last, f;"
            for z, y in (("last", "even_weight"), ("g", "odd_weight")):
                yield from add_to_sums(walk, y, z, "upper")
        yield ptx.round_two(f"two{i}", "even_weight", "odd_weight", walk.dtype)
    yield "@p st.global.v4.b32 [from], {two0, two1, two2, two3};"
    if walk.gated:
        for name in sums(walk):
            yield from ptx.add_up(f"upper_{name}", 8)
        yield "and.b32 v, lane, 7;"
        yield "setp.eq.and.u32 p, v, 0, p;"
        yield from at_sums(walk)
        if walk.scored:
            yield f"mul.f32 upper_relus, upper_relus, {ptx.float_literal(1 / HEAD_DIM)};"
        for name in sums(walk):
            yield f"add.u64 from, {name}, offset;"
            yield f"@p st.global.f32 [from], upper_{name};"
    yield f"add.u32 row, row, {16 * walk.split};"
    yield f"bra PADDING{which};"
    yield f"PADDED{which}:"
