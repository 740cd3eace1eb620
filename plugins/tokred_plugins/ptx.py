"""Pieces of PTX for compute capability 9.0 that several kernels written by hand have in common.

Each is lines of text that use registers by fixed names; a kernel declares those of
:func:`common_registers`. Source: the PTX ISA, 8.6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

VERSION = "8.6"
# A row of a tile in shared memory is 128 bytes, the widest pattern in which it can be scattered
# over the banks: 64 numbers of 16 bits.
DEEP = 64
ROW_BYTES = 128
ROWS = 64  # of a product, that one group of four warps makes
GROUP_THREADS = 128
MAP_BYTES = 128  # of a tensor map
# Registers a thread: what asks for operands needs few, what multiplies many.
_REGISTERS, FEW_REGISTERS, _MOST_REGISTERS = 65536, 40, 232
_SWIZZLE = {64: 2, 128: 3}  # bytes of a row of a box -> its pattern
_ELEMENT = {"fp16": 6, "bf16": 10}  # in a tensor map
KIND = {"fp16": "f16", "bf16": "bf16"}  # in an instruction
LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"


def many_registers(groups: int) -> int:
    """Of each thread that multiplies, where there are so many groups of four warps of them."""
    left = _REGISTERS // GROUP_THREADS - FEW_REGISTERS
    return min(left // groups // 8 * 8, _MOST_REGISTERS)


def entry(
    name: str, parameters: Iterable[tuple[str, str]], threads: int, cluster: int,
    lines: Iterable[str],
) -> str:
    """A module of one entry, which takes Triton's two pointers last: scratch memory, and one that
    nothing reads.

    Args:
        name: of the entry, and before those of its parameters.
        parameters: name and "pointer" or "int" of each.
        threads: of a block, exactly.
        cluster: blocks along x that work together.
        lines: of the body; those that end in a colon are labels.
    """
    types = {"pointer": ".u64 .ptr .global .align 16", "int": ".u32"}
    declared = [f".param {types[kind]} {name}_{p}" for p, kind in parameters]
    declared += [f".param .u64 .ptr .global .align 128 {name}_scratch",
                 f".param .u64 .ptr .global .align 1 {name}_profile"]
    head = [
        f".version {VERSION}", ".target sm_90a", ".address_size 64",
        ".extern .shared .align 1024 .b8 memory[];",
        f".visible .entry {name}(", ",\n".join(declared), ")",
        f".reqntid {threads}", ".minnctapersm 1",
    ]
    if cluster > 1:
        head += [".explicitcluster", f".reqnctapercluster {cluster}, 1, 1"]
    body = [line if line.endswith(":") else f"\t{line}" for line in lines]
    return "\n".join([*head, "{", *body, "}"]) + "\n"


def roles(ask: Iterable[str], work: Iterable[Iterable[str]]) -> Iterator[str]:
    """What the first four warps do, who ask for operands, and each of the groups after them; all
    come to the label END.

    A piece of code for each group: addresses that differ by group would cost registers.
    """
    work = list(work)
    for group in reversed(range(len(work))):
        yield f"setp.ge.u32 p, thread, {GROUP_THREADS * (group + 1)};"
        yield f"@p bra GROUP{group};"
    yield from ask
    yield "bra END;"
    for group, lines in enumerate(work):
        yield f"GROUP{group}:"
        yield from lines
        yield "bra END;"
    yield "END:"


def common_registers() -> Iterator[str]:
    """What the pieces below use."""
    yield ".reg .pred p, q, always, leads;"
    yield (
        ".reg .b32 thread, lane, base, stage, parity, full, empty, bar, at, row, column, zero, "
        "one, t, u, v;"
    )
    yield ".reg .b64 wide, stride;"


def prepared(maps: Sequence[Iterable[str]], barriers: Iterable[str]) -> Iterator[str]:
    """Each of the first warps makes one tensor map, and the one after them the barriers: one warp
    would take a microsecond longer for three. All come to the label PREPARED; uses ``v``."""
    yield "shr.u32 v, thread, 5;"
    yield "setp.eq.u32 leads, lane, 0;"
    for i, lines in enumerate((*maps, barriers)):
        yield f"setp.ne.u32 p, v, {i};"
        yield f"@p bra NOT{i};"
        yield from lines
        yield "bra PREPARED;"
        yield f"NOT{i}:"
    yield "PREPARED:"


def acquire(*maps: str) -> Iterator[str]:
    """By the threads that use them, after all came together: maps that another warp made."""
    for there in maps:
        yield f"fence.proxy.tensormap::generic.acquire.gpu [{there}], {MAP_BYTES};"


def tensor_map(
    pointer: str, there: str, size: tuple[int | str, int | str], box: tuple[int, int],
    row_bytes: int, dtype: str,
) -> Iterator[str]:
    """By one warp: a matrix of ``size[1]`` rows of ``size[0]`` numbers, read or written in
    boxes; made in shared memory at ``at``, moved to where the accelerator looks for it.

    ``leads`` is true in one thread, ``zero`` and ``one`` are what they say.
    """
    replace, kind = "tensormap.replace.tile", "shared::cta.b1024"
    yield "shl.b32 t, lane, 2;"
    yield "add.u32 t, t, at;"
    yield "st.shared.b32 [t], zero;"
    yield "bar.warp.sync -1;"
    yield "cvt.u64.u32 wide, at;"
    yield f"@leads {replace}.global_address.{kind}.b64 [wide], {pointer};"
    yield f"@leads {replace}.rank.{kind}.b32 [wide], 1;"  # two dimensions
    for dimension in (0, 1):
        yield f"mov.u32 t, {box[dimension]};"
        yield f"@leads {replace}.box_dim.{kind}.b32 [wide], {dimension}, t;"
        yield f"mov.u32 t, {size[dimension]};"
        yield f"@leads {replace}.global_dim.{kind}.b32 [wide], {dimension}, t;"
        yield f"@leads {replace}.element_stride.{kind}.b32 [wide], {dimension}, one;"
    yield f"mov.u64 stride, {row_bytes};"
    yield f"@leads {replace}.global_stride.{kind}.b64 [wide], 0, stride;"
    yield f"@leads {replace}.elemtype.{kind}.b32 [wide], {_ELEMENT[dtype]};"
    yield f"@leads {replace}.interleave_layout.{kind}.b32 [wide], 0;"
    yield f"@leads {replace}.swizzle_mode.{kind}.b32 [wide], {_SWIZZLE[2 * box[0]]};"
    yield f"@leads {replace}.fill_mode.{kind}.b32 [wide], 0;"  # zeros
    yield "bar.warp.sync -1;"
    yield (
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
        f"[{there}], [wide], {MAP_BYTES};"
    )
    yield "bar.warp.sync -1;"


def barriers(stages: int, arrivals: int, fillers: int = 1) -> Iterator[str]:
    """By one warp: one for each stage that is full, and one for each that is empty; so many
    say the one and the other."""
    for stage in range(stages):
        yield f"@leads mbarrier.init.shared::cta.b64 [full + {8 * stage}], {fillers};"
        yield f"@leads mbarrier.init.shared::cta.b64 [empty + {8 * stage}], {arrivals};"
    yield "fence.mbarrier_init.release.cluster;"
    yield "bar.warp.sync -1;"


def wait(barrier: str, label: str, parity: str = "parity") -> Iterator[str]:
    """Until the barrier's phase of that parity is over."""
    yield f"{label}:"
    yield f"mbarrier.try_wait.parity.shared::cta.b64 q, [{barrier}], {parity};"
    yield f"@!q bra {label};"


