"""A walk in pieces that several blocks (a cluster) have side by side.

Each block first walks its chunks for what they add to a state of zeros, and leaves that and the
decay over all of them in its shared memory. Then each takes its share of the state's numbers
through all pieces, from one to the next, and leaves them with every block as its piece begins with
them. What follows is a walk like any other. Both times the barrier of the cluster says that all
have.

The state of two heads has no room beside the stages: there it is in their place, and what the
second time over the piece reads is asked for only when it is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.kernels import cdiv
from tokred_plugins.ssd_scan.hopper.chunk import by_tokens, weighted
from tokred_plugins.ssd_scan.hopper.parts import parts, piece
from tokred_plugins.ssd_scan.hopper.walk import (
    PAIRS,
    QUAD_BYTES,
    STAGES,
    STATE_BYTES,
    STATES,
    STEPS,
    TILE,
    Walk,
    quads,
)

_QUADS = 16  # of a thread's numbers of the state
# What a thread has room in while no chunk is walked, as quads.
_ROOM = [f"{name}{i}" for name, count in (("kept", 64), ("score", 32), ("sum", 32))
         for i in range(count)]


def before(walk: Walk, which: int) -> Iterator[str]:
    """The first time over the piece: leaves what the chunks add; then this block's second part."""
    yield from parts(walk, f"PART{which}")
    yield from fresh_state()
    yield "mov.f32 total, 0f00000000;"
    yield "mov.u32 freed, 0;"
    yield f"ADD{which}:"
    for half, left in enumerate(("weighted", "mixed")):  # one is read while the other is made
        yield "setp.ge.u32 p, chunk, until;"
        yield f"@p bra ADDED{which};"
        yield from _add_chunk(walk, which, left, f"{which}_{half}")
    yield f"bra ADD{which};"
    yield f"ADDED{which}:"
    yield from _free_stage(walk, which)
    if walk.borrows:  # all products have read the stages
        yield f"bar.sync {walk.together + 1}, {ptx.GROUP_THREADS * walk.together};"
    yield from _exchange(walk, which)
    for place, numbers in quads("kept", 4 * _QUADS):
        yield f"st.shared.v4.f32 [at + {place}], {{{numbers}}};"
    yield f"@leads st.shared.f32 [base + {walk.totals_at + 4 * which}], total;"
    yield "barrier.cluster.arrive;"
    yield "mov.u32 index, 1;"
    yield from piece(walk)


def between(walk: Walk, which: int) -> Iterator[str]:
    """This block's share of the state through all pieces; then all of it, as this one begins."""
    yield "barrier.cluster.wait;"
    shares, last = cdiv(_QUADS, walk.split), walk.split - 1
    yield from _exchange(walk, which)
    yield "mov.u32 held, at;"
    yield f"mad.lo.u32 at, rank, {QUAD_BYTES}, at;"
    fours = [_ROOM[4 * i : 4 * i + 4] for i in range(shares * last)]
    apart = walk.split * QUAD_BYTES
    guards = ["@p " if (share + 1) * walk.split > _QUADS else "" for share in range(shares)]
    yield f"setp.lt.u32 p, rank, {_QUADS - (shares - 1) * walk.split};"
    for of in range(last):
        yield f"mapa.shared::cluster.u32 there, at, {of};"
        for share, guard in enumerate(guards):
            numbers = ", ".join(fours[share * last + of])
            yield f"{guard}ld.shared::cluster.v4.f32 {{{numbers}}}, [there + {share * apart}];"
    for of in range(1, last):
        yield f"mapa.shared::cluster.u32 there, base, {of};"
        yield f"ld.shared::cluster.f32 f, [there + {walk.totals_at + 4 * which}];"
        yield "ex2.approx.ftz.f32 f, f;"
        for share in range(shares):
            before_it, now = (fours[share * last + i] for i in (of - 1, of))
            for old, new in zip(before_it, now, strict=True):
                yield f"fma.rn.f32 {new}, {old}, f, {new};"
    for of in range(last):
        yield f"mapa.shared::cluster.u32 there, at, {of + 1};"
        for share, guard in enumerate(guards):
            numbers, place = ", ".join(fours[share * last + of]), STATE_BYTES + share * apart
            yield f"{guard}st.shared::cluster.v4.f32 [there + {place}], {{{numbers}}};"
    yield "barrier.cluster.arrive;"
    yield from fresh_state()
    yield "barrier.cluster.wait;"
    yield "setp.ne.u32 p, rank, 0;"  # the first begins with zeros
    for place, numbers in quads("kept", 4 * _QUADS):
        yield f"@p ld.shared.v4.f32 {{{numbers}}}, [held + {STATE_BYTES + place}];"


def fresh_state() -> Iterator[str]:
    for i in range(4 * _QUADS):
        yield f"mov.f32 kept{i}, 0f00000000;"


def others(walk: Walk, label: str) -> Iterator[str]:
    """By threads that ask and compute, after a part: they come to the barriers too, and wait where
    states are in the place of stages."""
    if walk.split > 1:
        yield "setp.eq.u32 p, index, 0;"
        yield "@p barrier.cluster.wait;"
        yield "@p barrier.cluster.arrive;"
    if walk.split > 1 and walk.borrows:
        yield f"add.u32 bar, base, {walk.taken_at};"
        yield from ptx.wait("bar", label, "zero")


def _add_chunk(walk: Walk, which: int, left: str, label: str) -> Iterator[str]:
    """What a chunk of one head makes of the state; its product is begun, and not waited for."""
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield from ptx.wait("bar", f"ADD_WAIT{label}")
    yield f"mad.lo.u32 held, stage, {walk.stage_bytes}, base;"
    yield f"add.u32 x_at, held, {(4 + which) * TILE};"
    yield f"add.u32 steps_at, held, {(4 + walk.together) * TILE + which * STEPS};"
    yield f"ld.shared.f32 last, [steps_at + {PAIRS - 4}];"
    yield "and.b32 t, lane, 3;"
    yield "mad.lo.u32 steps_at, t, 8, steps_at;"
    yield from weighted(walk.dtype, left)
    yield "add.f32 total, total, last;"
    yield from _free_stage(walk, which)
    yield f"add.u32 u, held, {2 * TILE};"
    yield "bfe.u32 u, u, 4, 14;"
    yield from ptx.descriptor("desc_n", "u", across=TILE)
    yield "ex2.approx.ftz.f32 f, last;"
    for i in range(64):
        yield f"mul.f32 kept{i}, kept{i}, f;"
    yield from by_tokens("kept", left, "desc_n", STATES, walk.dtype)
    yield "mad.lo.u32 freed, stage, 8, empty;"
    yield from ptx.next_stage(STAGES)
    yield "add.u32 chunk, chunk, 1;"


def _free_stage(walk: Walk, which: int) -> Iterator[str]:
    """The one of the product before, if there was one, once all warps have waited for it."""
    yield "wgmma.wait_group.sync.aligned 0;"
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield "setp.ne.and.u32 p, freed, 0, leads;"
    yield "@p mbarrier.arrive.shared::cta.b64 _, [freed];"
    if walk.finishes:  # whose waits count what is in a stage, too
        at = walk.done_at - walk.barriers_at - 8 * STAGES
        yield f"@p mbarrier.arrive.shared::cta.b64 _, [freed + {at}];"


def _exchange(walk: Walk, which: int) -> Iterator[str]:
    """``at``: this thread's first quad of what this block adds to a head's state; after that comes
    the state that it begins with."""
    yield "mad.lo.u32 at, thread, 16, base;"
    yield f"add.u32 at, at, {walk.exchange_at + which * 2 * STATE_BYTES};"
