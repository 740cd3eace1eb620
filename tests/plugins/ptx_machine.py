"""A small machine that runs the PTX of the kernels written by hand, on the CPU.

It knows the instructions that they use, as the PTX ISA 8.6 describes them: layouts of ``wgmma``,
``ldmatrix`` and ``stmatrix``, tensor maps and their patterns, barriers with transactions, named
barriers, clusters. It is strict where hardware may be lucky: a product reads its operands and
writes its sums only when it is waited for, a store of the tensor memory accelerator reads only when
it is waited for, and a load arrives only when nobody can go on without it, or, in one of the orders
in which warps run, at once. What comes too early or too late shows in the result. Fences are not
part of it: everybody sees every write at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

LANES = np.arange(32)
SHARED_AT = 4096  # where dynamic shared memory begins
CTA_AT = 1 << 24  # the block of a cluster in a shared address
WORD = np.uint64(0xFFFFFFFF)
ORDERS = ("forwards", "backwards", "starved")
PATIENCE = 100  # turns in which all warps stay where they are: loops end, waits do not


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit numbers as float32."""
    bits = np.asarray(bits).astype(np.uint16)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 rounded to the nearest 16-bit number, ties to even."""
    values = np.asarray(values, np.float32)
    if kind == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


class GlobalMemory:
    """Arrays at made-up addresses."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, np.ndarray]] = []
        self.next = 1 << 32

    def add(self, array: np.ndarray) -> int:
        """The address of an array, which is read and written in place."""
        address = self.next
        self.arrays.append((address, array.reshape(-1).view(np.uint8)))
        self.next += -(-array.nbytes // 4096) * 4096 + 4096
        return address

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view; an access outside of every array is an error."""
        for first, raw in self.arrays:
            if first <= address and address + size <= first + raw.size:
                assert address % min(size, 16) == 0, f"misaligned {address:#x}"
                return raw[address - first : address - first + size]
        raise AssertionError(f"no array holds {size} bytes at {address:#x}")


@dataclass
class Barrier:
    """An mbarrier: arrivals that are missing, bytes that are missing, finished phases."""

    count: int
    missing: int = field(init=False)
    bytes: int = 0
    phases: int = 0

    def __post_init__(self) -> None:
        self.missing = self.count

    def step(self, arrivals: int = 0, size: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += size
        assert self.missing >= 0, "more arrivals than the barrier was made for"
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.count
            self.phases += 1


@dataclass(frozen=True)
class Line:
    predicate: str | None
    negated: bool
    name: str
    operands: tuple[str, ...]


def parse(text: str) -> tuple[list[Line], dict[str, int]]:
    """The body's instructions, and where labels are."""
    lines, labels = [], {}
    for raw in text[text.index("{\n") + 2 : text.rindex("}")].splitlines():
        line = raw.strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif line and not line.startswith("."):
            guard, negated, name, rest = re.fullmatch(
                r"(?:@(?:(!)?(\w+)) )?(\S+?)(?: (.*))?;", line
            ).group(2, 1, 3, 4)
            operands = re.findall(r"\{[^}]*\}|\[[^\]{]*(?:\{[^}]*\})?[^\]]*\]|[^,\s]+", rest or "")
            lines.append(Line(guard, bool(negated), name, tuple(operands)))
    return lines, labels


class Block:
    """One block of threads: shared memory, barriers, tensor maps, warps."""

    def __init__(self, machine: Machine, index: tuple[int, int], rank: int, warps: int) -> None:
        self.machine, self.index, self.rank = machine, index, rank
        self.shared = np.full(machine.shared, 0xA5, np.uint8)  # nobody may rely on zeros
        self.barriers: dict[int, Barrier] = {}
        self.maps: dict[int, dict[str, object]] = {}
        self.warps = [Warp(self, i) for i in range(warps)]
        self.groups = [self.warps[i : i + 4] for i in range(0, warps, 4)]
        self.cluster: list[Block] = [self]

    def view(self, address: int, size: int, cluster: bool = False) -> np.ndarray:
        if cluster:
            return self.cluster[address // CTA_AT].view(address, size)
        assert address // CTA_AT == self.rank, "shared memory of another block"
        at = address % CTA_AT - SHARED_AT
        assert at >= 0 and at + size <= self.shared.size, f"outside of shared memory: {at}"
        return self.shared[at : at + size]


def scattered(address: np.ndarray, row_bytes: int = 128) -> np.ndarray:
    """The pattern of 128 or 64 bytes: units of 16 bytes changed by the bits from 7 on."""
    return address ^ (address >> 7 & row_bytes // 16 - 1) << 4


class Warp:
    """32 threads; those at the least line go first."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.pc = np.zeros(32, np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.predicates: dict[str, np.ndarray] = {}
        self.waiting: str | None = None
        self.lags = False  # has come to the cluster's barrier, and not gone on since
        # How often each thread came to the cluster's barrier, and how often it saw all there.
        self.arrived, self.passed = np.zeros(32, int), np.zeros(32, int)
        self.pending: list[list[tuple[str, ...]]] = []
        self.open: list[tuple[str, ...]] = []
        # Of the one thread that stores tiles: groups that are under way, and the next one.
        self.stores: list[list[Callable[[], None]]] = []
        self.open_stores: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        return bool((self.pc < 0).all())

    def get(self, operand: str) -> np.ndarray:
        """A register, or a number."""
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):
            return self.special(operand)
        if operand.startswith("0f"):
            value = np.uint32(int(operand[2:], 16)).view(np.float32)
            return np.full(32, value, np.float32)
        if operand == "memory":
            return np.full(32, SHARED_AT + self.block.rank * CTA_AT, np.uint64)
        return np.full(32, int(operand, 0) % (1 << 64), np.uint64)

    def special(self, name: str) -> np.ndarray:
        block, machine = self.block, self.block.machine
        values = {
            "%tid.x": 32 * self.index + LANES, "%ctaid.x": block.index[0],
            "%ctaid.z": block.index[1], "%nctaid.x": machine.grid[0],
            "%nctaid.z": machine.grid[1], "%cluster_ctarank": block.rank,
        }
        return np.broadcast_to(np.uint64(values[name]), 32).astype(np.uint64)

    def put(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros(32, value.dtype)
        self.registers[name] = np.where(active, value, old)

    def address(self, operand: str) -> np.ndarray:
        """Of "[register]" or "[register + offset]"."""
        found = re.fullmatch(r"\[(\w+)(?: \+ (\d+))?\]", operand)
        return self.get(found[1]) + np.uint64(int(found[2] or 0))

    def chosen(self, line: Line, active: np.ndarray) -> np.ndarray:
        """Those of the threads that the line's predicate lets take part."""
        if line.predicate is None:
            return active
        return active & (self.predicates[line.predicate] != line.negated)

    def run(self) -> bool:
        """Go on until the warp has to wait; whether it did anything."""
        moved = False
        while not self.done and self.waiting is None:
            at = int(self.pc[self.pc >= 0].min())
            line = self.block.machine.lines[at]
            active = self.pc == at
            chosen = self.chosen(line, active)
            if line.name == "bra":
                self.pc = np.where(active, at + 1, self.pc)
                self.pc = np.where(chosen, self.block.machine.labels[line.operands[0]], self.pc)
                if not chosen.any() or self.block.machine.labels[line.operands[0]] > at:
                    moved = True
                    continue
                return True  # others have their turn once round a loop
            self.pc = np.where(active, at + 1, self.pc)
            if chosen.any():
                execute(self, line, chosen)
            moved = True
            if line.name == "barrier.cluster.arrive":
                self.lags = True  # others may go on before what comes after it
                return True
        return moved


def execute(warp: Warp, line: Line, active: np.ndarray) -> None:
    """One instruction of the threads given."""
    name, ops = line.name, line.operands
    handler = HANDLERS.get(name.split(".")[0])
    if handler is None:
        raise NotImplementedError(f"{name} {ops}")
    handler(warp, name, ops, active)


def _signed(x: np.ndarray) -> np.ndarray:
    return (x & WORD).astype(np.uint32).view(np.int32).astype(np.int64)


def _width(name: str) -> np.uint64:
    return np.uint64(0xFFFFFFFFFFFFFFFF) if re.search(r"\.[bus]64", name) else WORD


INTEGERS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c, "div": lambda a, b: a // b, "rem": lambda a, b: a % b,
    "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "min": np.minimum, "max": np.maximum,
    "bfe": lambda a, b, c: a >> b & (np.uint64(1) << c) - np.uint64(1),
}
FLOATS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "max": np.fmax, "min": np.fmin, "abs": np.abs,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}


def arithmetic(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    kind = name.split(".")[0]
    if name == "and.pred":
        found = warp.predicates[ops[1]] & warp.predicates[ops[2]]
        warp.predicates[ops[0]] = np.where(active, found, warp.predicates[ops[0]])
        return None
    values = [warp.get(o) for o in ops[1:]]
    if name.endswith(".f32"):
        with np.errstate(all="ignore"):
            return warp.put(ops[0], FLOATS[kind](*values), active)
    if ".s32" in name and kind in ("min", "max"):
        found = INTEGERS[kind](*map(_signed, values)).astype(np.uint64)
        return warp.put(ops[0], found & WORD, active)
    with np.errstate(all="ignore"):  # threads that do not take part may divide by zero
        found = INTEGERS[kind](*values)
    wide = np.uint64(0xFFFFFFFFFFFFFFFF) if ".wide" in name else _width(name)
    return warp.put(ops[0], found & wide, active)


def move(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    if ops[0].startswith("{"):
        low, high = ops[0].strip("{}").split(", ")
        whole = warp.get(ops[1])
        warp.put(low, whole & np.uint64(0xFFFF), active)
        return warp.put(high, whole >> np.uint64(16), active)
    return warp.put(ops[0], warp.get(ops[1]), active)


def convert(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    if found := re.match(r"cvt\.rn\.(\w+)x2\.f32", name):
        high, low = (to_bits(warp.get(o), found[1]).astype(np.uint64) for o in ops[1:])
        return warp.put(ops[0], high << np.uint64(16) | low, active)
    if found := re.match(r"cvt\.f32\.(\w+)", name):
        return warp.put(ops[0], to_float(warp.get(ops[1]), found[1]), active)
    assert name == "cvt.u64.u32", name
    return warp.put(ops[0], warp.get(ops[1]) & WORD, active)


def shuffle(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """Every thread takes the number of another: whose lane differs by a mask, of so many before (or
    its own, where there is none), or of one for all."""
    kind, by = name.removeprefix("shfl.sync.").removesuffix(".b32"), int(ops[2])
    before = np.where(by <= LANES, LANES - by, LANES)
    others = {"bfly": LANES ^ by, "up": before, "idx": np.full(32, by)}
    assert ops[3:] == ("0" if kind == "up" else "31", "-1") and active.all()
    warp.put(ops[0], warp.get(ops[1])[others[kind]], active)


def root(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """One over the root, and one over."""
    with np.errstate(all="ignore"):
        x = warp.get(ops[1])
        warp.put(ops[0], np.float32(1) / (np.sqrt(x) if name.startswith("rsqrt") else x), active)


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "ge": np.greater_equal}


def compare(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    _, relation, *both, kind = name.split(".")
    a, b = (warp.get(o) & WORD for o in ops[1:3])
    if kind == "s32":
        a, b = _signed(a), _signed(b)
    old = warp.predicates.get(ops[0], np.zeros(32, bool))
    found = COMPARE[relation](a, b)
    if both:
        assert both == ["and"], name
        found = found & warp.predicates[ops[3]]
    warp.predicates[ops[0]] = np.where(active, found, old)


def select(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    a, b = warp.get(ops[1]), warp.get(ops[2])
    warp.put(ops[0], np.where(warp.predicates[ops[3]], a, b), active)


def exponent(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    with np.errstate(over="ignore", under="ignore"):
        warp.put(ops[0], np.exp2(warp.get(ops[1])), active)


def _typed(raw: np.ndarray, kind: str) -> list:
    if kind == "f32":
        return list(raw.view(np.float32))
    return [np.uint64(n) for n in raw.view({"b16": np.uint16}.get(kind, np.uint32))]


def load(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    kind = name.split(".")[-1]
    if ".param" in name:
        value = warp.block.machine.parameters[ops[1].strip("[]")]
        return warp.put(ops[0], np.full(32, value, np.uint64), active)
    targets = ops[0].strip("{}").split(", ")
    size = {"b16": 2}.get(kind, 4) * len(targets)
    addresses = warp.address(ops[1])
    far = ".shared::cluster" in name
    found = np.zeros((len(targets), 32), np.float32 if kind == "f32" else np.uint64)
    for lane in LANES[active]:
        raw = warp.block.view(int(addresses[lane]), size, far) if ".shared" in name else (
            warp.block.machine.memory.bytes_at(int(addresses[lane]), size))
        found[:, lane] = _typed(raw.copy(), kind)
    for target, values in zip(targets, found, strict=True):
        warp.put(target, values, active)


def store(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    sources = [warp.get(o) for o in ops[1].strip("{}").split(", ")]
    addresses = warp.address(ops[0])
    kind = np.float32 if name.endswith("f32") else np.uint32
    far = ".shared::cluster" in name
    for lane in LANES[active]:
        raw = np.array([s[lane] for s in sources]).astype(kind).view(np.uint8)
        place = warp.block.view(int(addresses[lane]), raw.size, far) if ".shared" in name else (
            warp.block.machine.memory.bytes_at(int(addresses[lane]), raw.size))
        place[:] = raw


def matrices(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """ldmatrix and stmatrix: eight threads give the rows of each 8 x 8 matrix."""
    assert active.all()
    loads = name.startswith("ldmatrix")
    registers = ops[0 if loads else 1].strip("{}").split(", ")
    addresses = warp.address(ops[1 if loads else 0])
    for m, register in enumerate(registers):
        rows = [warp.block.view(int(addresses[8 * m + r]), 16).view(np.uint16) for r in range(8)]
        i, j = LANES // 4, 2 * (LANES % 4)
        if not loads:
            value = warp.get(register)
            for lane in LANES:
                rows[i[lane]][j[lane]] = int(value[lane]) & 0xFFFF
                rows[i[lane]][j[lane] + 1] = int(value[lane]) >> 16
            continue
        tile = np.array(rows).astype(np.uint64)
        tile = tile.T if ".trans" in name else tile
        warp.put(register, tile[i, j] | tile[i, j + 1] << np.uint64(16), active)


def multiply(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """wgmma: fences and groups; products are kept until they are waited for."""
    assert active.all()
    if "mma_async" in name:
        # Descriptors are read at once, registers and shared memory whenever it suits.
        warp.open.append((name, *(
            hex(int(warp.get(o)[0])) if i in (1, 2) and not o.startswith("{") else o
            for i, o in enumerate(ops)
        )))
    elif "commit_group" in name:
        warp.pending.append(warp.open)
        warp.open = []
    elif "wait_group" in name:
        warp.waiting = f"products {ops[0]}"


def finish_products(group: list[Warp], left: int) -> None:
    """All but the last groups of products, of four warps that wait for them."""
    while len(group[0].pending) > left:
        for product, *others in zip(*(w.pending.pop(0) for w in group), strict=True):
            assert all(other == product for other in others)
            one_product(group, *product)


def one_product(group: list[Warp], name: str, *ops: str) -> None:
    """sums += left right, with the layouts of the PTX ISA."""
    columns, kind = re.search(r"m64n(\d+)k16\.f32\.(\w+)", name).groups()
    columns = int(columns)
    sums = ops[0].strip("{}").split(", ")
    assert len(sums) == columns // 2 and bool(group[0].predicates[ops[3]][0])
    lane = np.tile(LANES, 4)
    row = 16 * np.repeat(np.arange(4), 32) + lane // 4
    if ops[1].startswith("{"):
        left = np.zeros((64, 16), np.float32)
        for i, register in enumerate(ops[1].strip("{}").split(", ")):
            packed = np.concatenate([w.get(register) for w in group])
            at = row + 8 * (i % 2), 2 * (lane % 4) + 8 * (i // 2)
            left[at[0], at[1]] = to_float(packed & np.uint64(0xFFFF), kind)
            left[at[0], at[1] + 1] = to_float(packed >> np.uint64(16), kind)
        across = ops[6] == "1"
    else:
        assert ops[6] == "0"
        left = operand(group[0], ops[1], 64, False, kind)
        across = ops[7] == "1"
    right = operand(group[0], ops[2], columns, across, kind)
    product = left.astype(np.float64) @ right.astype(np.float64).T
    for i, register in enumerate(sums):
        eight, which = divmod(i, 4)
        values = product[row + 8 * (which // 2), 8 * eight + 2 * (lane % 4) + which % 2]
        for n, warp in enumerate(group):
            old = warp.registers[register]
            warp.registers[register] = (old + values[32 * n : 32 * n + 32]).astype(np.float32)


def operand(warp: Warp, descriptor: str, rows: int, across: bool, kind: str) -> np.ndarray:
    """[rows, 16] of shared memory by a descriptor, read along rows of 128 bytes or across them."""
    bits = int(descriptor, 0)
    assert bits >> 62 == 1, "the pattern of 128 bytes"
    first, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    r, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if across:
        offset = r // 64 * leading + k // 8 * stride + k % 8 * 128 + r % 64 * 2
    else:
        offset = r // 8 * stride + r % 8 * 128 + 2 * k
    at = scattered(first + offset) - SHARED_AT
    raw = warp.block.shared
    assert at.min() >= 0 and at.max() + 1 < raw.size
    return to_float(raw[at].astype(np.uint16) | raw[at + 1].astype(np.uint16) << 8, kind)


def synchronize(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """bar.sync, bar.warp.sync, barrier.cluster."""
    if name == "bar.warp.sync":
        return
    if name == "barrier.cluster.arrive":
        assert (warp.arrived == warp.passed)[active].all(), "arrives twice"
        warp.arrived += active
    elif name == "barrier.cluster.wait":
        assert (warp.arrived > warp.passed)[active].all(), "waits where it did not arrive"
        warp.passed += active
        warp.waiting = f"cluster {warp.passed[active].max()}"
    else:
        count = int(ops[1]) if len(ops) > 1 else 32 * len(warp.block.warps)
        warp.waiting = f"bar {ops[0]} {count}"


def mbarrier(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    block = warp.block
    for lane in LANES[active]:
        where = next(o for o in ops if o.startswith("["))
        rank, address = divmod(int(warp.address(where)[lane]), CTA_AT)
        assert rank == block.rank or "shared::cluster" in name, "a barrier of another block"
        if ".init" in name:
            block.view(address + rank * CTA_AT, 8)
            block.barriers[address] = Barrier(int(ops[1]))
        elif ".expect_tx" in name:
            block.barriers[address].bytes += int(ops[2])
            block.barriers[address].step(arrivals=1)
        elif ".arrive" in name:
            block.cluster[rank].barriers[address].step(arrivals=1)
        else:
            parity = int(warp.get(ops[2])[lane])
            ready = block.barriers[address].phases % 2 != parity
            old = warp.predicates.get(ops[0], np.zeros(32, bool)).copy()
            old[lane] = ready
            warp.predicates[ops[0]] = old


def map_address(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    assert name == "mapa.shared::cluster.u32"
    there = warp.get(ops[2])
    # Of threads that do not arrive anywhere the block does not exist.
    warp.put(ops[0], warp.get(ops[1]) % np.uint64(CTA_AT) + there * np.uint64(CTA_AT), active)


def tensor_map(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    block = warp.block
    lane = LANES[active][0]
    if "cp_fenceproxy" in name:
        source, target = (int(warp.address(o)[lane]) for o in (ops[1], ops[0]))
        assert target % 128 == 0 and (block.view(source, 128) == 0).all(), "made of zeros"
        block.machine.memory.bytes_at(target, 128)
        block.machine.maps[target] = dict(block.maps[source])
        return
    what = name.split(".")[3]
    made = block.maps.setdefault(int(warp.address(ops[0])[lane]), {})
    values = [int(warp.get(o)[lane]) for o in ops[1:]]
    made[(what, values[0]) if len(values) == 2 else what] = values[-1]


ELEMENTS = {6: "f16", 10: "bf16"}


class Matrix:
    """A tensor map, decoded."""

    def __init__(self, warp: Warp, address: int) -> None:
        made = warp.block.machine.maps[address]
        assert made["rank"] == 1 and made["elemtype"] in ELEMENTS
        assert made["interleave_layout"] == made["fill_mode"] == 0
        assert made["element_stride", 0] == made["element_stride", 1] == 1
        self.first, self.row_bytes = made["global_address"], made["global_stride", 0]
        assert self.first % 16 == self.row_bytes % 16 == 0
        self.columns, self.rows = made["global_dim", 0], made["global_dim", 1]
        self.box = made["box_dim", 0], made["box_dim", 1]
        self.pattern = 2 * self.box[0]
        assert made["swizzle_mode"] == {64: 2, 128: 3}[self.pattern]
        self.memory = warp.block.machine.memory

    def places(self, column: int, row: int, shared: int):
        """Pairs of a view of 16 bytes in memory, None outside of it, and the shared address."""
        for i in range(self.box[1]):
            for j in range(0, self.box[0], 8):
                at = int(scattered(np.int64(shared + i * self.pattern + 2 * j), self.pattern))
                inside = 0 <= row + i < self.rows and 0 <= column + j < self.columns
                where = self.first + (row + i) * self.row_bytes + 2 * (column + j)
                yield (self.memory.bytes_at(where, 16) if inside else None), at


def bulk(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """cp.async.bulk: tiles and plain bytes in, tiles out, and waiting for what goes out."""
    block = warp.block
    if "commit_group" in name:
        warp.stores.append(warp.open_stores)
        warp.open_stores = []
        return
    if "wait_group" in name:
        while len(warp.stores) > int(ops[0]):
            for go in warp.stores.pop(0):
                go()
        return
    (lane,) = LANES[active]
    if ".tensor" not in name:
        target, source, size, barrier = (
            int((warp.address(o) if o.startswith("[") else warp.get(o))[lane]) for o in ops
        )

        def arrive() -> None:
            block.view(target, size)[:] = block.machine.memory.bytes_at(source, size)
            block.barriers[barrier % CTA_AT].step(size=-size)

        block.machine.load(arrive)
        return
    map_register, column, row = re.search(
        r"\[(\w+), \{(\w+), (\w+)\}\]", next(o for o in ops if "{" in o)
    ).groups()
    matrix = Matrix(warp, int(warp.get(map_register)[lane]))
    column, row = (int(_signed(warp.get(r))[lane]) for r in (column, row))
    if ".global.shared::cta" in name:
        assert row >= 0 and column >= 0, "an illegal instruction on an H100"
        shared = int(warp.address(ops[1])[lane])

        def go() -> None:
            for place, at in matrix.places(column, row, shared):
                if place is not None:
                    place[:] = block.view(at, 16)

        warp.open_stores.append(go)
        return
    shared, barrier = int(warp.address(ops[0])[lane]), int(warp.address(ops[2])[lane])
    assert shared % 1024 == 0
    targets = block.cluster if ".multicast" in name else [block]
    if ".multicast" in name:
        assert int(warp.get(ops[3])[lane]) == (1 << len(targets)) - 1

    def deliver() -> None:
        for target in targets:
            for place, at in matrix.places(column, row, shared):
                here = at % CTA_AT + target.rank * CTA_AT
                target.view(here, 16)[:] = 0 if place is None else place
            target.barriers[barrier % CTA_AT].step(size=-2 * matrix.box[0] * matrix.box[1])

    block.machine.load(deliver)


def leave(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    warp.pc = np.where(active, -1, warp.pc)


def nothing(warp: Warp, name: str, ops: Sequence[str], active: np.ndarray) -> None:
    """Fences, and how registers are shared out."""


HANDLERS = {
    **dict.fromkeys(("add", "sub", "mul", "mad", "div", "rem", "shl", "shr", "and", "or", "xor",
                     "min", "max", "abs", "bfe", "fma"), arithmetic),
    "mov": move, "cvt": convert, "setp": compare, "selp": select, "ex2": exponent, "ld": load,
    "st": store, "ldmatrix": matrices, "stmatrix": matrices, "wgmma": multiply,
    "bar": synchronize, "barrier": synchronize, "mbarrier": mbarrier, "mapa": map_address,
    "shfl": shuffle, "rsqrt": root, "rcp": root, "tensormap": tensor_map, "cp": bulk,
    "ret": leave, "fence": nothing, "setmaxnreg": nothing,
}


class Machine:
    """Runs one launch.

    Args:
        ptx: a module of one entry.
        grid: blocks along x and z.
        shared: bytes of dynamic shared memory.
        memory: what addresses among the arguments mean.
        arguments: of the entry, in order.
        order: in which warps go on, one of ``ORDERS``: the first first, and loads arrive at once;
            the last first; or the first of all, which prepares for the others, and those that have
            come to a cluster's barrier, only when no other can.
    """

    def __init__(
        self, ptx: str, grid: tuple[int, int], shared: int, memory: GlobalMemory,
        arguments: Sequence[int], order: str = "forwards",
    ) -> None:
        self.order, self.loads = order, []
        self.lines, self.labels = parse(ptx)
        self.grid, self.shared, self.memory = grid, shared, memory
        self.maps: dict[int, dict] = {}
        head = ptx[: ptx.index("{\n")]
        names = re.findall(r"\.param [^,\n]*?(\w+),?$", head, flags=re.MULTILINE)
        self.parameters = dict(zip(names, arguments, strict=True))
        self.warps = int(re.search(r"\.reqntid (\d+)", head)[1]) // 32
        found = re.search(r"\.reqnctapercluster (\d+)", head)
        self.cluster = int(found[1]) if found else 1

    def load(self, deliver: Callable[[], None]) -> None:
        """What arrives as late as it may, or at once."""
        if self.order == "forwards":
            deliver()
        else:
            self.loads.append(deliver)

    def run(self) -> None:
        """All blocks; the clusters one after the other, their blocks side by side."""
        for z in range(self.grid[1]):
            for first in range(0, self.grid[0], self.cluster):
                blocks = [
                    Block(self, (first + i, z), i, self.warps) for i in range(self.cluster)
                ]
                for block in blocks:
                    block.cluster = blocks
                self.run_cluster(blocks)

    def run_cluster(self, blocks: list[Block]) -> None:
        idle = 0
        while not all(w.done for b in blocks for w in b.warps):
            before = [(w.pc.copy(), w.waiting) for b in blocks for w in b.warps]
            step = -1 if self.order == "backwards" else 1
            starves = self.order == "starved" and idle < 2
            for block in blocks[::step]:
                for warp in block.warps[::step]:
                    if not (starves and (warp.lags or warp is blocks[0].warps[0])):
                        warp.lags = False
                        warp.run()
                self.release(block)
            everyone = [w for b in blocks for w in b.warps]
            here = min(
                (int(w.arrived[w.pc >= 0].min()) for w in everyone if not w.done), default=0
            )
            for warp in everyone:
                if (warp.waiting or "").startswith("cluster ") and (
                    int(warp.waiting.split()[1]) <= here
                ):
                    warp.waiting = None
            after = [(w.pc, w.waiting) for b in blocks for w in b.warps]
            same = all(
                (old == new).all() and waited == waits
                for (old, waited), (new, waits) in zip(before, after, strict=True)
            )
            idle = idle + 1 if same else 0
            if idle > 1 and self.loads:
                self.loads.pop(0)()
                idle = 0
            assert idle < PATIENCE, "all wait for each other"
        for block in blocks:
            for warp in block.warps:
                assert not warp.open_stores and not warp.stores, "a block ends before its stores"
                assert not warp.open, "products of no group"
                assert (warp.arrived == warp.passed).all(), "a cluster's barrier is left open"
        assert not self.loads, "loads that nobody waited for"

    def release(self, block: Block) -> None:
        """Let warps go on whose barrier all have reached."""
        for name in {w.waiting for w in block.warps if (w.waiting or "").startswith("bar ")}:
            here = [w for w in block.warps if w.waiting == name]
            if 32 * len(here) == int(name.split()[2]):
                for warp in here:
                    warp.waiting = None
        for group in block.groups:
            if (group[0].waiting or "").startswith("products") and all(
                w.waiting == group[0].waiting for w in group
            ):
                finish_products(group, int(group[0].waiting.split()[1]))
                for warp in group:
                    warp.waiting = None


def straight(lines: Sequence[str], registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The registers of a warp after lines without jumps."""
    warp = Warp(None, 0)
    warp.registers = dict(registers)
    for line in parse("{\n" + "\n".join(lines) + "\n}")[0]:
        execute(warp, line, warp.chosen(line, np.ones(32, bool)))
    return warp.registers


def integers(lines: Sequence[str], registers: dict[str, int]) -> dict[str, int]:
    """The registers after straight lines of 32-bit integer arithmetic."""
    found = straight(lines, {name: np.full(32, n, np.uint64) for name, n in registers.items()})
    return {name: int(values[0]) for name, values in found.items()}


def check_fences(code: str) -> None:
    """What no machine without caches can tell: that the accelerator and the tensor cores see what
    threads wrote, and tensor maps are fetched anew."""
    lines = [line.strip() for line in code.splitlines()]
    pending = False
    for line in lines:
        pending = pending or line.startswith("stmatrix")
        if line.startswith("fence.proxy.async.shared::cta"):
            pending = False
        assert not (pending and line.startswith("bar.sync"))
    first = next(i for i, line in enumerate(lines) if ".tile" in line and "cp.async.bulk" in line)
    assert "fence.mbarrier_init.release.cluster;" in lines[:first]
    roles = code[code.index("bar.sync 0;") :].split("\tbra END;\n")  # each looks for itself
    used = [set(re.findall(r"cp\.async\.bulk\.tensor.*?\[(map_\w+)", role)) for role in roles]
    got = [set(re.findall(r"tensormap::generic\.acquire\.gpu \[(\w+)\]", role)) for role in roles]
    made = set(re.findall(r"tensormap\S*release\S* \[(\w+)\]", code))
    assert used == got and set().union(*got) == made
    for role in roles:
        if "acquire.gpu" in role:
            assert role.rindex("acquire.gpu") < role.index("cp.async.bulk.tensor")
    ready = False  # registers that threads wrote are fenced before a product takes them
    for line in lines:
        if line.startswith("wgmma.fence"):
            ready = True
        elif line.startswith(("mov.f32", "mul.f32 kept", "fma.rn.f32 sum")) or re.match(
            r"cvt\.rn\.\w+ (weighted|mixed)", line
        ):
            ready = False
        assert ready or "mma_async" not in line
