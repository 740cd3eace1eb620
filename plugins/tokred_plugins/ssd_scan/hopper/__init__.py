"""The walk over chunks for compute capability 9.0 as PTX, written out: what Triton 3.6 cannot say.

A block of threads walks the chunks of one or two heads of a sequence. One of its warps only asks
for what the next chunks read; one for each head computes dt and its decay, a few chunks ahead of
the group of four warps for each head that does the rest, and while one waits for products the other
works. What both heads read, B and C, is read once. Rows of padding, and rows beyond the end, are
outside the matrix that the tensor memory accelerator is told of: they read as zeros and are not
written. (It reads from rows before the first, and writes to none: a store that begins there is an
illegal instruction on an H100. The chunk across the first row is stored by the threads.)

For each chunk of 64 tokens and head (ssd_scan's README.md has the formulas):

    scores = C B^T        out = C state      by products, in float32
    mixed = scores * exp2(run_i - run_j) * dt_j where j <= i, rounded
    out = out * exp2(run_i) + D x + mixed x
    state = state * exp2(last) + (x * exp2(last - run_j) * dt_j)^T B

Where walks do not fill the multiprocessors a whole number of times, two blocks (a cluster) share an
odd number of them: one walks the first half of the last one before its own, the other the second
half after, from the state that the first left as the final one, long before.

Where there are few walks, a cluster of blocks has pieces of one side by side (``split.py``): each
walks its piece for what it adds to a state of zeros, they tell each other through their shared
memory, and each walks its piece again from the state that it begins with.

Gated, what is written is out * silu(z), and for each token and head the sum of its squares; scored,
also the mean of max(0, out). Tiles of z are read two chunks ahead, into the places from which
results leave, of which there are two then. Where a block walks one head, that is done by another
group of warps, while the head's own goes on with the next chunk.

The state stays in float32 in registers, [P, N]; the copy that the next chunk's product reads is
rounded. Sources: the PTX ISA, 8.6, for the layouts of ``wgmma`` (register fragments, descriptors of
operands read along and across their rows), ``ldmatrix`` and ``stmatrix``.

    walk.py     a launch's constants, and where things are in memory
    parts.py    which parts of walks a block has
    split.py    what blocks that have pieces of one walk tell each other
    ask.py      the four warps that ask for operands and compute steps
    group.py    the groups that do the rest: a walk's begin, chunks and end
    chunk.py    one chunk of a head
    finish.py   the group that gates and stores, where one head is walked
    gate.py     what is done of the gated norm
"""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins import ptx
from tokred_plugins.kernels import Call, Written
from tokred_plugins.ssd_scan.hopper.ask import ask
from tokred_plugins.ssd_scan.hopper.finish import finish
from tokred_plugins.ssd_scan.hopper.group import by_group
from tokred_plugins.ssd_scan.hopper.parts import can_share
from tokred_plugins.ssd_scan.hopper.walk import (
    CHUNK,
    HEAD_DIM,
    INPUTS,
    STAGES,
    STATES,
    Walk,
    outputs,
)

__all__ = ["CHUNK", "HEAD_DIM", "STAGES", "STATES", "Walk", "can_share", "write", "written"]


