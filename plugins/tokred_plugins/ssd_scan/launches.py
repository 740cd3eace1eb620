"""Which of the scan's kernels run, and how, for given shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tokred_plugins.aot import SHARED_LIMITS
from tokred_plugins.faces import MULTIPROCESSORS
from tokred_plugins.kernels import (
    PRECISION,
    Call,
    Constant,
    Kernel,
    Spec,
    Tactic,
    cdiv,
    choose,
    power_of_two,
)
from tokred_plugins.ssd_scan import hopper
from tokred_plugins.ssd_scan.kernel import ssd_scan_kernel, ssd_steps_kernel
from tokred_plugins.ssd_scan.parallel import (
    ssd_chunk_scan_kernel,
    ssd_chunk_state_kernel,
    ssd_pass_kernel,
)

# Bytes of shared memory that tiles of 128 rows take.
LARGE_TILES = 133_120

SSD_STEPS = Kernel(
    "ssd_steps", ssd_steps_kernel,
    ("zxbcdt", "dt_bias", "a_log", "pads"), ("length", "chunks"), ("steps",),
    tuple(Tactic({"BLOCK": block}, warps) for block, warps in ((16, 4), (32, 4), (16, 2), (8, 2))),
)
SSD_SCAN = Kernel(
    "ssd_scan", ssd_scan_kernel,
    ("xbc", "d", "pads", "initial_state", "steps"), ("length", "chunks"), ("y", "state"),
    tuple(
        Tactic({"Q": q, "HEADS": heads}, warps, stages)
        for q, heads, warps, stages in (
            (64, 1, 4, 3), (64, 1, 4, 2), (64, 2, 4, 2), (128, 1, 8, 2), (64, 1, 4, 1),
        )
    ),
)
WALKED = ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads")


def _walks(gated: bool) -> tuple[Tactic, ...]:
    """One or two heads; programs with walks of their own, programs that share some, and pieces."""
    ways = (*((walks, 1) for walks in (2, 3, 5)), *((2, split) for split in (2, 3, 4)))
    return tuple(
        Tactic(
            {"HEADS": heads, "WALKS": walks, "SPLIT": split},
            4 * (1 + heads + (gated and heads == 1)), hopper.STAGES, since=90, until=90, ptx=True,
        )
        for walks, split in ways for heads in (1, 2)
    )


SSD_SCAN_HOPPER = Kernel(
    "ssd_scan_hopper", None, WALKED, ("length", "chunks"), ("y", "state"), _walks(False),
    hopper.written,
)
SSD_SCAN_HOPPER_GATED = Kernel(
    "ssd_scan_hopper_gated", None, WALKED, ("length", "chunks"), ("gated", "squares", "state"),
    _walks(True), hopper.written,
)
SSD_SCAN_HOPPER_SCORED = Kernel(
    "ssd_scan_hopper_scored", None, WALKED, ("length", "chunks"),
    ("gated", "squares", "relus", "state"), _walks(True), hopper.written,
)
# Of H100, in what a chunk of one head takes (plain 1.4 us, gated 1.5; README.md): of so many heads
# walked together, plain and gated; what it adds to a state alone; what programs wait that have
# pieces of a walk; and, where programs share walks, how much longer those are.
CHUNK_TIME = {False: {1: 1.0, 2: 1.42}, True: {1: 1.0, 2: 1.6}}
ADD_TIME, EXCHANGE_TIME, SHARING = {1: 0.3, 2: 0.4}, {1: 5.5, 2: 6.5}, 1.03
# How any walk begins; Triton's chunks side by side, and of each chunk and head; a gated norm.
WALK_TIME, SIDE_BY_SIDE_TIME, SIDE_BY_SIDE_CHUNK_TIME, NORM_TIME = 2.5, 9.0, 0.016, 4.0
SSD_CHUNK_STATE = Kernel(
    "ssd_chunk_state", ssd_chunk_state_kernel,
    ("xbc", "zxbcdt", "dt_bias", "a_log", "pads"), ("length", "chunks"), ("steps", "added"),
    tuple(Tactic({}, warps) for warps in (4, 8)),
)
SSD_PASS = Kernel(
    "ssd_pass", ssd_pass_kernel,
    ("added", "steps", "initial_state"), ("chunks",), ("starts", "state"),
    tuple(
        Tactic({"BLOCK": block, "AHEAD": ahead}, warps)
        for block, ahead, warps in ((1024, 8, 4), (512, 16, 4), (512, 8, 4))
    ),
)
SSD_CHUNK_SCAN = Kernel(
    "ssd_chunk_scan", ssd_chunk_scan_kernel,
    ("xbc", "d", "pads", "initial_state", "steps", "starts"), ("length", "chunks"), ("y",),
    tuple(
        Tactic({"Q": q, "ROWS": rows, "HEADS": heads}, warps, stages)
        for q, rows, heads, warps, stages in (
            (128, 64, 3, 4, 2), (128, 64, 6, 4, 2), (128, 128, 3, 8, 3), (128, 128, 6, 8, 3),
            (64, 64, 1, 4, 1),
        )
    ),
)


def fitted(tactic: Tactic, heads_per_group: int) -> Tactic:
    """The tactic with as many heads a program as divide a group."""
    heads = math.gcd(tactic.blocks["HEADS"], heads_per_group)
    return Tactic({**tactic.blocks, "HEADS": heads}, tactic.num_warps, tactic.num_stages)


def calls(
    xbc: Spec, zxbcdt: Spec, dt_bias: Spec, a_log: Spec, d: Spec, pads: Spec,
    initial_state: Spec | None, n_groups: int, d_state: int, dt_min: float, dt_max: float,
    tactics: Mapping[str, Tactic] | None = None, segments: int | None = None,
    target: int | None = None, multiprocessors: int = MULTIPROCESSORS, scratch: bool = False,
    gated: bool = False, scored: bool = False,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.ssd_scan.op.ssd_scan`.

    Args:
        xbc, zxbcdt, dt_bias, a_log, d, pads, initial_state: the op's inputs.
        n_groups, d_state, dt_min, dt_max: the op's attributes.
        tactics: kernel name -> tactic, where not the default; the scan's decides the chunk.
        segments: 1 walks sequences and heads, more has all chunks run side by side; by default
            whichever is faster with the batch given here.
        target: compute capability times ten, for tactics that not every GPU has room for.
        multiprocessors: of the GPU, which programs should fill.
        scratch: whoever launches passes scratch memory: there is a kernel in PTX that wants it.
        gated: in place of y the kernel in PTX, if it is the one, writes ``gated`` [B, L, E], which
            is y silu(z) with z the first E columns of ``zxbcdt``, and ``squares`` [B, L, H] in
            float32: the sum of its squares over a head, before it is rounded. Rows of padding
            count as others do.
        scored: where ``gated`` is written, ``relus`` [B, L, H] in float32 too: the mean of
            max(0, y) over a head, before it is rounded. ``token_importance`` of it is that of y.

    Raises:
        ValueError: a sequence whose projection has 2^31 elements or more.
    """
    batch, length, channels = xbc.shape
    heads = dt_bias.shape[0]
    if length * zxbcdt.shape[2] >= 2**31:
        raise ValueError(
            f"a sequence of {length} tokens x {zxbcdt.shape[2]} columns is too long for the "
            "scan's 32-bit offsets; split it"
        )
    head_dim = (channels - 2 * n_groups * d_state) // heads
    shapes = _Shapes(
        batch, length, heads, head_dim, n_groups, d_state, zxbcdt.shape[2], xbc.dtype,
        multiprocessors,
    )
    dtypes = {
        "xbc": xbc.dtype, "zxbcdt": zxbcdt.dtype, "dt_bias": dt_bias.dtype,
        "a_log": a_log.dtype, "d": d.dtype, "pads": pads.dtype, "steps": "fp32",
        "added": "fp32", "starts": xbc.dtype,
    }
    if initial_state is not None:
        dtypes["initial_state"] = initial_state.dtype
    limits = {"DT_MIN": dt_min, "DT_MAX": dt_max}
    triton = "ssd_scan" in (tactics or {}) or initial_state is not None
    alike = zxbcdt.dtype == xbc.dtype
    in_ptx = scratch and target == 90 and not triton and alike and fits_ptx(shapes)
    gated = gated and zxbcdt.shape[2] % 8 == 0  # rows of z must begin at whole 16 bytes
    if segments is None:
        segments = 1 if walks_fill(shapes, in_ptx, gated) else 2
    if segments == 1 and in_ptx:
        return (_walk_in_ptx(shapes, dtypes, limits, tactics, gated, scored),)
    if segments == 1:
        return _walk(shapes, dtypes, limits, tactics)
    return _side_by_side(shapes, dtypes, limits, tactics, target)


