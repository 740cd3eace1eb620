"""What a launch is made for, and where things are in memory."""

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
QUAD_BYTES = 16 * ptx.GROUP_THREADS  # of four numbers of each thread of a group
STATE_BYTES = 4 * HEAD_DIM * STATES
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
        split: blocks that have a part each of one walk, side by side.
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
    split: int = 1

    @property
    def shares(self) -> bool:
        """A block has parts of several walks."""
        return self.walks != 2

    @property
    def cluster(self) -> int:
        """Blocks that are on the GPU together."""
        return 2 if self.shares else self.split

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
        return "until" if self.cluster > 1 else "chunks"

    @property
    def maps(self) -> int:
        """Of x, B and C, of results, and of z."""
        return 3 if self.gated else 2

    @property
    def columns(self) -> int:
        """Of x, B and C."""
        return self.heads * HEAD_DIM + 2 * self.groups * STATES

    @property
    def finishes(self) -> bool:
        """Another group gates results, while the one of a head goes on: where there is room for its
        registers."""
        return self.gated and self.together == 1

    @property
    def groups_of_warps(self) -> int:
        return 1 + self.together + self.finishes

    @property
    def threads(self) -> int:
        return ptx.GROUP_THREADS * self.groups_of_warps

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
    def done_at(self) -> int:
        """Barriers of stages that hold results: one for each."""
        return self.gates_at + (GATES * self.together if self.gated else 0)

    @property
    def totals_at(self) -> int:
        """Each head's decay over a piece, and the barrier of stages that are free again."""
        return self.done_at + (8 * STAGES if self.finishes else 0)

    @property
    def taken_at(self) -> int:
        return self.totals_at + 8

    @property
    def borrows(self) -> bool:
        """States that pieces exchange are in the place of stages."""
        return self.together > 1

    @property
    def exchange_at(self) -> int:
        """What a piece adds to each head's state, and the state that it begins with."""
        return 0 if self.borrows else 128 * cdiv(self.taken_at + 8, 128)

    @property
    def shared(self) -> int:
        if self.split == 1:
            return self.totals_at
        return self.taken_at + 8 if self.borrows else self.exchange_at + 2 * STATE_BYTES


def outputs(walk: Walk) -> tuple[str, ...]:
    """Names of what is written, in the entry's order."""
    more = ("squares",) * walk.gated + ("relus",) * walk.scored
    return ("y", *more, "state")


def quads(name: str, count: int) -> Iterator[tuple[int, str]]:
    """So many registers of a thread by fours, and where each four are from those before on: where
    the threads of a group lie side by side, none waits for another's bank."""
    for i in range(count // 4):
        yield QUAD_BYTES * i, ", ".join(f"{name}{4 * i + j}" for j in range(4))


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
