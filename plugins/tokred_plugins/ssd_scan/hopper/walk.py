"""What a launch is made for, where things are in shared memory, and what a block walks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tokred_plugins import ptx
from tokred_plugins.kernels import cdiv

CHUNK = 64
HEAD_DIM = 64
STATES = 128
STAGES = 3
TILE = 64 * ptx.ROW_BYTES  # bytes of 64 rows of 64 numbers
# Bytes of what is computed ahead, in float32: of each token dt and the running decay; dt by what is
# left of it at the chunk's end; and dt by what is left at token 16, 32 and 48, of those before.
PAIRS, ENDS, NEARS = CHUNK * 8, CHUNK * 4, CHUNK * 4 * 3
STEPS = PAIRS + ENDS + NEARS
GATES = 16  # bytes of a head's barriers for z
COPY = 2 * TILE  # bytes of the state, rounded: [P, N] in two tiles
INPUTS = ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads")


@dataclass(frozen=True)
class Walk:
    """One launch's constants.

    Attributes:
        heads: of a sequence.
        groups: of heads that share B and C.
        dtype: fp16 or bf16, of x, B, C and y.
        d_dtype: fp32, fp16 or bf16, of D.
        together: heads a block of threads walks: 1 or 2, of one group.
        packed: numbers of a row of the projection, which begins with z and ends with dt; a multiple
            of 8 where z is read.
        gated: the result is times silu(z), and its squares are summed up.
        dt_bias_dtype, a_log_dtype: fp32, fp16 or bf16.
        dt_min, dt_max: limits of dt.
        walks: of two blocks; 2 is one each, of an odd number both have halves of one.
        scored: gated, and what was positive before is summed up too.
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
        return 4 * TILE + self.together * TILE + 1024 * cdiv(self.together * STEPS, 1024)

    @property
    def copies_at(self) -> int:
        return STAGES * self.stage_bytes

    @property
    def out_at(self) -> int:
        return self.copies_at + self.together * COPY

    @property
    def places(self) -> int:
        """Tiles from which the results of a head leave, in turn."""
        return 2 if self.gated else 1

    @property
    def barriers_at(self) -> int:
        return self.out_at + self.together * self.places * TILE

    @property
    def gates_at(self) -> int:
        """Barriers for z: two of each head."""
        return self.barriers_at + 16 * STAGES

    @property
    def shared(self) -> int:
        return self.gates_at + (GATES * self.together if self.gated else 0)


def can_share(of_sequence: int, walks: int) -> bool:
    """Whether pairs of blocks can have so many of a sequence's walks: 2, which is one each, or an
    odd number of which every block gets as many whole ones as any other."""
    if walks == 2:
        return True
    return walks % 2 == 1 and walks > 2 and (walks - 1) * cdiv(of_sequence, walks) <= of_sequence


def outputs(walk: Walk) -> tuple[str, ...]:
    """Names of what is written, in the entry's order."""
    more = ("squares",) * walk.gated + ("relus",) * walk.scored
    return ("y", *more, "state")


def parts(walk: Walk, label: str) -> Iterator[str]:
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


def next_part(walk: Walk, label: str) -> Iterator[str]:
    """To the label of :func:`parts`, where there is another."""
    if walk.shares:
        yield "add.u32 index, index, 1;"
        yield "setp.lt.u32 p, index, parts;"
        yield f"@p bra {label};"


def of_head(register: str, pointer: str, dtype: str) -> Iterator[str]:
    """A number of this head, as float32."""
    yield f"mul.wide.u32 offset, head, {4 if dtype == 'fp32' else 2};"
    yield f"add.u64 from, {pointer}, offset;"
    if dtype == "fp32":
        yield f"ld.global.f32 {register}, [from];"
    else:
        yield "ld.global.b16 half, [from];"
        yield f"cvt.f32.{ptx.KIND[dtype]} {register}, half;"


def two_floats(register: str, dtype: str) -> Iterator[str]:
    """``f`` and ``g``: the low and the high half of a register of two numbers."""
    yield f"mov.b32 {{half, other}}, {register};"
    yield f"cvt.f32.{ptx.KIND[dtype]} f, half;"
    yield f"cvt.f32.{ptx.KIND[dtype]} g, other;"