@dataclass(frozen=True)
class _Shapes:
    """What the launches need of the tensors."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    states: int
    columns: int
    dtype: str
    multiprocessors: int

    @property
    def sizes(self) -> dict[str, Constant]:
        """Constants of the kernels with matrix products."""
        return {
            "H": self.heads, "P": self.head_dim, "G": self.groups, "N": self.states,
            "PRECISION": PRECISION[self.dtype],
            "BLOCK_P": power_of_two(self.head_dim, 16), "BLOCK_N": power_of_two(self.states, 16),
        }

    def per_chunk(self, chunks: int, dtype: str) -> Spec:
        """A state for each chunk."""
        shape = (self.batch, chunks, self.heads, self.head_dim, self.states)
        return Spec(shape, dtype)

    def steps(self, chunks: int, chunk: int) -> Spec:
        return Spec((self.batch, self.heads, chunks * chunk, 2), "fp32")

    @property
    def y(self) -> Spec:
        return Spec((self.batch, self.length, self.heads * self.head_dim), self.dtype)

    @property
    def per_head(self) -> Spec:
        """A number a token and head."""
        return Spec((self.batch, self.length, self.heads), "fp32")

    @property
    def state(self) -> Spec:
        return Spec((self.batch, self.heads, self.head_dim, self.states), "fp32")


def fits_ptx(s: _Shapes) -> bool:
    """Whether ``ssd_scan_hopper`` is made for these sizes."""
    return s.dtype != "fp32" and (s.head_dim, s.states) == (hopper.HEAD_DIM, hopper.STATES)


def walks_fill(s: _Shapes, in_ptx: bool, gated: bool) -> bool:
    """Whether walks are done before chunks side by side would be, and a gated norm after them."""
    if not in_ptx:  # where half of the GPU would idle
        return 2 * s.batch * s.heads >= s.multiprocessors
    walks = min(_time_of_walks(s, tactic, gated) for tactic in _ptx_tactics(s, SSD_SCAN_HOPPER))
    chunks = s.batch * s.heads * cdiv(s.length, hopper.CHUNK) * MULTIPROCESSORS / s.multiprocessors
    beside = SIDE_BY_SIDE_TIME + SIDE_BY_SIDE_CHUNK_TIME * chunks + NORM_TIME * gated
    return WALK_TIME + walks <= beside


def ptx_tactic(s: _Shapes, kernel: Kernel) -> Tactic:
    """Of ``ssd_scan_hopper``: the one that should be done first; of equals the first."""
    gated = "gated" in kernel.outputs
    return min(_ptx_tactics(s, kernel), key=lambda tactic: _time_of_walks(s, tactic, gated))


def _ptx_tactics(s: _Shapes, kernel: Kernel) -> list[Tactic]:
    return [t for t in kernel.tactics if walk_programs(s.heads, s.groups, t.blocks)]


def _time_of_walks(s: _Shapes, tactic: Tactic, gated: bool) -> float:
    """In chunks of one head, one after the other on a multiprocessor."""
    heads, walks, split = (tactic.blocks[name] for name in ("HEADS", "WALKS", "SPLIT"))
    programs = s.batch * walk_programs(s.heads, s.groups, tactic.blocks)
    # Programs of a cluster stay on neighbours, of which some are left over where they are many.
    blocks = 2 if walks > 2 else split
    whole = s.multiprocessors if blocks < 3 else s.multiprocessors * 9 // 10
    clusters = whole // blocks
    if not clusters:
        return math.inf
    rounds = cdiv(programs, clusters * blocks)
    chunks = cdiv(s.length, hopper.CHUNK)
    of_chunk = CHUNK_TIME[gated][heads]
    if split > 1:
        each = cdiv(chunks, split) * (of_chunk + ADD_TIME[heads]) + EXCHANGE_TIME[heads]
    else:
        each = chunks * of_chunk * (1 if walks == 2 else SHARING * walks / 2)
    return rounds * each


def walk_programs(heads: int, groups: int, blocks: Mapping[str, int]) -> int:
    """Programs of ``ssd_scan_hopper`` for one sequence; 0 where a tactic is not for it."""
    together, walks, split = (blocks[name] for name in ("HEADS", "WALKS", "SPLIT"))
    of_sequence = heads // together
    if heads // groups % together or not hopper.can_share(of_sequence, walks, split):
        return 0
    return of_sequence * split if walks == 2 else 2 * cdiv(of_sequence, walks)


def _walk(
    s: _Shapes, dtypes: Mapping[str, str], limits: Mapping[str, float],
    tactics: Mapping[str, Tactic] | None,
) -> tuple[Call, ...]:
    """One program a sequence and head."""
    programs = s.batch * s.heads
    if s.dtype == "fp32":  # its stages are twice as large
        default = SSD_SCAN.tactics[-1]
    else:  # three stages of loads, or two where one wave then holds all programs
        default = SSD_SCAN.tactics[s.multiprocessors < programs <= 2 * s.multiprocessors]
    scan = fitted(choose(SSD_SCAN, tactics, default), s.heads // s.groups)
    chunk = scan.blocks["Q"]
    chunks = cdiv(s.length, chunk)
    extras = {"length": s.length, "chunks": chunks}
    steps = choose(SSD_STEPS, tactics, SSD_STEPS.tactics[0])
    return (
        _call(
            SSD_STEPS, dtypes, extras, {"steps": s.steps(chunks, chunk)},
            {"H": s.heads, "Z": s.columns, "Q": chunk, **limits}, steps,
            (cdiv(s.heads, steps.blocks["BLOCK"]), chunks),
        ),
        _call(
            SSD_SCAN, dtypes, extras, {"y": s.y, "state": s.state}, s.sizes, scan,
            (s.heads // scan.blocks["HEADS"], 1),
        ),
    )


def _walk_in_ptx(
    s: _Shapes, dtypes: Mapping[str, str], limits: Mapping[str, float],
    tactics: Mapping[str, Tactic] | None, gated: bool, scored: bool,
) -> Call:
    """Walks of one or two heads of a sequence, by the kernel in PTX."""
    kernel, outputs = SSD_SCAN_HOPPER, {"y": s.y, "state": s.state}
    if gated:
        kernel = SSD_SCAN_HOPPER_SCORED if scored else SSD_SCAN_HOPPER_GATED
        sums = {"squares": s.per_head} | ({"relus": s.per_head} if scored else {})
        outputs = {"gated": s.y, **sums, "state": s.state}
    scan = choose(kernel, tactics, ptx_tactic(s, kernel))
    if not walk_programs(s.heads, s.groups, scan.blocks):
        scan = kernel.tactics[0]
    extras = {"length": s.length, "chunks": cdiv(s.length, hopper.CHUNK)}
    sizes = {**s.sizes, "Z": s.columns, **limits}
    grid = (walk_programs(s.heads, s.groups, scan.blocks), 1)
    return _call(kernel, dtypes, extras, outputs, sizes, scan, grid)


def chunk_scan_tactic(s: _Shapes, target: int | None) -> Tactic:
    """As few heads a program as one wave allows; large tiles where the target has room for them;
    small ones for float32, which needs twice the room."""
    if s.dtype == "fp32":
        return SSD_CHUNK_SCAN.tactics[-1]
    large = SHARED_LIMITS.get(target, 0) >= LARGE_TILES
    few, many = SSD_CHUNK_SCAN.tactics[2:4] if large else SSD_CHUNK_SCAN.tactics[:2]
    programs = s.batch * cdiv(s.heads, few.blocks["HEADS"]) * cdiv(s.length, few.blocks["Q"])
    return few if programs <= s.multiprocessors else many


def _side_by_side(
    s: _Shapes, dtypes: Mapping[str, str], limits: Mapping[str, float],
    tactics: Mapping[str, Tactic] | None, target: int | None,
) -> tuple[Call, ...]:
    """All chunks at once, their states handed on between two kernels."""
    scan = choose(SSD_CHUNK_SCAN, tactics, chunk_scan_tactic(s, target))
    scan = fitted(scan, s.heads // s.groups)
    added = choose(SSD_CHUNK_STATE, tactics, SSD_CHUNK_STATE.tactics[0])
    passing = choose(SSD_PASS, tactics, SSD_PASS.tactics[0])
    chunk = scan.blocks["Q"]
    chunks = cdiv(s.length, chunk)
    extras = {"length": s.length, "chunks": chunks}
    elements = s.head_dim * s.states
    return (
        _call(
            SSD_CHUNK_STATE, dtypes, extras,
            {"steps": s.steps(chunks, chunk), "added": s.per_chunk(chunks, "fp32")},
            {**s.sizes, "Z": s.columns, "Q": chunk, **limits}, added,
            (s.heads, chunks),
        ),
        _call(
            SSD_PASS, dtypes, extras,
            {"starts": s.per_chunk(chunks, s.dtype), "state": s.state},
            {"H": s.heads, "P": s.head_dim, "N": s.states, "Q": chunk}, passing,
            (s.heads, cdiv(elements, passing.blocks["BLOCK"])),
        ),
        _call(
            SSD_CHUNK_SCAN, dtypes, extras, {"y": s.y}, s.sizes, scan,
            (s.heads // scan.blocks["HEADS"], cdiv(s.length, scan.blocks["ROWS"])),
        ),
    )


def _call(
    kernel: Kernel, dtypes: Mapping[str, str], extras: Mapping[str, int],
    outputs: Mapping[str, Spec], constants: Mapping[str, Constant], tactic: Tactic,
    grid: tuple[int, int],
) -> Call:
    return Call(
        kernel=kernel,
        inputs={name: dtypes[name] for name in kernel.inputs if name in dtypes},
        extras={name: extras[name] for name in kernel.extras},
        outputs=outputs, constants=constants, tactic=tactic, grid=grid,
    )
