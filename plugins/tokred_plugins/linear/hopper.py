"""The matrix product for compute capability 9.0 as PTX, written out: what Triton 3.6 cannot say.

One block of threads stays on each multiprocessor and does tile after tile. One of its warps only
asks the tensor memory accelerator for operands; one or two groups of four warps only multiply
(``wgmma``), and take registers that the first does not need. Results go through shared memory back
to the accelerator, while operands of the next tile come in. Tiles may be of widths that are no
powers of two. Two blocks may work together (a cluster) on tiles one above the other: each reads
half of the weights that both need, and the accelerator delivers it to both.

Rows may be scaled as a norm scales them: each thread adds up the squares of its rows while the
first products of a tile run, and multiplies what it has summed.

Sources: the PTX ISA, 8.6 (wgmma and its descriptors, cp.async.bulk.tensor, mbarrier,
tensormap.replace); the order of arrivals is that of CUTLASS's ``PipelineTmaAsync``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokred_plugins import ptx
from tokred_plugins.kernels import Call, Written
from tokred_plugins.ptx import DEEP, GROUP_THREADS, MAP_BYTES, ROW_BYTES, ROWS

MAPS = 3


@dataclass(frozen=True)
class Product:
    """y [rows, columns] = x [rows, inner] times weight [columns, inner] turned.

    Attributes:
        inner: numbers of a row of x and of the weight, a multiple of 8.
        columns: of y, a multiple of 8.
        dtype: fp16 or bf16, of all three.
        block_n: columns of a tile, a multiple of 32 up to 256.
        groups: of four warps that multiply.
        high: 64 rows that each group does of a tile: 1 or 2.
        stages: operand tiles in flight.
        blocks: of threads that work together: 1 or 2. They do a stack, so many tiles one above the
            other.
        tall: stacks down that are done before the next one across.
        programs: blocks of threads in all.
        parts: sums of squares that come with each row, by whose root mean square it is divided;
            0 leaves rows as they are.
        eps: what is added to the mean square.
    """

    inner: int
    columns: int
    dtype: str
    block_n: int
    groups: int
    high: int
    stages: int
    blocks: int
    tall: int
    programs: int
    parts: int = 0
    eps: float = 0.0

    @property
    def sums(self) -> int:
        """Numbers of a tile that a thread has."""
        return self.high * self.block_n // 2

    @property
    def at_once(self) -> int:
        """Sums of squares loaded before the first is used: as there are registers."""
        return 40 if self.sums <= 128 else 8

    @property
    def block_m(self) -> int:
        return ROWS * self.groups * self.high

    @property
    def threads(self) -> int:
        return GROUP_THREADS * (self.groups + 1)

    @property
    def x_bytes(self) -> int:
        """Of one stage of x."""
        return self.block_m * ROW_BYTES

    @property
    def weight_bytes(self) -> int:
        """Of one stage of the weight."""
        return self.block_n * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        return self.x_bytes + self.weight_bytes

    @property
    def out_at(self) -> int:
        """Where results begin: two pieces for each group."""
        return self.stages * self.stage_bytes

    @property
    def piece(self) -> int:
        """Columns of results that leave together."""
        return DEEP if self.block_n % DEEP == 0 else DEEP // 2

    @property
    def piece_row(self) -> int:
        """Bytes of one row of them."""
        return 2 * self.piece

    @property
    def piece_bytes(self) -> int:
        return ROWS * self.piece_row

    @property
    def barriers_at(self) -> int:
        """One for each stage that is full, then one for each that is empty."""
        return self.out_at + 2 * self.groups * self.piece_bytes

    @property
    def shared(self) -> int:
        return self.barriers_at + 16 * self.stages


def written(call: Call) -> Written:
    """The code of a launch of ``linear`` with clusters.

    Raises:
        ValueError: programs that are no whole clusters.
    """
    blocks, cluster = call.tactic.blocks, call.tactic.blocks["CLUSTER"]
    groups = call.tactic.num_warps // 4 - 1
    if blocks["PROGRAMS"] < cluster or blocks["PROGRAMS"] % cluster:
        raise ValueError(f"{blocks['PROGRAMS']} programs are no clusters of {cluster}")
    product = Product(
        inner=int(call.constants["K"]), columns=int(call.constants["N"]), dtype=call.inputs["x"],
        block_n=blocks["BLOCK_N"], groups=groups, high=blocks["BLOCK_M"] // (ROWS * groups),
        stages=call.tactic.num_stages, blocks=cluster, tall=blocks["GROUP"] // cluster,
        programs=blocks["PROGRAMS"], parts=int(call.constants["PARTS"]),
        eps=float(call.constants["EPS"]),
    )
    name = "linear_hopper"
    return Written(write(product, name), name, product.shared, MAPS * MAP_BYTES)


def write(product: Product, name: str) -> str:
    """The PTX of ``name(x, weight, length, y, scratch, profile)``, for sm_90a; where rows are
    scaled, ``squares`` comes after ``weight``.

    ``x`` has ``length`` rows for each block along z of the grid; those of the first do all rows.
    ``scratch`` is ``MAPS * 128`` bytes for each block, aligned to 128; ``profile`` is not read.
    """
    work = (_multiply(product, group) for group in range(product.groups))
    lines = [
        *_registers(product), *_prepare(product, name), *ptx.roles(_ask(product), work)
    ]
    if product.blocks > 1:
        # Shared memory stays until the other block has done with it.
        lines += ["barrier.cluster.arrive;", "barrier.cluster.wait;"]
    lines += ["ret;"]
    parameters = [(p, "pointer") for p in _inputs(product)]
    parameters += [("length", "int"), ("y", "pointer")]
    return ptx.entry(name, parameters, product.threads, product.blocks, lines)


def _inputs(product: Product) -> tuple[str, ...]:
    return ("x", "weight", "squares") if product.parts else ("x", "weight")


def _registers(product: Product) -> Iterator[str]:
    yield from ptx.common_registers()
    yield ".reg .pred signals;"
    yield ".reg .b32 rank, rows, stacks_m, stacks, stack, before, down, across, k, remote;"
    yield ".reg .b64 x, weight, y, scratch, map_x, map_w, map_y, desc_a, desc_low, desc_b;"
    yield f".reg .f32 sum<{product.sums}>;"
    yield ".reg .b32 two<4>, to<4>;"
    yield ".reg .b16 all;"
    if product.parts:
        yield ".reg .b64 squares, from;"
        yield f".reg .f32 scale<{2 * product.high}>, part<{product.at_once}>, f;"


def _prepare(product: Product, name: str) -> Iterator[str]:
    """Tensor maps, barriers, and how many tiles there are."""
    yield "mov.u32 t, %ctaid.z;"
    yield "setp.ne.u32 p, t, 0;"
    yield "@p ret;"
    for register in (*_inputs(product), "y", "scratch"):
        yield f"ld.param.u64 {register}, [{name}_{register}];"
    yield f"ld.param.u32 rows, [{name}_length];"
    yield "mov.u32 t, %nctaid.z;"
    yield "mul.lo.u32 rows, rows, t;"
    yield "mov.u32 thread, %tid.x;"
    yield "and.b32 lane, thread, 31;"
    yield "mov.u32 rank, 0;" if product.blocks == 1 else "mov.u32 rank, %cluster_ctarank;"
    yield "mov.u32 base, memory;"
    yield f"add.u32 full, base, {product.barriers_at};"
    yield f"add.u32 empty, full, {8 * product.stages};"
    yield "mov.u32 zero, 0;"
    yield "mov.u32 one, 1;"
    yield "mov.u32 t, %ctaid.x;"
    yield f"mul.wide.u32 wide, t, {MAPS * MAP_BYTES};"
    yield "add.u64 map_x, scratch, wide;"
    yield f"add.u64 map_w, map_x, {MAP_BYTES};"
    yield f"add.u64 map_y, map_w, {MAP_BYTES};"
    barriers = ptx.barriers(product.stages, product.groups * product.blocks)
    yield from ptx.prepared([*_maps(product)], barriers)
    if product.blocks > 1:
        yield "barrier.cluster.arrive;"
        yield "barrier.cluster.wait;"
    yield "bar.sync 0;"
    # Whole stacks: a tile below the last row is computed on zeros and not stored.
    high = product.blocks * product.block_m
    yield f"add.u32 stacks_m, rows, {high - 1};"
    yield f"div.u32 stacks_m, stacks_m, {high};"
    yield f"mul.lo.u32 stacks, stacks_m, {_tiles_n(product)};"
    yield "mov.u32 stack, %ctaid.x;"
    yield f"div.u32 stack, stack, {product.blocks};"


def _maps(product: Product) -> Iterator[list[str]]:
    narrow = product.block_n // product.blocks
    inner, columns = product.inner, product.columns
    for i, (pointer, there, size, box) in enumerate((
        ("x", "map_x", (inner, "rows"), (DEEP, product.block_m)),
        ("weight", "map_w", (inner, columns), (DEEP, narrow)),
        ("y", "map_y", (columns, "rows"), (product.piece, ROWS)),
    )):
        made = ptx.tensor_map(pointer, there, size, box, 2 * size[0], product.dtype)
        yield [f"add.u32 at, base, {product.out_at + i * MAP_BYTES};", *made]


def _tiles_n(product: Product) -> int:
    return -(-product.columns // product.block_n)


def _next_tile(product: Product) -> Iterator[str]:
    """``row`` and ``column`` of the tile of this block in ``stack``: ``tall`` stacks down before
    one across, so that blocks that work at the same time share operands."""
    across = _tiles_n(product)
    yield f"div.u32 t, stack, {product.tall * across};"
    yield f"mul.lo.u32 t, t, {product.tall};"  # the first stack down
    yield "sub.u32 u, stacks_m, t;"
    yield f"min.u32 u, u, {product.tall};"  # as many are here
    yield f"rem.u32 v, stack, {product.tall * across};"
    yield "div.u32 across, v, u;"
    yield "rem.u32 down, v, u;"
    yield "add.u32 down, down, t;"
    yield f"mad.lo.u32 down, down, {product.blocks}, rank;"
    yield f"mul.lo.u32 row, down, {product.block_m};"
    yield f"mul.lo.u32 column, across, {product.block_n};"


def _ask(product: Product) -> Iterator[str]:
    """The first warp's first thread asks for operands, as stages become empty."""
    yield f"setmaxnreg.dec.sync.aligned.u32 {ptx.FEW_REGISTERS};"
    yield "setp.ne.u32 p, thread, 0;"
    yield "@p bra END;"
    yield from ptx.acquire("map_x", "map_w")
    yield "mov.u32 stage, 0;"
    yield "mov.u32 parity, 1;"  # nothing was ever in a stage: that phase counts as over
    yield f"mov.u16 all, {(1 << product.blocks) - 1};"
    part = product.weight_bytes // product.blocks
    yield "ASK_TILE:"
    yield "setp.ge.u32 p, stack, stacks;"
    yield "@p bra END;"
    yield from _next_tile(product)
    yield f"mad.lo.u32 column, rank, {product.block_n // product.blocks}, column;"
    yield "mov.u32 k, 0;"
    yield "ASK:"
    yield "mad.lo.u32 bar, stage, 8, empty;"
    yield from ptx.wait("bar", "ASK_WAIT")
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {product.stage_bytes};"
    yield f"mad.lo.u32 at, stage, {product.stage_bytes}, base;"
    yield f"{ptx.LOAD} [at], [map_x, {{k, row}}], [bar];"
    yield f"add.u32 at, at, {product.x_bytes};"
    yield f"mad.lo.u32 at, rank, {part}, at;"
    if product.blocks > 1:
        yield f"{ptx.LOAD}.multicast::cluster [at], [map_w, {{k, column}}], [bar], all;"
    else:
        yield f"{ptx.LOAD} [at], [map_w, {{k, column}}], [bar];"
    yield from ptx.next_stage(product.stages)
    yield f"add.u32 k, k, {DEEP};"
    yield f"setp.lt.u32 p, k, {product.inner};"
    yield "@p bra ASK;"
    yield f"add.u32 stack, stack, {product.programs // product.blocks};"
    yield "bra ASK_TILE;"


