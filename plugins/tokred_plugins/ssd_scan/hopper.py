"""The walk over chunks for compute capability 9.0 as PTX, written out: what Triton 3.6 cannot say.

A block of threads walks the chunks of one or two heads of a sequence. One of its warps only asks
for what the next chunks read; one for each head computes dt and its decay, a few chunks ahead of
the group of four warps for each head that does the rest, and while one waits for products the other
works. What both heads read, B and C, is read once. Rows of padding, and rows
beyond the end, are outside the matrix that the tensor memory accelerator is told of: they read as
zeros and are not written. (It reads from rows before the first, and writes to none: a store that
begins there is an illegal instruction on an H100. The chunk across the first row is stored by the
threads.)

For each chunk of 64 tokens and head (ssd_scan's README.md has the formulas):

    scores = C B^T        out = C state      by products, in float32
    mixed = scores * exp2(run_i - run_j) * dt_j where j <= i, rounded
    out = out * exp2(run_i) + D x + mixed x
    state = state * exp2(last) + (x * exp2(last - run_j) * dt_j)^T B

Where walks do not fill the multiprocessors a whole number of times, two blocks (a cluster) share an
odd number of them: one walks the first half of the last one before its own, the other the second
half after, from the state that the first left as the final one, long before.

Gated, what is written is out * silu(z), and for each token and head the sum of its squares; scored,
also the mean of max(0, out). Tiles
of z are read two chunks ahead, into the places from which results leave, of which there are two
then.

The state stays in float32 in registers, [P, N]; the copy that the next chunk's product reads is
rounded. Sources: the PTX ISA, 8.6, for the layouts of ``wgmma`` (register fragments, descriptors of
operands read along and across their rows), ``ldmatrix`` and ``stmatrix``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tokred_plugins import ptx
from tokred_plugins.kernels import Call, Written, cdiv

CHUNK = 64
HEAD_DIM = 64
STATES = 128
STAGES = 3
_TILE = 64 * ptx.ROW_BYTES  # bytes of 64 rows of 64 numbers
# Bytes of what is computed ahead, in float32: of each token dt and the running decay; dt by what is
# left of it at the chunk's end; and dt by what is left at token 16, 32 and 48, of those before.
_PAIRS, _ENDS, _NEARS = CHUNK * 8, CHUNK * 4, CHUNK * 4 * 3
_STEPS = _PAIRS + _ENDS + _NEARS
_SERIES = 8  # terms: (1/3)^16 / 17 is 1e-9
_GATES = 16  # bytes of a head's barriers for z
_COPY = 2 * _TILE  # bytes of the state, rounded: [P, N] in two tiles


@dataclass(frozen=True)
class Walk:
    """One launch's constants.

    Attributes:
        heads: of a sequence.
        groups: of heads that share B and C.
        dtype: fp16 or bf16, of x, B, C and y.
        d_dtype: fp32, fp16 or bf16, of D.
        together: heads a block of threads walks: 1 or 2, of one group.
        walks: of two blocks; 2 is one each, an odd number more than one each.
        packed: numbers of a row of the projection, which begins with z and ends with dt; a multiple
            of 8 where z is read.
        gated: the result is times silu(z), and its squares are summed up.
        scored: gated, and what was positive before is summed up too.
        dt_bias_dtype, a_log_dtype: fp32, fp16 or bf16.
        dt_min, dt_max: limits of dt.
    """

    heads: int
    groups: int
    dtype: str
    d_dtype: str
    together: int
    packed: int
    gated: bool = False
    dt_bias_dtype: str = "fp32"
    a_log_dtype: str = "fp32"
    dt_min: float = 0.0
    dt_max: float = math.inf
    walks: int = 2
    scored: bool = False

    @property
    def shares(self) -> bool:
        """A block has parts of several walks."""
        return self.walks != 2

    @property
    def of_sequence(self) -> int:
        """Walks."""
        return self.heads // self.together

    @property
    def pairs(self) -> int:
        """Of blocks that share walks of one sequence."""
        return cdiv(self.of_sequence, self.walks)

    @property
    def end(self) -> str:
        """The register of the chunk before which a part of a walk ends."""
        return "until" if self.shares else "chunks"

    @property
    def maps(self) -> int:
        """Of x, B and C, of results, and of z."""
        return 3 if self.gated else 2

    @property
    def columns(self) -> int:
        """Of x, B and C."""
        return self.heads * HEAD_DIM + 2 * self.groups * STATES

    @property
    def threads(self) -> int:
        return ptx.GROUP_THREADS * (self.together + 1)

    @property
    def stage_bytes(self) -> int:
        """C, B, and for each head x and its steps; a multiple of 1024."""
        return 4 * _TILE + self.together * _TILE + 1024 * cdiv(self.together * _STEPS, 1024)

    @property
    def copies_at(self) -> int:
        return STAGES * self.stage_bytes

    @property
    def out_at(self) -> int:
        return self.copies_at + self.together * _COPY

    @property
    def places(self) -> int:
        """Tiles from which the results of a head leave, in turn."""
        return 2 if self.gated else 1

    @property
    def barriers_at(self) -> int:
        return self.out_at + self.together * self.places * _TILE

    @property
    def gates_at(self) -> int:
        """Barriers for z: two of each head."""
        return self.barriers_at + 16 * STAGES

    @property
    def shared(self) -> int:
        return self.gates_at + (_GATES * self.together if self.gated else 0)


def can_share(of_sequence: int, walks: int) -> bool:
    """Whether so many walks a sequence may be given to pairs of blocks, so many a pair: 2 is one
    each; of an odd number each block has as many whole ones."""
    if walks == 2:
        return True
    return walks % 2 == 1 and walks > 2 and (walks - 1) * cdiv(of_sequence, walks) <= of_sequence


def written(call: Call) -> Written:
    """The code of a launch of ``ssd_scan_hopper``, gated or not, scored or not.

    Raises:
        ValueError: heads walked together that are not of one group, or walks that two blocks
            cannot share.
    """
    constants, together = call.constants, call.tactic.blocks["HEADS"]
    walks = call.tactic.blocks["WALKS"]
    if not can_share(int(constants["H"]) // together, walks):
        raise ValueError(
            f"two blocks cannot share {walks} of {int(constants['H']) // together} walks"
        )
    of_group = int(constants["H"]) // int(constants["G"])
    if of_group % together:
        raise ValueError(f"{together} heads walked together do not divide a group of {of_group}")
    walk = Walk(
        int(constants["H"]), int(constants["G"]), call.inputs["xbc"], call.inputs["d"],
        together, int(constants["Z"]), "gated" in call.outputs, call.inputs["dt_bias"],
        call.inputs["a_log"], float(constants["DT_MIN"]), float(constants["DT_MAX"]),
        walks, "relus" in call.outputs,
    )
    name = call.kernel.name
    return Written(write(walk, name), name, walk.shared, walk.maps * ptx.MAP_BYTES)


def write(walk: Walk, name: str) -> str:
    """The PTX of ``name(xbc, zxbcdt, dt_bias, a_log, d, pads, length, chunks, y, state, scratch,
    profile)``; gated, ``squares`` comes after ``y``, and scored, ``relus`` after that."""
    work = (_walk(walk, head) for head in range(walk.together))
    lines = [*_registers(walk), *_prepare(walk, name), *ptx.roles(_ask(walk), work), "ret;"]
    parameters = (
        *((p, "pointer") for p in _INPUTS), ("length", "int"), ("chunks", "int"),
        *((p, "pointer") for p in _outputs(walk)),
    )
    return ptx.entry(name, parameters, walk.threads, 2 if walk.shares else 1, lines)


_INPUTS = ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads")


def _outputs(walk: Walk) -> tuple[str, ...]:
    more = ("squares",) * walk.gated + ("relus",) * walk.scored
    return ("y", *more, "state")


def _registers(walk: Walk) -> Iterator[str]:
    yield from ptx.common_registers()
    if walk.gated:
        yield ".reg .b32 gate, gate_parity, place, outs, gated<4>;"
        yield ".reg .b64 squares, map_z;"
        yield ".reg .f32 upper_squares, lower_squares;"
    if walk.scored:
        yield ".reg .b64 relus;"
        yield ".reg .f32 upper_relus, lower_relus;"
    if walk.shares:
        yield ".reg .b32 index, parts, until, rank, turn;"
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
    for register in (*_INPUTS, *_outputs(walk), "scratch"):
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
    yield f"mul.lo.u32 head, head, {walk.together};"
    yield f"div.u32 group, head, {walk.heads // walk.groups};"
    if walk.shares:
        yield "mov.u32 rank, %cluster_ctarank;"
    yield "mov.u32 base, memory;"
    yield f"add.u32 full, base, {walk.barriers_at};"
    yield f"add.u32 empty, full, {8 * STAGES};"
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
    yield from ptx.barriers(STAGES, walk.together, 1 + walk.together)


def _parts(walk: Walk, label: str) -> Iterator[str]:
    """What this block walks, one part after the other: sets ``head``, ``group``, ``chunk`` and
    ``until``; ``turn`` is 1 for the first half of a walk, 2 for the second, 0 for a whole one.

    The block of rank 0 begins with the half that the other one ends with.
    """
    if not walk.shares:
        return
    yield "mov.u32 index, 0;"
    yield f"{label}:"
    pairs, whole = walk.pairs, walk.walks // 2
    yield "mov.u32 t, %ctaid.x;"
    yield "shr.u32 t, t, 1;"
    yield f"add.u32 u, t, {2 * whole * pairs};"  # the walk in two halves, if there is one
    yield f"setp.lt.u32 p, u, {walk.of_sequence};"
    yield "selp.b32 v, one, zero, p;"
    yield f"add.u32 parts, v, {whole};"
    # Which part is a half: the first of rank 0, the last of rank 1.
    yield "setp.eq.u32 p, rank, 0;"
    yield f"selp.b32 at, zero, {whole}, p;"
    yield "setp.eq.u32 q, index, at;"
    yield "setp.ne.and.u32 q, v, 0, q;"
    # Neighbours in memory are walked at the same time, by as many blocks as are of one rank.
    yield "mov.u32 row, index;"
    yield "@p sub.u32 row, row, v;"
    yield "mad.lo.u32 row, row, 2, rank;"
    yield f"mad.lo.u32 row, row, {pairs}, t;"
    yield "@q mov.u32 row, u;"
    yield "mov.u32 turn, 0;"
    yield "@q add.u32 turn, rank, 1;"
    yield f"mul.lo.u32 head, row, {walk.together};"
    yield f"div.u32 group, head, {walk.heads // walk.groups};"
    yield "sub.u32 t, chunks, first;"
    yield "shr.u32 t, t, 1;"
    yield "add.u32 t, t, first;"
    yield "mov.u32 chunk, first;"
    yield "mov.u32 until, chunks;"
    yield "setp.eq.u32 p, turn, 1;"
    yield "@p mov.u32 until, t;"
    yield "setp.eq.u32 p, turn, 2;"
    yield "@p mov.u32 chunk, t;"


def _next_part(walk: Walk, label: str) -> Iterator[str]:
    """To the label of :func:`_parts`, where there is another."""
    if walk.shares:
        yield "add.u32 index, index, 1;"
        yield "setp.lt.u32 p, index, parts;"
        yield f"@p bra {label};"


def _ask(walk: Walk) -> Iterator[str]:
    """The first warp's first thread asks for operands, as stages become empty; the next warps
    compute steps."""
    yield f"setmaxnreg.dec.sync.aligned.u32 {ptx.FEW_REGISTERS};"
    if walk.shares:
        yield "barrier.cluster.arrive;"  # they wait for no other block
    yield "mov.u32 parity, 1;"  # nothing was ever in a stage: that phase counts as over
    yield "setp.ge.u32 p, thread, 32;"
    yield "@p bra STEPS;"
    yield "setp.ne.u32 p, thread, 0;"
    yield "@p bra ASKED;"
    yield from ptx.acquire("map_x")
    yield from _parts(walk, "ASK_PART")
    yield "ASK:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield "@p bra ASKED_PART;"
    yield "mad.lo.u32 bar, stage, 8, empty;"
    yield from ptx.wait("bar", "ASK_WAIT")
    yield "mad.lo.u32 bar, stage, 8, full;"
    delivered = (4 + walk.together) * _TILE
    yield f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {delivered};"
    yield f"mad.lo.u32 at, stage, {walk.stage_bytes}, base;"
    yield f"mul.lo.u32 row, chunk, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    width = walk.heads * HEAD_DIM
    for matrix in (walk.groups, 0):  # C, then B
        for tile in (0, 64):
            yield f"mad.lo.u32 column, group, {STATES}, {width + matrix * STATES + tile};"
            yield f"{ptx.LOAD} [at], [map_x, {{column, row}}], [bar];"
            yield f"add.u32 at, at, {_TILE};"
    yield f"mul.lo.u32 column, head, {HEAD_DIM};"
    for _ in range(walk.together):
        yield f"{ptx.LOAD} [at], [map_x, {{column, row}}], [bar];"
        yield f"add.u32 at, at, {_TILE};"
        yield f"add.u32 column, column, {HEAD_DIM};"
    yield from ptx.next_stage(STAGES)
    yield "add.u32 chunk, chunk, 1;"
    yield "bra ASK;"
    yield "ASKED_PART:"
    yield from _next_part(walk, "ASK_PART")
    yield "bra ASKED;"
    yield from _compute_steps(walk)
    yield "ASKED:"
    if walk.shares:
        yield "barrier.cluster.wait;"


def _compute_steps(walk: Walk) -> Iterator[str]:
    """dt, its running decay, and what they make of each token, by a warp for each head; a thread
    has two tokens of a chunk, those of the next are on their way."""
    yield "STEPS:"
    yield "shr.u32 warp, thread, 5;"
    yield "sub.u32 warp, warp, 1;"
    yield f"setp.ge.u32 p, warp, {walk.together};"
    yield "@p bra ASKED;"
    yield "setp.eq.u32 leads, lane, 0;"
    yield from _parts(walk, "STEPS_PART")
    yield "add.u32 head, head, warp;"
    yield from _of_head("bias", "dt_bias", walk.dt_bias_dtype)
    yield from _of_head("rate", "a_log", walk.a_log_dtype)
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
        yield from _softplus(f"dt{i}", f"raw{i}")
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
    yield f"mad.lo.u32 at, warp, {_STEPS}, at;"
    yield f"add.u32 at, at, {(4 + walk.together) * _TILE};"
    yield "mad.lo.u32 t, lane, 16, at;"
    yield "st.shared.v4.f32 [t], {dt0, run0, dt1, run1};"
    yield "mad.lo.u32 t, lane, 8, at;"
    yield "shfl.sync.idx.b32 f, total, 31, 31, -1;"
    yield from _left("f")
    yield f"st.shared.v2.f32 [t + {_PAIRS}], {{even_weight, odd_weight}};"
    for i in range(3):
        yield f"shfl.sync.idx.b32 f, run0, {8 * (i + 1)}, 31, -1;"
        yield from _left("f")
        yield f"setp.lt.u32 p, lane, {8 * (i + 1)};"
        at = _PAIRS + _ENDS + 4 * CHUNK * i
        yield f"@p st.shared.v2.f32 [t + {at}], {{even_weight, odd_weight}};"
    yield "bar.warp.sync -1;"
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    yield from ptx.next_stage(STAGES)
    yield "add.u32 chunk, chunk, 1;"
    yield "bra STEP;"
    yield "STEPPED:"
    yield from _next_part(walk, "STEPS_PART")


def _load_raw(walk: Walk) -> Iterator[str]:
    """``next``: what the projection says of dt for the two tokens from ``row`` on."""
    for i, number in enumerate(("half", "other")):
        yield f"add.u32 u, row, {i};"
        yield "setp.lt.u32 p, u, rows;"
        yield f"mov.b16 {number}, 0;"
        yield f"@p ld.global.b16 {number}, [from + {2 * walk.packed * i}];"
        yield f"cvt.f32.{ptx.KIND[walk.dtype]} next{i}, {number};"


def _softplus(target: str, x: str) -> Iterator[str]:
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


def _next_place() -> Iterator[str]:
    yield "xor.b32 place, place, 1;"
    yield "setp.eq.u32 p, place, 0;"
    yield "@p xor.b32 gate_parity, gate_parity, 1;"


def _walk(walk: Walk, which: int) -> Iterator[str]:
    """One head, or parts of several, by a group of four warps."""
    copy = walk.copies_at + which * _COPY
    out = walk.out_at + which * walk.places * _TILE
    yield f"setmaxnreg.inc.sync.aligned.u32 {ptx.many_registers(walk.together)};"
    yield "and.b32 thread, thread, 127;"
    yield "shr.u32 warp, thread, 5;"
    yield "setp.eq.u32 leads, thread, 0;"
    yield "setp.eq.u32 always, zero, 0;"
    yield "mov.u32 parity, 0;"
    yield from ptx.acquire("map_y", *(["map_z"] if walk.gated else []))
    yield from _places()
    yield f"add.u32 copy, base, {copy};"
    yield f"add.u32 out, base, {out};"
    if walk.gated:
        yield f"add.u32 gate, base, {walk.gates_at + _GATES * which};"
        yield "mov.u32 outs, out;"
        yield "mov.u32 place, 0;"
        yield "mov.u32 gate_parity, 0;"
    yield from _parts(walk, f"PART{which}")
    yield f"add.u32 head, head, {which};"
    if walk.gated:
        for ahead in (0, 1):
            yield from _ask_for_z(ahead, walk.end)
            yield "xor.b32 place, place, 1;"
    yield from _of_head("skip", "d", walk.d_dtype)
    for i in range(64):
        yield f"mov.f32 kept{i}, 0f00000000;"
    if walk.shares:
        yield from _take_state(walk, which)
    yield from _copy_state(walk)
    yield "fence.proxy.async.shared::cta;"
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield f"CHUNK{which}:"
    yield f"setp.ge.u32 p, chunk, {walk.end};"
    yield f"@p bra WALKED{which};"
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield from ptx.wait("bar", f"CHUNK_WAIT{which}")
    yield from _chunk(walk, which)
    yield "add.u32 chunk, chunk, 1;"
    yield f"bra CHUNK{which};"
    yield f"WALKED{which}:"
    yield from _store_state(walk)
    if walk.shares:
        yield "setp.eq.u32 p, turn, 1;"
        yield "@p barrier.cluster.arrive;"
        yield "setp.eq.u32 p, turn, 2;"
        yield f"@p bra PADDED{which};"
    yield from _padding(walk, which)
    yield from _next_part(walk, f"PART{which}")
    if walk.shares:
        yield "setp.ne.u32 p, turn, 2;"  # that waited before
        yield "@p barrier.cluster.wait;"
    yield "@leads cp.async.bulk.wait_group 0;"


def _places() -> Iterator[str]:
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


def _of_head(register: str, pointer: str, dtype: str) -> Iterator[str]:
    """A number of this head, as float32."""
    yield f"mul.wide.u32 offset, head, {4 if dtype == 'fp32' else 2};"
    yield f"add.u64 from, {pointer}, offset;"
    if dtype == "fp32":
        yield f"ld.global.f32 {register}, [from];"
    else:
        yield "ld.global.b16 half, [from];"
        yield f"cvt.f32.{ptx.KIND[dtype]} {register}, half;"


def _by_columns(name: str, right: str, dtype: str) -> Iterator[str]:
    """C times an operand that is read along its 64 rows of 128 columns, [64, 64]: begun."""
    kind = ptx.KIND[dtype]
    sums = ", ".join(f"{name}{i}" for i in range(32))
    for part in range(STATES // 16):
        offset = part // 4 * _TILE + part % 4 * 32 >> 4
        yield f"add.u64 wide, desc_c, {offset};"
        yield f"add.u64 stride, {right}, {offset};"
        yield (
            f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {{{sums}}}, "
            "wide, stride, always, 1, 1, 0, 0;"
        )
    yield "wgmma.commit_group.sync.aligned;"


def _by_tokens(name: str, left: str, right: str, columns: int, dtype: str) -> Iterator[str]:
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


def _chunk(walk: Walk, which: int) -> Iterator[str]:
    """One chunk of one head, whose operands are there."""
    dtype = walk.dtype
    yield f"mad.lo.u32 held, stage, {walk.stage_bytes}, base;"
    yield f"add.u32 x_at, held, {(4 + which) * _TILE};"
    yield f"add.u32 steps_at, held, {(4 + walk.together) * _TILE + which * _STEPS};"
    # Operands: C and B along their rows, the state's copy too; x and B across. The address without
    # the bits that say which block of a cluster: they would count as the distance of columns.
    yield "bfe.u32 t, held, 4, 14;"
    yield from ptx.descriptor("desc_c", "t")
    yield f"add.u32 u, t, {2 * _TILE >> 4};"
    yield from ptx.descriptor("desc_b", "u")
    yield from ptx.descriptor("desc_n", "u", across=_TILE)
    yield "bfe.u32 t, copy, 4, 14;"
    yield from ptx.descriptor("desc_h", "t")
    yield "bfe.u32 t, x_at, 4, 14;"
    yield from ptx.descriptor("desc_x", "t", across=_TILE)

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
    yield f"ld.shared.f32 last, [steps_at + {_PAIRS - 4}];"
    yield "mad.lo.u32 steps_at, t, 8, steps_at;"  # of this thread's columns, 4 bytes a token
    yield from _weighted(dtype)

    yield "wgmma.wait_group.sync.aligned 1;"
    yield from _mixed(dtype, which)
    yield "wgmma.wait_group.sync.aligned 0;"
    yield from _decayed_and_skipped(dtype)
    yield from _by_tokens("sum", "mixed", "desc_x", HEAD_DIM, dtype)
    yield "ex2.approx.ftz.f32 f, last;"
    for i in range(64):
        yield f"mul.f32 kept{i}, kept{i}, f;"
    yield from _by_tokens("kept", "weighted", "desc_n", STATES, dtype)
    if walk.gated:
        yield from _gates(dtype, which)

    yield "wgmma.wait_group.sync.aligned 1;"
    if walk.gated:
        yield from _gated(walk)
    for i in range(4):
        yield from _round_and_place("sum", 8 * i, f"to{i}", "out", 0, dtype)
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
    yield f"STORED{which}:"
    if walk.gated:
        yield from _store_sums(walk)

    yield "wgmma.wait_group.sync.aligned 0;"
    yield from _copy_state(walk)
    yield "fence.proxy.async.shared::cta;"
    yield "@leads cp.async.bulk.wait_group.read 0;"  # the next chunk writes there
    yield f"bar.sync {which + 1}, {ptx.GROUP_THREADS};"
    yield "mad.lo.u32 bar, stage, 8, empty;"
    yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    if walk.gated:
        yield from _ask_for_z(2, walk.end)
        yield from _next_place()
    yield from ptx.next_stage(STAGES)


def _ask_for_z(ahead: int, end: str) -> Iterator[str]:
    """Of a chunk so many after this one, where there is one, into ``place``; one thread."""
    yield f"add.u32 t, chunk, {ahead};"
    yield f"setp.lt.u32 p, t, {end};"
    yield "and.pred p, p, leads;"
    yield f"mul.lo.u32 column, head, {HEAD_DIM};"
    yield f"mul.lo.u32 row, t, {CHUNK};"
    yield "sub.s32 row, row, pad;"
    yield "mad.lo.u32 bar, place, 8, gate;"
    yield f"mad.lo.u32 at, place, {_TILE}, outs;"
    yield f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {_TILE};"
    yield f"@p {ptx.LOAD} [at], [map_z, {{column, row}}], [bar];"


def _silu(z: str) -> Iterator[str]:
    """z / (1 + exp(-z)), in the register of z; far below zero that is z / infinity."""
    yield f"mul.f32 near, {z}, {ptx.float_literal(-math.log2(math.e))};"
    yield "ex2.approx.ftz.f32 near, near;"
    yield f"add.f32 near, near, {ptx.float_literal(1.0)};"
    yield "rcp.approx.ftz.f32 near, near;"
    yield f"mul.f32 {z}, {z}, near;"


def _gates(dtype: str, which: int) -> Iterator[str]:
    """silu(z) in the place of scores, which are no longer needed, while products run."""
    yield f"mad.lo.u32 out, place, {_TILE}, outs;"
    yield "mad.lo.u32 bar, place, 8, gate;"
    yield from ptx.wait("bar", f"Z_WAIT{which}", "gate_parity")
    for across in range(4):
        yield f"add.u32 at, out, to{across};"
        regs = ", ".join(f"two{i}" for i in range(4))
        yield f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{regs}}}, [at];"
        for i in range(4):
            yield from _two_floats(f"two{i}", dtype)
            for j, gate in enumerate("fg"):
                yield from _silu(gate)
                yield f"mov.f32 score{8 * across + 2 * i + j}, {gate};"


def _gated(walk: Walk) -> Iterator[str]:
    """out = out * silu(z), and this thread's sums of squares; before, of what is positive."""
    for row in ("upper", "lower"):
        for name in _sums(walk):
            yield f"mov.f32 {row}_{name}, 0f00000000;"
    for i in range(32):
        row = ("upper", "lower")[i // 2 % 2]
        yield from _add_to_sums(walk, f"sum{i}", f"score{i}", row)


def _store_sums(walk: Walk) -> Iterator[str]:
    """What four threads have of the sums of two rows, added up: one shuffle adds a number of each
    of two threads where another is given away, so that each ends with one number of its own."""
    yield "and.b32 v, lane, 1;"
    yield "setp.ne.u32 p, v, 0;"  # the lower row, of both kinds
    for name in _sums(walk):
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
    yield from _at_sums(walk)
    yield "setp.lt.u32 p, row, rows;"
    if walk.scored:
        yield "selp.b64 wide, relus, squares, q;"
        yield "add.u64 from, wide, offset;"
    else:
        yield "add.u64 from, squares, offset;"
        yield "and.b32 v, lane, 2;"
        yield "setp.eq.and.u32 p, v, 0, p;"
    yield "@p st.global.f32 [from], upper_squares;"


def _at_sums(walk: Walk) -> Iterator[str]:
    """``offset``: of row ``u`` of all, and this head, in [B, L, H] of float32."""
    yield "mul.wide.u32 offset, head, 4;"
    yield f"mul.wide.u32 wide, u, {4 * walk.heads};"
    yield "add.u64 offset, offset, wide;"


def _sums(walk: Walk) -> tuple[str, ...]:
    """Over the channels of a head."""
    return ("squares", "relus") if walk.scored else ("squares",)


def _add_to_sums(walk: Walk, y: str, gate: str, row: str) -> Iterator[str]:
    """y = y * gate, added to what the row's sums are of; uses ``f``."""
    if walk.scored:
        yield f"max.f32 f, {y}, 0f00000000;"
        yield f"add.f32 {row}_relus, {row}_relus, f;"
    yield f"mul.f32 {y}, {y}, {gate};"
    yield f"fma.rn.f32 {row}_squares, {y}, {y}, {row}_squares;"


def _two_floats(register: str, dtype: str) -> Iterator[str]:
    """``f`` and ``g``: the low and the high half of a register of two numbers."""
    yield f"mov.b32 {{half, other}}, {register};"
    yield f"cvt.f32.{ptx.KIND[dtype]} f, half;"
    yield f"cvt.f32.{ptx.KIND[dtype]} g, other;"


def _weighted(dtype: str) -> Iterator[str]:
    """x turned, each token by what is left of it at the chunk's end: a left operand."""
    yield "add.u32 at, x_at, x_across;"
    for part in range(CHUNK // 16):
        regs = ", ".join(f"weighted{4 * part + i}" for i in range(4))
        yield (
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
            f"{{{regs}}}, [at + {part * 16 * ptx.ROW_BYTES}];"
        )
    for pair in range(8):  # of tokens: a pair of columns in two of the four registers of a part
        yield f"ld.shared.v2.f32 {{even_weight, odd_weight}}, [steps_at + {_PAIRS + 32 * pair}];"
        part, second = divmod(pair, 2)
        for i in (0, 1):
            register = f"weighted{4 * part + 2 * second + i}"
            yield from _two_floats(register, dtype)
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
    nears = _PAIRS + _ENDS - 4 * CHUNK  # the first warp has none
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
            yield from _two_floats(f"two{i}", dtype)
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


def _copy_state(walk: Walk) -> Iterator[str]:
    """The state, rounded, for the next chunk's product."""
    for i in range(8):
        yield from _round_and_place("kept", 8 * i, f"to{i % 4}", "copy", i // 4 * _TILE, walk.dtype)


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


# Of this thread's pairs of numbers, from its first on.
_STATE_PLACES = [
    (32 * i + row * 8 * 4 * STATES, f"{{kept{4 * i + 2 * row}, kept{4 * i + 2 * row + 1}}}")
    for i in range(16) for row in (0, 1)
]


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
    """y of rows of padding: D x, eight columns a thread, sixteen rows at a time."""
    width = walk.heads * HEAD_DIM
    yield "shr.u32 row, thread, 3;"
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
        for name in _sums(walk):
            yield f"mov.f32 upper_{name}, 0f00000000;"
    for i in range(4):
        yield from _two_floats(f"two{i}", walk.dtype)
        for x, y in (("f", "even_weight"), ("g", "odd_weight")):
            yield f"mul.f32 {y}, {x}, skip;"
        if walk.gated:
            yield from _two_floats(f"gated{i}", walk.dtype)
            yield from _silu("f")
            yield from _silu("g")
            yield "mov.f32 last, f;"
            for z, y in (("last", "even_weight"), ("g", "odd_weight")):
                yield from _add_to_sums(walk, y, z, "upper")
        yield ptx.round_two(f"two{i}", "even_weight", "odd_weight", walk.dtype)
    yield "@p st.global.v4.b32 [from], {two0, two1, two2, two3};"
    if walk.gated:
        for name in _sums(walk):
            yield from ptx.add_up(f"upper_{name}", 8)
        yield "and.b32 v, lane, 7;"
        yield "setp.eq.and.u32 p, v, 0, p;"
        yield from _at_sums(walk)
        if walk.scored:
            yield f"mul.f32 upper_relus, upper_relus, {ptx.float_literal(1 / HEAD_DIM)};"
        for name in _sums(walk):
            yield f"add.u64 from, {name}, offset;"
            yield f"@p st.global.f32 [from], upper_{name};"
    yield "add.u32 row, row, 16;"
    yield f"bra PADDING{which};"
    yield f"PADDED{which}:"
