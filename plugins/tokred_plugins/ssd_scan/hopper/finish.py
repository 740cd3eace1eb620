"""A group of four warps that gates and stores what the group of a head has computed.

With one head, a chunk would otherwise be as long as all of it takes one warp of each scheduler.
Results come in float32, in the place of C in the chunk's stage, which this group then frees.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.ssd_scan.hopper.chunk import results
from tokred_plugins.ssd_scan.hopper.gate import ask_for_z, gates, next_place
from tokred_plugins.ssd_scan.hopper.group import begin, first_z, places
from tokred_plugins.ssd_scan.hopper.parts import next_part, parts, piece
from tokred_plugins.ssd_scan.hopper.walk import STAGES, Walk, quads


def finish(walk: Walk) -> Iterator[str]:
    """All chunks of this block, in the order in which results come."""
    which = walk.together  # labels and a barrier after those of the heads
    yield from begin(walk, 0)
    yield from places()
    yield from ptx.acquire("map_y", "map_z")
    if walk.cluster > 1:
        yield "barrier.cluster.arrive;"
    yield from parts(walk, "FINISH_PART")
    if walk.split > 1:
        yield from _after_first_time(walk)
    yield from first_z(walk)
    if walk.split > 1:
        yield "barrier.cluster.wait;"
        yield "barrier.cluster.arrive;"
    yield "FINISH:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield "@p bra FINISHED;"
    yield from _one_chunk(walk, which)
    yield "add.u32 chunk, chunk, 1;"
    yield "bra FINISH;"
    yield "FINISHED:"
    if walk.shares:
        yield from next_part(walk, "FINISH_PART")
    if walk.cluster > 1:
        yield "barrier.cluster.wait;"
    yield "@leads cp.async.bulk.wait_group 0;"


def _after_first_time(walk: Walk) -> Iterator[str]:
    """Where stages are after the first time over a piece, from which nothing comes here; and what
    is walked the second time."""
    yield "sub.u32 t, until, chunk;"
    yield f"rem.u32 stage, t, {STAGES};"
    yield f"div.u32 t, t, {STAGES};"
    yield "and.b32 parity, t, 1;"
    yield "mov.u32 index, 1;"
    yield from piece(walk)


def _one_chunk(walk: Walk, which: int) -> Iterator[str]:
    yield from gates(walk.dtype, which)
    yield "mad.lo.u32 bar, stage, 8, done;"
    yield from ptx.wait("bar", "FINISH_WAIT")
    yield f"mad.lo.u32 held, stage, {walk.stage_bytes}, base;"
    yield "mad.lo.u32 at, thread, 16, held;"
    for place, numbers in quads("sum", 32):
        yield f"ld.shared.v4.f32 {{{numbers}}}, [at + {place}];"
    yield from results(walk, which)
    yield "mad.lo.u32 bar, stage, 8, empty;"  # all have read it: they came to the barrier since
    yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    yield "@leads cp.async.bulk.wait_group.read 0;"
    yield from ask_for_z(2, walk.end)
    yield from next_place()
    yield from ptx.next_stage(STAGES)