def _multiply(product: Product, group: int) -> Iterator[str]:
    """One group of four warps: its rows of each tile."""
    first = ROWS * product.high * group  # row of a tile
    out = product.out_at + 2 * product.piece_bytes * group
    yield f"setmaxnreg.inc.sync.aligned.u32 {ptx.many_registers(product.groups)};"
    yield "and.b32 thread, thread, 127;"
    yield "setp.eq.u32 leads, thread, 0;"
    yield from ptx.acquire("map_y")
    if product.blocks > 1:
        yield f"setp.lt.u32 signals, thread, {product.blocks};"
    yield "setp.eq.u32 always, zero, 0;"
    # Where this thread's eight numbers of a row go in a piece of results: which row as stmatrix
    # takes them, which place in the row as the accelerator's pattern scatters them.
    yield "shr.u32 t, thread, 5;"
    yield "shl.b32 t, t, 4;"
    yield "and.b32 u, lane, 15;"
    yield "add.u32 t, t, u;"
    yield f"mad.lo.u32 t, t, {product.piece_row}, base;"
    yield "shr.u32 u, lane, 4;"
    # The pattern of 128 bytes: eight places, changed by the row. That of 64: four, by every other.
    yield "and.b32 v, lane, 7;" if product.piece == DEEP else "bfe.u32 v, lane, 1, 2;"
    for i in range(product.piece // 16):
        yield f"add.u32 to{i}, u, {2 * i};"
        yield f"xor.b32 to{i}, to{i}, v;"
        yield f"mad.lo.u32 to{i}, to{i}, 16, t;"
        yield f"add.u32 to{i}, to{i}, {out};"
    yield "mov.u32 stage, 0;"
    yield "mov.u32 parity, 0;"
    yield f"TILE{group}:"
    yield "setp.ge.u32 p, stack, stacks;"
    yield f"@p bra MULTIPLIED{group};"
    yield from _next_tile(product)
    yield f"add.u32 row, row, {first};"
    # The first product could begin the sums itself; but then ptxas 12.8 finds that they have no
    # value before, and lets all products wait for each other (its remark C7515).
    for i in range(product.sums):
        yield f"mov.f32 sum{i}, 0f00000000;"
    yield "mov.u32 k, 0;"
    yield f"STEP{group}:"
    yield "mad.lo.u32 bar, stage, 8, full;"
    yield from ptx.wait("bar", f"STEP_WAIT{group}")
    yield from _step(product, group)
    yield "wgmma.wait_group.sync.aligned 1;"
    yield "setp.ne.u32 q, k, 0;"
    yield f"@q bra DONE_BEFORE{group};"
    if product.parts:
        yield from _scales(product)
    yield f"bra NOT_YET{group};"
    yield f"DONE_BEFORE{group}:"
    yield from _release(product)
    yield f"NOT_YET{group}:"
    yield "mov.u32 before, stage;"
    yield from ptx.next_stage(product.stages)
    yield f"add.u32 k, k, {DEEP};"
    yield f"setp.lt.u32 p, k, {product.inner};"
    yield f"@p bra STEP{group};"
    yield "wgmma.wait_group.sync.aligned 0;"
    yield from _release(product)
    yield from _store(product, group + 1, out)
    yield f"add.u32 stack, stack, {product.programs // product.blocks};"
    yield f"bra TILE{group};"
    yield f"MULTIPLIED{group}:"
    yield "@leads cp.async.bulk.wait_group 0;"


def _step(product: Product, group: int) -> Iterator[str]:
    """Four products, 16 deep, of one stage."""
    high = product.high
    for descriptor, offset in (
        ("desc_a", ROWS * ROW_BYTES * high * group), ("desc_b", product.x_bytes)
    ):
        yield f"mad.lo.u32 at, stage, {product.stage_bytes}, base;"
        yield f"add.u32 at, at, {offset};"
        yield "shr.u32 at, at, 4;"
        yield from ptx.descriptor(descriptor, "at")
    yield "wgmma.fence.sync.aligned;"
    kind = ptx.KIND[product.dtype]
    shape = f"m{ROWS}n{product.block_n}k16"
    each = product.block_n // 2
    for part in range(DEEP // 16):
        if part:
            for descriptor in ("desc_a", "desc_b"):
                yield f"add.u64 {descriptor}, {descriptor}, {2 * 16 >> 4};"
        for i in range(high):
            sums = ", ".join(f"sum{each * i + j}" for j in range(each))
            rows = "desc_a"
            if i:
                rows = "desc_low"
                yield f"add.u64 desc_low, desc_a, {i * ROWS * ROW_BYTES >> 4};"
            yield (
                f"wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} "
                f"{{{sums}}}, {rows}, desc_b, always, 1, 1, 0, 0;"
            )
    yield "wgmma.commit_group.sync.aligned;"


def _scales(product: Product) -> Iterator[str]:
    """One over the root mean square of each of this thread's rows; the four threads that have a
    row in common add up a quarter each."""
    parts, rows = product.parts, 2 * product.high
    # Numbers of one load; four in a row are more registers than a large tile leaves.
    width = 4 if parts % 4 == 0 and product.sums <= 128 else 1
    yield "shr.u32 u, thread, 5;"
    yield "shr.u32 t, lane, 2;"
    yield "mad.lo.u32 t, u, 16, t;"  # the first of this thread's rows in the tile
    yield "add.u32 t, t, row;"
    yield "and.b32 v, lane, 3;"
    yield f"mul.lo.u32 v, v, {width};"
    for i in range(rows):
        yield f"mov.f32 scale{i}, 0f00000000;"
    loads = [(i, at) for i in range(rows) for at in range(0, parts, 4 * width)]
    together = product.at_once // width
    for first in range(0, len(loads), together):
        here = list(enumerate(loads[first : first + together]))
        for slot, (i, at) in here:
            yield f"add.u32 u, t, {ROWS * (i // 2) + 8 * (i % 2)};"
            yield "setp.lt.u32 p, u, rows;"
            if at + 4 * width > parts:
                yield f"setp.lt.and.u32 p, v, {parts - at}, p;"
            yield f"mad.lo.u32 u, u, {parts}, v;"
            yield "mul.wide.u32 from, u, 4;"
            yield "add.u64 from, from, squares;"
            found = [f"part{width * slot + k}" for k in range(width)]
            for part in found:
                yield f"mov.f32 {part}, 0f00000000;"
            vector = f".v4.f32 {{{', '.join(found)}}}" if width == 4 else f".f32 {found[0]}"
            yield f"@p ld.global{vector}, [from + {4 * at}];"
        for slot, (i, _) in here:
            for k in range(width):
                yield f"add.f32 scale{i}, scale{i}, part{width * slot + k};"
    for i in range(rows):
        scale = f"scale{i}"
        yield from ptx.add_up(scale, 4)
        yield f"mov.f32 f, {ptx.float_literal(product.eps)};"
        yield f"fma.rn.f32 {scale}, {scale}, {ptx.float_literal(1 / product.inner)}, f;"
        yield f"rsqrt.approx.ftz.f32 {scale}, {scale};"


def _release(product: Product) -> Iterator[str]:
    """Tell every block that delivers here that the stage ``before`` may be filled again."""
    yield "mad.lo.u32 bar, before, 8, empty;"
    if product.blocks == 1:
        yield "@leads mbarrier.arrive.shared::cta.b64 _, [bar];"
    else:
        # Nothing was written that the other block must see: a release at its scope would cost a
        # round trip to the L2 cache a step, half the speed.
        yield "mapa.shared::cluster.u32 remote, bar, thread;"
        yield "@signals mbarrier.arrive.shared::cluster.b64 _, [remote];"


def _store(product: Product, barrier: int, out: int) -> Iterator[str]:
    """Round, and hand a few columns at a time to the accelerator, from two places in turn."""
    pieces = product.block_n // product.piece
    for piece in range(product.high * pieces):
        i, column = divmod(piece, pieces)
        here = piece % 2 * product.piece_bytes
        # What was there before has left; where a tile has an odd number of pieces, its last one and
        # the first of the next are in the same place.
        yield f"@leads cp.async.bulk.wait_group.read {1 if piece else 0};"
        yield f"bar.sync {barrier}, {GROUP_THREADS};"
        for across in range(product.piece // 16):
            first = product.piece // 2 * piece + 8 * across
            if product.parts:
                for number in range(8):
                    total = f"sum{first + number}"
                    yield f"mul.f32 {total}, {total}, scale{2 * i + number // 2 % 2};"
            for j in range(4):
                low = first + 2 * j
                yield ptx.round_two(f"two{j}", f"sum{low}", f"sum{low + 1}", product.dtype)
            yield (
                f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [to{across} + {here}], "
                "{two0, two1, two2, two3};"
            )
        yield "fence.proxy.async.shared::cta;"
        yield f"bar.sync {barrier}, {GROUP_THREADS};"
        yield f"add.u32 t, base, {out + here};"
        yield f"add.u32 u, column, {product.piece * column};"
        yield f"add.u32 v, row, {ROWS * i};"
        yield f"@leads {ptx.STORE} [map_y, {{u, v}}], [t];"
        yield "@leads cp.async.bulk.commit_group;"
