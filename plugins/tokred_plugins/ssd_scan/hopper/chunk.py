"""One chunk of one head."""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.ssd_scan.hopper.gate import (
    ask_for_z,
    gated_results,
    gates,
    next_place,
    store_sums,
)
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
    quads,
    two_floats,
)


def one_chunk(walk: Walk, which: int) -> Iterator[str]:
    """One chunk of one head, whose operands are there."""
    dtype = walk.dtype
    yield f"mad.lo.u32 held, stage, {walk.stage_bytes}, base;"
    yield f"add.u32 x_at, held, {(4 + which) * TILE};"
    yield f"add.u32 steps_at, held, {(4 + walk.together) * TILE + which * STEPS};"
    # Operands: C and B along their rows, the state's copy too; x and B across. The address without
    # the bits that say which block of a cluster: they would count as the distance of columns.
    yield "bfe.u32 t, held, 4, 14;"
    yield from ptx.descriptor("desc_c", "t")
    yield f"add.u32 u, t, {2 * TILE >> 4};"
    yield from ptx.descriptor("desc_b", "u")
    yield from ptx.descriptor("desc_n", "u", across=TILE)
    yield "bfe.u32 t, copy, 4, 14;"
    yield from ptx.descriptor("desc_h", "t")
    yield "bfe.u32 t, x_at, 4, 14;"
    yield from ptx.descriptor("desc_x", "t", across=TILE)

    for name in ("score", "sum"):
        for i in range(32):
            yield f"mov.f32 {name}{i}, 0f00000000;"
    yield "wgmma.fence.sync.aligned;"
    yield from _by_columns("score", "desc_b", dtype)
    yield from _by_columns("sum", "desc_h", dtype)

    # Meanwhile: the running decay of this thread's two rows, dt and the decay of its four columns
    # among the warp's own.
    yield "mad.lo.u32 u, warp, 128, steps_at;"
    yield "ld.shared.f32 near, [u + 4];"
    yield "and.b32 t, lane, 3;"
    yield "mad.lo.u32 v, t, 16, u;"
    for i in range(2):
        a, b = 2 * i, 2 * i + 1
        yield f"ld.shared.v4.f32 {{dt{a}, run{a}, dt{b}, run{b}}}, [v + {64 * i}];"
    yield "shr.u32 v, lane, 2;"
    yield "mad.lo.u32 u, v, 8, u;"
    yield "ld.shared.f32 upper, [u + 4];"
    yield "ld.shared.f32 lower, [u + 68];"
    yield f"ld.shared.f32 last, [steps_at + {PAIRS - 4}];"
    yield "mad.lo.u32 steps_at, t, 8, steps_at;"  # of this thread's columns, 4 bytes a token
    yield from weighted(dtype)

    yield "wgmma.wait_group.sync.aligned 1;"
    yield from _mixed(dtype, which)
    yield "wgmma.wait_group.sync.aligned 0;"
    yield from _decayed_and_skipped(dtype)
    yield from by_tokens("sum", "mixed", "desc_x", HEAD_DIM, dtype)
    yield "ex2.approx.ftz.f32 f, last;"
    for i in range(64):
        yield f"mul.f32 kept{i}, kept{i}, f;"
    yield from by_tokens("kept", "weighted", "desc_n", STATES, dtype)
    if walk.gated and not walk.finishes:
        yield from gates(dtype, which)

    yield "wgmma.wait_group.sync.aligned 1;"
    if walk.finishes:
        yield from _hand_over()
    else:
        yield from results(walk, which)

    yield "wgmma.wait_group.sync.aligned 0;"
    yield from copy_state(walk)
    yield "fence.proxy.async.shared::cta;"
    if not walk.finishes:
        yield "@leads cp.async.bulk.wait_group.read 0;"  # the next chunk writes there
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield f"mad.lo.u32 bar, stage, 8, {'done' if walk.finishes else 'empty'};"
    yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    if walk.gated and not walk.finishes:
        yield from ask_for_z(2, walk.end)
        yield from next_place()
    yield from ptx.next_stage(STAGES)


def results(walk: Walk, which: int) -> Iterator[str]:
    """Sums of a chunk, gated or not, rounded and on their way to memory; labels and the barrier are
    those of group ``which``."""
    if walk.gated:
        yield from gated_results(walk)
    for i in range(4):
        yield from _round_and_place("sum", 8 * i, f"to{i}", "out", 0, walk.dtype)
    yield "fence.proxy.async.shared::cta;"
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield f"mul.lo.u32 column, head, {HEAD_DIM};"
    yield f"mul.lo.u32 row, chunk, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    yield "setp.lt.s32 p, row, 0;"
    yield f"@p bra ACROSS{which};"
    yield f"@leads {ptx.STORE} [map_y, {{column, row}}], [out];"
    yield "@leads cp.async.bulk.commit_group;"
    yield f"bra STORED{which};"
    yield f"ACROSS{which}:"
    yield from _store_by_threads(walk)
    if walk.finishes:  # all have read the tile before z comes there; a head's group does so later
        yield "fence.proxy.async.shared::cta;"
        yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield f"STORED{which}:"
    if walk.gated:
        yield from store_sums(walk)