def next_stage(stages: int) -> Iterator[str]:
    yield "add.u32 stage, stage, 1;"
    yield f"setp.eq.u32 q, stage, {stages};"
    yield "@q mov.u32 stage, 0;"
    yield "@q xor.b32 parity, parity, 1;"


def descriptor(register: str, address: str, across: int = 16) -> Iterator[str]:
    """Of an operand in shared memory for ``wgmma``, from an address in units of 16 bytes: rows of
    128 bytes in that pattern, 8 of them 1024 bytes, and ``across`` bytes from one column of such
    to the next where the operand is read across its rows."""
    yield f"cvt.u64.u32 {register}, {address};"
    constant = 1 << 62 | (1024 >> 4) << 32 | across >> 4 << 16
    yield f"or.b64 {register}, {register}, {constant:#x};"


def float_literal(value: float) -> str:
    """A float32 as PTX spells it."""
    return f"0f{struct.unpack('>I', struct.pack('>f', value))[0]:08X}"


def add_up(register: str, threads: int) -> Iterator[str]:
    """Every thread gets the sum over so many neighbours, a power of two; uses ``f``."""
    apart = 1
    while apart < threads:
        yield f"shfl.sync.bfly.b32 f, {register}, {apart}, 31, -1;"
        yield f"add.f32 {register}, {register}, f;"
        apart *= 2


def round_two(target: str, low: str, high: str, dtype: str) -> str:
    """Two float32 as a register of two 16-bit numbers."""
    return f"cvt.rn.{KIND[dtype]}x2.f32 {target}, {high}, {low};"