def written(call: Call) -> Written:
    """The code of a launch of ``ssd_scan_hopper``, gated or not, scored or not.

    Raises:
        ValueError: heads walked together that are not of one group, or walks that two blocks
            cannot share.
    """
    constants, together = call.constants, call.tactic.blocks["HEADS"]
    walks, split = call.tactic.blocks["WALKS"], call.tactic.blocks["SPLIT"]
    if not can_share(int(constants["H"]) // together, walks, split):
        raise ValueError(
            f"two blocks cannot share {walks} of {int(constants['H']) // together} walks"
            + (f" in {split} pieces" if split > 1 else "")
        )
    of_group = int(constants["H"]) // int(constants["G"])
    if of_group % together:
        raise ValueError(f"{together} heads walked together do not divide a group of {of_group}")
    walk = Walk(
        int(constants["H"]), int(constants["G"]), call.inputs["xbc"], call.inputs["d"],
        together, int(constants["Z"]), "gated" in call.outputs, call.inputs["dt_bias"],
        call.inputs["a_log"], float(constants["DT_MIN"]), float(constants["DT_MAX"]),
        walks, "relus" in call.outputs, split,
    )
    name = call.kernel.name
    return Written(write(walk, name), name, walk.shared, walk.maps * ptx.MAP_BYTES)


def write(walk: Walk, name: str) -> str:
    """The PTX of ``name(xbc, zxbcdt, dt_bias, a_log, d, pads, length, chunks, y, state, scratch,
    profile)``; gated, ``squares`` comes after ``y``, and scored, ``relus`` after that."""
    work = [by_group(walk, head) for head in range(walk.together)]
    if walk.finishes:
        work.append(finish(walk))
    lines = [*_registers(walk), *_prepare(walk, name), *ptx.roles(ask(walk), work), "ret;"]
    parameters = (
        *((p, "pointer") for p in INPUTS), ("length", "int"), ("chunks", "int"),
        *((p, "pointer") for p in outputs(walk)),
    )
    return ptx.entry(name, parameters, walk.threads, walk.cluster, lines)


def _registers(walk: Walk) -> Iterator[str]:
    yield from ptx.common_registers()
    if walk.gated:
        yield ".reg .b32 gate, gate_parity, place, outs, done, gated<4>;"
        yield ".reg .b64 squares, map_z;"
        yield ".reg .f32 upper_squares, lower_squares;"
    if walk.scored:
        yield ".reg .b64 relus;"
        yield ".reg .f32 upper_relus, lower_relus;"
    if walk.cluster > 1:
        yield ".reg .b32 index, parts, until, rank, turn, there, freed;"
    yield ".reg .b32 length, chunks, chunk, batch, pad, first, rows, head, group, warp, held;"
    yield ".reg .b32 to<4>, x_across, x_at, steps_at, copy, out;"
    yield ".reg .b64 xbc, zxbcdt, dt_bias, a_log, d, pads, y, state, scratch, map_x, map_y;"
    yield ".reg .b64 from, offset, apart;"
    yield ".reg .b64 desc_c, desc_b, desc_h, desc_x, desc_n;"
    yield ".reg .b32 weighted<16>, mixed<16>, two<4>;"
    yield ".reg .f32 score<32>, sum<32>, kept<64>, dt<4>, run<4>;"
    yield ".reg .f32 bias, rate, raw<2>, next<2>, total, series;"
    yield ".reg .f32 last, upper, lower, skip, f, g, decay, even_weight, odd_weight;"
    yield ".reg .f32 near, upper_near, lower_near;"
    yield ".reg .b16 half, other;"


def _prepare(walk: Walk, name: str) -> Iterator[str]:
    for register in (*INPUTS, *outputs(walk), "scratch"):
        yield f"ld.param.u64 {register}, [{name}_{register}];"
    for register in ("length", "chunks"):
        yield f"ld.param.u32 {register}, [{name}_{register}];"
    yield "mov.u32 thread, %tid.x;"
    yield "and.b32 lane, thread, 31;"
    yield "mov.u32 batch, %ctaid.z;"
    yield "mov.u32 head, %ctaid.x;"
    yield "mov.u32 t, %nctaid.x;"
    yield "mad.lo.u32 t, batch, t, head;"
    yield f"mul.wide.u32 wide, t, {walk.maps * ptx.MAP_BYTES};"
    yield "add.u64 map_x, scratch, wide;"
    yield f"add.u64 map_y, map_x, {ptx.MAP_BYTES};"
    if walk.gated:
        yield f"add.u64 map_z, map_y, {ptx.MAP_BYTES};"
    yield f"mul.lo.u32 head, head, {walk.together};"  # where a block has parts, each says its own
    yield f"div.u32 group, head, {walk.heads // walk.groups};"
    if walk.cluster > 1:
        yield "mov.u32 rank, %cluster_ctarank;"
    yield "mov.u32 base, memory;"
    yield f"add.u32 full, base, {walk.barriers_at};"
    yield f"add.u32 empty, full, {8 * STAGES};"
    if walk.finishes:
        yield f"add.u32 done, full, {walk.done_at - walk.barriers_at};"
    yield "mov.u32 zero, 0;"
    yield "mov.u32 one, 1;"
    # Rows from the first that is no padding; where there is none, no chunk is walked.
    yield "mul.wide.u32 wide, batch, 4;"
    yield "add.u64 wide, pads, wide;"
    yield "ld.global.s32 pad, [wide];"
    yield "max.s32 pad, pad, 0;"
    yield "min.s32 pad, pad, length;"
    yield "sub.u32 rows, length, pad;"
    yield f"div.u32 first, pad, {CHUNK};"
    yield "setp.eq.u32 p, rows, 0;"
    yield "@p mov.u32 first, chunks;"
    yield from ptx.prepared([*_maps(walk)], _barriers(walk))
    yield "bar.sync 0;"
    yield "mov.u32 chunk, first;"
    yield "mov.u32 stage, 0;"


def _maps(walk: Walk) -> Iterator[list[str]]:
    """Of the rows from the first that is no padding."""
    box, width = (ptx.DEEP, CHUNK), walk.heads * HEAD_DIM
    maps = [("xbc", "map_x", walk.columns, walk.columns), ("y", "map_y", width, width)]
    if walk.gated:
        maps.append(("zxbcdt", "map_z", width, walk.packed))
    for i, (pointer, there, columns, apart) in enumerate(maps):
        size = (columns, "rows")
        yield [
            "mad.lo.u32 u, batch, length, pad;",
            f"mul.wide.u32 offset, u, {2 * apart};",
            f"add.u64 from, {pointer}, offset;",
            f"add.u32 at, base, {walk.out_at + i * ptx.MAP_BYTES};",
            *ptx.tensor_map("from", there, size, box, 2 * apart, walk.dtype),
            *(["fence.proxy.async.shared::cta;"] if walk.gated else []),  # z comes there
        ]


def _barriers(walk: Walk) -> Iterator[str]:
    if walk.gated:
        for i in range(2 * walk.together):
            yield f"@leads mbarrier.init.shared::cta.b64 [full + {16 * STAGES + 8 * i}], 1;"
    if walk.finishes:
        for i in range(STAGES):
            yield f"@leads mbarrier.init.shared::cta.b64 [done + {8 * i}], 1;"
    if walk.split > 1 and walk.borrows:
        at = walk.taken_at - walk.barriers_at
        yield f"@leads mbarrier.init.shared::cta.b64 [full + {at}], {walk.together};"
    yield from ptx.barriers(STAGES, walk.together, 1 + walk.together)