def _hand_over() -> Iterator[str]:
    """Sums of a chunk to the group that finishes it, in the place of C, which is no longer needed:
    a thread of it has the same places in the matrix as this one."""
    yield "mad.lo.u32 at, thread, 16, held;"
    for place, numbers in quads("sum", 32):
        yield f"st.shared.v4.f32 [at + {place}], {{{numbers}}};"


def _by_columns(name: str, right: str, dtype: str) -> Iterator[str]:
    """C times an operand that is read along its 64 rows of 128 columns, [64, 64]: begun."""
    kind = ptx.KIND[dtype]
    sums = ", ".join(f"{name}{i}" for i in range(32))
    for part in range(STATES // 16):
        offset = part // 4 * TILE + part % 4 * 32 >> 4
        yield f"add.u64 wide, desc_c, {offset};"
        yield f"add.u64 stride, {right}, {offset};"
        yield (
            f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {{{sums}}}, "
            "wide, stride, always, 1, 1, 0, 0;"
        )
    yield "wgmma.commit_group.sync.aligned;"


def by_tokens(name: str, left: str, right: str, columns: int, dtype: str) -> Iterator[str]:
    """A left operand in registers, of 64 tokens, times one that is read across its rows: begun."""
    kind = ptx.KIND[dtype]
    sums = ", ".join(f"{name}{i}" for i in range(columns // 2))
    yield "wgmma.fence.sync.aligned;"
    for part in range(CHUNK // 16):
        lefts = ", ".join(f"{left}{4 * part + i}" for i in range(4))
        yield f"add.u64 wide, {right}, {part * 16 * ptx.ROW_BYTES >> 4};"
        yield (
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{sums}}}, "
            f"{{{lefts}}}, wide, always, 1, 1, 1;"
        )
    yield "wgmma.commit_group.sync.aligned;"


def weighted(dtype: str, name: str = "weighted") -> Iterator[str]:
    """x turned, each token by what is left of it at the chunk's end: a left operand, ``name``."""
    yield "add.u32 at, x_at, x_across;"
    for part in range(CHUNK // 16):
        regs = ", ".join(f"{name}{4 * part + i}" for i in range(4))
        yield (
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
            f"{{{regs}}}, [at + {part * 16 * ptx.ROW_BYTES}];"
        )
    for pair in range(8):  # of tokens: a pair of columns in two of the four registers of a part
        yield f"ld.shared.v2.f32 {{even_weight, odd_weight}}, [steps_at + {PAIRS + 32 * pair}];"
        part, second = divmod(pair, 2)
        for i in (0, 1):
            register = f"{name}{4 * part + 2 * second + i}"
            yield from two_floats(register, dtype)
            yield "mul.f32 f, f, even_weight;"
            yield "mul.f32 g, g, odd_weight;"
            yield ptx.round_two(register, "f", "g", dtype)


def _mixed(dtype: str, which: int) -> Iterator[str]:
    """Scores by decay and dt, on and below the diagonal: a left operand.

    Of the pieces of 16 columns those before the warp's own rows are all below the diagonal: their
    decay is one from the column to the warp's first row, ``near``, times one from there on, both at
    most 1.
    """
    for i in range(16):
        yield f"mov.b32 mixed{i}, 0;"
    for run in ("upper", "lower"):
        yield f"sub.f32 {run}_near, {run}, near;"
        yield f"ex2.approx.ftz.f32 {run}_near, {run}_near;"
    yield f"mad.lo.u32 v, warp, {4 * CHUNK}, steps_at;"
    nears = PAIRS + ENDS - 4 * CHUNK  # the first warp has none
    for part in range(CHUNK // 16):
        yield f"setp.eq.u32 p, warp, {part};"
        yield f"@p bra DIAGONAL{which}_{part};"
        for pair in (2 * part, 2 * part + 1):
            yield f"ld.shared.v2.f32 {{even_weight, odd_weight}}, [v + {nears + 32 * pair}];"
            for row, run in enumerate(("upper", "lower")):
                found = [f"score{4 * pair + 2 * row + i}" for i in (0, 1)]
                for score, weight in zip(found, ("even_weight", "odd_weight"), strict=True):
                    yield f"mul.f32 {score}, {score}, {run}_near;"
                    yield f"mul.f32 {score}, {score}, {weight};"
                yield ptx.round_two(f"mixed{2 * pair + row}", *found, dtype)
    # A warp's own piece ends its row of pieces: one of these is where it comes from above.
    for part in range(CHUNK // 16):
        yield f"DIAGONAL{which}_{part}:"
        # Within the piece: row lane / 4 (+ 8), columns 2 (lane % 4) (+ 1) (+ 8).
        yield "shr.u32 t, lane, 2;"
        yield "and.b32 v, lane, 3;"
        yield "shl.b32 v, v, 1;"
        yield "sub.s32 t, t, v;"
        for second, row in ((0, 0), (0, 1), (1, 1)):
            pair = 2 * part + second
            found = [f"score{4 * pair + 2 * row + i}" for i in (0, 1)]
            for i, score in enumerate(found):
                yield f"sub.f32 decay, {('upper', 'lower')[row]}, run{2 * second + i};"
                yield "ex2.approx.ftz.f32 decay, decay;"
                yield f"mul.f32 decay, decay, dt{2 * second + i};"
                yield f"mul.f32 {score}, {score}, decay;"
                if second == row:
                    yield f"setp.ge.s32 p, t, {i};"
                    yield f"selp.f32 {score}, {score}, 0f00000000, p;"
            yield ptx.round_two(f"mixed{2 * pair + row}", *found, dtype)
        yield f"bra MIXED{which};"
    yield f"MIXED{which}:"


def _decayed_and_skipped(dtype: str) -> Iterator[str]:
    """out = out * exp2(run) + D x."""
    for run in ("upper", "lower"):
        yield f"ex2.approx.ftz.f32 {run}, {run};"
    for across in range(4):
        yield f"add.u32 at, x_at, to{across};"
        regs = ", ".join(f"two{i}" for i in range(4))
        yield f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{regs}}}, [at];"
        for i in range(4):
            first = 8 * across + 2 * i
            run = "lower" if i % 2 else "upper"
            yield from two_floats(f"two{i}", dtype)
            for j, x in ((0, "f"), (1, "g")):
                yield f"mul.f32 {x}, {x}, skip;"
                yield f"fma.rn.f32 sum{first + j}, sum{first + j}, {run}, {x};"


def _round_and_place(
    name: str, first: int, place: str, tile: str, offset: int, dtype: str
) -> Iterator[str]:
    """Sixteen columns of sums into a tile of shared memory."""
    for j in range(4):
        low = first + 2 * j
        yield ptx.round_two(f"two{j}", f"{name}{low}", f"{name}{low + 1}", dtype)
    yield f"add.u32 at, {tile}, {place};"
    yield (
        f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [at + {offset}], {{two0, two1, two2, two3}};"
    )


def copy_state(walk: Walk) -> Iterator[str]:
    """The state, rounded, for the next chunk's product."""
    for i in range(8):
        yield from _round_and_place("kept", 8 * i, f"to{i % 4}", "copy", i // 4 * TILE, walk.dtype)


def _store_by_threads(walk: Walk) -> Iterator[str]:
    """The tile of results that begins ``row`` rows from the first that is no padding; those before
    it are left out. Eight columns a thread, sixteen rows at a time."""
    yield "shr.u32 t, thread, 3;"  # the row in the tile
    yield "and.b32 v, thread, 7;"
    yield "and.b32 u, t, 7;"
    yield "xor.b32 u, u, v;"  # where the columns are: scattered by the row
    yield "shl.b32 u, u, 4;"
    yield f"mad.lo.u32 at, t, {ptx.ROW_BYTES}, u;"
    yield "add.u32 at, at, out;"
    yield "mad.lo.u32 column, v, 8, column;"
    yield "add.u32 row, row, t;"
    yield "mad.lo.u32 u, batch, length, pad;"
    yield "add.u32 u, u, row;"
    for i in range(CHUNK // 16):
        yield f"ld.shared.v4.b32 {{two0, two1, two2, two3}}, [at + {16 * i * ptx.ROW_BYTES}];"
        yield "setp.lt.u32 p, row, rows;"  # rows before the first are huge
        yield f"mul.wide.u32 offset, u, {2 * walk.heads * HEAD_DIM};"
        yield "add.u64 from, y, offset;"
        yield "mul.wide.u32 offset, column, 2;"
        yield "add.u64 from, from, offset;"
        yield "@p st.global.v4.b32 [from], {two0, two1, two2, two3};"
        yield "add.u32 row, row, 16;"
        yield "add.u32 u, u, 16;"
