"""The walk written in PTX: by the assembler, and run by a machine that knows the instructions.

``test_aot_launch.py`` launches it on the GPU that it is for.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine import (
    ORDERS,
    GlobalMemory,
    Machine,
    check_fences,
    integers,
    straight,
    to_float,
)

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from tokred_plugins.aot import SHARED_LIMITS, DoesNotFit, compile_call
from tokred_plugins.kernels import Spec, _modules_of, cdiv
from tokred_plugins.retune import candidates
from tokred_plugins.ssd_scan import hopper, launches
from tokred_plugins.ssd_scan.hopper.ask import softplus
from tokred_plugins.ssd_scan.hopper.gate import silu
from tokred_plugins.ssd_scan.hopper.parts import parts
from tokred_plugins.ssd_scan.reference import ssd_scan_reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FREE = 0.0, 1e9  # what dt is clamped to
KINDS = {"fp16": "f16", "bf16": "bf16"}
FORMS = {"plain": {}, "gated": {"gated": True}, "scored": {"gated": True, "scored": True}}
KERNELS = {"plain": "ssd_scan_hopper", "gated": "ssd_scan_hopper_gated",
           "scored": "ssd_scan_hopper_scored"}


def calls(batch=1, length=200, heads=80, groups=1, states=128, dtype="fp16", **options):
    """The launches where scratch memory is passed, on compute capability 9.0 if not told."""
    columns = heads * 64 + 2 * groups * states
    head = Spec((heads,), "fp32")
    given = {"target": 90, "scratch": True, **options}
    initial, packed = given.pop("initial", None), given.pop("packed", dtype)
    return launches.calls(
        Spec((batch, length, columns), dtype),
        Spec((batch, length, heads * 64 + columns + heads), packed), head, head, head,
        Spec((batch,), "i32"), initial, groups, states, 0.0, 1e9, **given,
    )


@pytest.mark.parametrize("d_dtype", ["fp32", "16 bit"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("walks", "split"), [(2, 1), (5, 1), (2, 3), (2, 4)])
def test_the_assembler_takes_it(walks, split, form, together, dtype, d_dtype, tmp_path):
    """No spills, and none of the remarks by which it says that products wait for each other."""
    from triton import knobs

    d_dtype = dtype if d_dtype == "16 bit" else d_dtype
    walk = hopper.Walk(
        24, 1, dtype, d_dtype, together, 3352, dt_bias_dtype=d_dtype, a_log_dtype=d_dtype,
        walks=walks, split=split, **FORMS[form],
    )
    source = tmp_path / "kernel.ptx"
    source.write_text(hopper.write(walk, "k"))
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", f"{source}.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
    assert not re.search(r"warning|C75\d\d|serializ", done.stderr), done.stderr


# Batch, heads, tokens, whether gated (None: either), then heads and walks of a program (or two that
# share them), pieces, and programs of a sequence.
LAUNCHED = [
    (1, 80, 200, None, 1, 2, 1, 80), (8, 16, 200, None, 1, 2, 1, 16),
    (3, 40, 200, None, 1, 2, 1, 40), (8, 24, 200, False, 2, 2, 1, 12),
    # 320 walks of two heads on 132 multiprocessors: two and a half each, not three.
    (8, 80, 200, None, 2, 5, 1, 16), (8, 48, 200, None, 2, 3, 1, 16),
    (4, 80, 200, None, 2, 3, 1, 28),
    # One head with a group that finishes is nearer to two heads without.
    (8, 24, 200, True, 1, 3, 1, 16), (2, 80, 2048, True, 1, 3, 1, 54),
    # Few heads, many chunks: pieces, as many as leave no cluster to wait for another.
    (1, 24, 2048, None, 1, 2, 4, 96), (1, 32, 2048, None, 1, 2, 3, 96),
    (1, 48, 2048, None, 2, 2, 4, 96), (1, 64, 2048, None, 1, 2, 2, 128),
    (1, 24, 128, None, 1, 2, 1, 24),
]


@pytest.mark.parametrize(
    ("form", "batch", "heads", "length", "together", "walks", "split", "programs"),
    [(form, *case[:3], *case[4:]) for case in LAUNCHED for form in FORMS
     if case[3] in (None, form != "plain")],
)
def test_which_is_launched(form, batch, heads, length, together, walks, split, programs):
    """One head a program where that fills the GPU or two would leave it idle; a group's heads
    in pairs; programs share walks where that leaves fewer idle, or have pieces of one."""
    (scan,) = calls(batch, length, heads=heads, **FORMS[form])
    assert scan.kernel.name == KERNELS[form]
    assert scan.tactic.blocks == {"HEADS": together, "WALKS": walks, "SPLIT": split}
    assert scan.grid == (programs, 1)
    compiled = compile_call(scan, 90)
    assert compiled.block == 32 * scan.tactic.num_warps and compiled.shared <= SHARED_LIMITS[90]
    assert compiled.scratch == (256 if form == "plain" else 384) and compiled.hidden == 1
    for target in (89, 100):
        with pytest.raises(DoesNotFit, match=r"compute capability 9\.0, not"):
            compile_call(scan, target)


def test_heads_of_a_group():
    """A tactic asked for that would take heads of two groups is not taken, nor compiled."""
    asked = {"ssd_scan_hopper": launches.SSD_SCAN_HOPPER.tactics[1]}
    (scan,) = calls(heads=75, tactics=asked)
    assert scan.tactic.blocks == {"HEADS": 1, "WALKS": 2, "SPLIT": 1} and scan.grid == (75, 1)
    with pytest.raises(ValueError, match="2 heads walked together do not divide a group of 75"):
        compile_call(replace(scan, tactic=asked["ssd_scan_hopper"]), 90)


@pytest.mark.parametrize(
    ("heads", "walks", "split"), [(80, 4, 1), (80, 1, 1), (6, 5, 1), (80, 3, 2)]
)
def test_walks_that_nobody_can_share(heads, walks, split):
    """Four are two each; of one there is no half before another; of two pairs with five walks of
    six one block would have none; and pieces of walks are not shared."""
    (scan,) = calls(heads=heads, segments=1)
    tactic = replace(scan.tactic, blocks={"HEADS": 1, "WALKS": walks, "SPLIT": split})
    assert launches.walk_programs(heads, 1, tactic.blocks) == 0
    with pytest.raises(ValueError, match=f"cannot share {walks} of {heads} walks"):
        compile_call(replace(scan, tactic=tactic), 90)


@pytest.mark.parametrize(("chunks", "first"), [(32, 0), (10, 3), (3, 0), (3, 2), (5, 5)])
@pytest.mark.parametrize("split", [2, 3, 4])
def test_every_chunk_is_in_one_piece(split, chunks, first):
    """Twice, but for the last block, of whose chunks only results are wanted."""
    walk = hopper.Walk(6, 2, "fp16", "fp32", 1, 48, split=split)
    for head in range(6):
        seen = []
        for rank in range(split):
            lines = [
                line if line != "mov.u32 t, %ctaid.x;" else f"mov.u32 t, {head * split + rank};"
                for line in [*parts(walk, "PART")][2:]
            ]
            given = {"rank": rank, "first": first, "chunks": chunks}
            adds, writes = (integers(lines, {**given, "index": index}) for index in (0, 1))
            assert writes["parts"] == 2 and writes["head"] == head and writes["group"] == head // 3
            expected = writes["chunk"] if rank == split - 1 else writes["until"]
            assert (adds["chunk"], adds["until"]) == (writes["chunk"], expected)
            seen += range(writes["chunk"], writes["until"])
            assert writes["until"] - writes["chunk"] <= cdiv(chunks - first, split)
        assert seen == [*range(first, chunks)]


@pytest.mark.parametrize(
    ("batch", "heads", "length", "gated", "kernel"),
    [(1, 24, 2048, False, "ssd_scan_hopper"), (1, 24, 64, False, "ssd_scan_hopper"),
     (1, 8, 2048, False, "ssd_chunk_state"), (1, 8, 8192, True, "ssd_chunk_state"),
     (1, 8, 512, True, "ssd_scan_hopper_gated"), (8, 8, 8192, False, "ssd_scan_hopper")],
)
def test_walks_or_chunks_side_by_side(batch, heads, length, gated, kernel):
    """Side by side where a few heads' chunks are many; not where a norm would come after it."""
    assert calls(batch, length, heads=heads, gated=gated)[0].kernel.name == kernel


@given(
    batch=st.integers(1, 40), per_group=st.integers(1, 90), groups=st.integers(1, 4),
    length=st.integers(1, 40_000), multiprocessors=st.integers(1, 160),
    form=st.sampled_from(sorted(FORMS)),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_has_a_launch(batch, per_group, groups, length, multiprocessors, form):
    """Whose grid its tuning agrees with, whose code is written, and which fits the GPU."""
    heads = per_group * groups
    made = calls(
        batch, length, heads, groups, multiprocessors=multiprocessors, **FORMS[form]
    )
    for call in made:
        assert candidates(call)[0] == call
        if call.tactic.ptx:
            written = hopper.written(call)
            assert written.shared <= SHARED_LIMITS[90]
            assert f".reqntid {32 * call.tactic.num_warps}" in written.ptx
            cluster = re.search(r"reqnctapercluster (\d+)", written.ptx)
            assert cluster is None or call.grid[0] % int(cluster[1]) == 0


def test_which_pieces_a_smaller_gpu_takes():
    """Clusters that do not run at the same time take twice as long; one is always possible."""
    sizes = (132, 66, 16, 2, 1)
    found = [calls(1, 2048, heads=24, multiprocessors=n)[0].tactic.blocks for n in sizes]
    assert [(b["HEADS"], b["SPLIT"]) for b in found] == [(1, 4), (2, 4), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("heads", range(1, 41))
@pytest.mark.parametrize("walks", [3, 5])
def test_every_part_is_walked_once(heads, walks):
    """By one block, or its halves by two that are a cluster, the first half long before."""
    pairs, each = cdiv(heads, walks), walks // 2
    last = (2 * (each - 1) + 1) * pairs + pairs - 1  # the last whole walk of the last block
    assert hopper.can_share(heads, walks) == (last < heads)
    if last >= heads:
        return
    walk = hopper.Walk(heads, 1, "fp16", "fp32", 1, 8 * heads, walks=walks)
    lines = [*parts(walk, "PART")][2:]
    seen, most = [], 0
    for block in range(launches.walk_programs(heads, 1, {"HEADS": 1, "WALKS": walks, "SPLIT": 1})):
        first = [n if n != "mov.u32 t, %ctaid.x;" else f"mov.u32 t, {block};" for n in lines]
        given = {"rank": block % 2, "zero": 0, "one": 1, "first": 3, "chunks": 10}
        index, count = 0, 1
        while index < count:
            found = integers(first, {**given, "index": index})
            count = found["parts"]
            half = found["turn"]
            assert (half == 1) <= (index == 0) and (half == 2) <= (index == count - 1)
            expected = {0: (3, 10), 1: (3, 6), 2: (6, 10)}[half]
            assert (found["chunk"], found["until"]) == expected
            assert half == 0 or half == block % 2 + 1
            seen.append((found["head"], half, block // 2 if half else 0))
            index += 1
        most = max(most, count)
    assert len(seen) == len(set(seen)) and most <= walks // 2 + 1
    whole = {head for head, half, _ in seen if not half}
    first, second = ({(h, pair) for h, half, pair in seen if half == n} for n in (1, 2))
    assert first == second and not whole & {h for h, _ in first}
    assert whole | {h for h, _ in first} == set(range(heads))


def test_fences():
    """Before what threads wrote is read by others than threads."""
    for heads, gated, split in (
        (2, False, 1), (1, True, 4), (2, True, 4), (1, False, 2), (2, True, 1)
    ):
        walk = hopper.Walk(24, 1, "fp16", "fp32", heads, 3352, gated, split=split)
        code = hopper.write(walk, "k")
        check_fences(code)
    # Nor is z asked for into a place from which results are still read.
    end = code[code.index("wait_group.read 0") :]
    assert end.index("bar.sync") < end.index("[map_z")
    # Tiles of z come where threads made the tensor maps.
    made = code[code.index("tensormap.cp_fenceproxy") : code.index("PREPARED:")]
    assert made.count("fence.proxy.async.shared::cta;") == made.count("cp_fenceproxy") == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "other",
    [{"scratch": False}, {"target": 100}, {"target": None}, {"dtype": "fp32"}, {"states": 64},
     {"initial": Spec((1, 80, 64, 128), "fp32")},
     {"tactics": {"ssd_scan": launches.SSD_SCAN.tactics[0]}}, {"packed": "fp32"}],
    ids="-".join,
)
def test_where_triton_s_is_launched(other, form):
    """What the PTX does not do, and where nobody passes scratch memory; it does not gate."""
    made = calls(segments=1, **FORMS[form], **other)
    assert [c.kernel.name for c in made] == ["ssd_steps", "ssd_scan"]
    assert list(made[1].outputs) == ["y", "state"]


def test_rows_of_z_that_are_no_whole_16_bytes():
    """The accelerator reads none such: 75 heads are not gated."""
    for form in ("gated", "scored"):
        names = [calls(segments=1, heads=heads, **FORMS[form])[0].kernel.name for heads in (75, 72)]
        assert names == ["ssd_scan_hopper", KERNELS[form]]
    # Nor is a norm counted as saved.
    assert calls(8, 512, heads=1, gated=True) == calls(8, 512, heads=1)
    assert calls(8, 512, heads=1)[0].kernel.name == "ssd_chunk_state"


@pytest.mark.parametrize("form", FORMS)
def test_parameters(form):
    """The entry takes what the kernel says, in its order."""
    (scan,) = calls(batch=8, **FORMS[form])
    compiled = compile_call(scan, 90)
    names = re.findall(rf"\.param [^,\n]*?{compiled.entry}_(\w+)", compiled.ptx)
    kernel = scan.kernel
    before = [*kernel.inputs, *kernel.extras]
    assert names[: len(before)] == before
    written = [{"gated": "y"}.get(name, name) for name in kernel.outputs]
    assert names[len(before) :] == [*written, "scratch"]


def test_all_of_the_code_counts():
    """What tactics are kept under changes with every file that the code is written by."""
    files = Path(hopper.__file__).parent.glob("*.py")
    found = {Path(module.__file__) for module in _modules_of(hopper.written)}
    assert found == set(files) and len(found) > 2


def test_silu():
    """Of all that 16 bits hold: also where exp(-z) is infinite, or next to it."""
    z = np.float32([*np.linspace(-90, 90, 721), -65504, 65504, -87.5, -88.5, -1e4, 1e4, 0.0])
    for row in np.resize(z, (23, 32)):
        found = straight([*silu("f")], {"f": row})["f"]
        wide = row.astype(float)
        expected = wide / (1 + np.exp(np.minimum(-wide, 700)))
        # Two exponentials' worth of roundings: 2^-24 of |z| log2(e), and what 1 / x is off.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-36)


def test_softplus():
    """Of all that a projection may say: as near as float32 is, also where dt is next to nothing."""
    for x in np.float32([*np.linspace(-80, 80, 641), -1e-3, 1e-3, -1e-6, 0.0]).reshape(-1, 5):
        given = np.resize(x, 32)
        found = straight([*softplus("dt0", "raw0")], {"raw0": given})["dt0"]
        expected = np.logaddexp(0, given.astype(float))
        # An exponent's rounding is 2^-24 of it.
        np.testing.assert_allclose(found, expected, rtol=1e-7 * abs(given).max() + 4e-7)


def bits(tensor):
    """A tensor as numpy: 16-bit floats as they are stored."""
    return tensor.numpy() if tensor.element_size() > 2 else (
        tensor.view(torch.int16).numpy().view(np.uint16)
    )


@pytest.mark.parametrize(
    "length, heads, groups, pads, together, dtype, d_dtype, limits, walks, sums",
    [
        (64, 2, 1, [0], 1, "fp16", "fp32", FREE, 2, 2),
        (130, 2, 1, [0], 2, "fp16", "fp16", FREE, 2, 1),
        (150, 4, 2, [37, 129], 2, "bf16", "bf16", FREE, 2, 2),
        (270, 2, 2, [64, 3], 1, "bf16", "fp32", (0.01, 0.5), 2, 1),
        (65, 2, 1, [65, 64], 2, "fp16", "fp32", FREE, 2, 2),
        (1, 2, 1, [0, 1], 1, "fp16", "fp32", FREE, 2, 1),
        (70, 2, 1, [90, -5], 1, "fp16", "fp32", FREE, 2, 2),
        # Of two blocks with three walks, and with the one or two that are left.
        (130, 3, 1, [0], 1, "fp16", "fp32", FREE, 3, 1),
        (140, 8, 2, [0, 129], 2, "bf16", "fp32", FREE, 3, 2),
        (140, 5, 1, [140, 64], 1, "fp16", "fp32", FREE, 3, 1),
        (65, 10, 1, [3], 2, "fp16", "fp32", FREE, 5, 2),
        # Pieces of one walk by several blocks: fewer than there are chunks, and more.
        (200, 1, 1, [70], 1, "fp16", "fp32", FREE, (2, 2), 2),
        (200, 4, 2, [37, 200], 2, "bf16", "bf16", FREE, (2, 3), 1),
        (140, 2, 1, [1], 2, "fp16", "fp32", (0.01, 0.5), (2, 4), 2),
        (330, 1, 1, [0], 1, "bf16", "fp32", FREE, (2, 4), 1),
    ],
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("order", ORDERS)
def test_run_by_the_machine(
    length, heads, groups, pads, together, dtype, d_dtype, limits, walks, sums, order, gated
):
    """Against float64: parts of chunks, padding of some, of whole chunks and of all; strong decay,
    and every row written; walks that two blocks share, and pieces of one (``walks``: with how many
    there are); sums of squares, or of what is positive too.
    """
    random = torch.Generator().manual_seed(0)
    walks, split = walks if isinstance(walks, tuple) else (walks, 1)
    batch, chunks = len(pads), math.ceil(length / 64)
    columns = heads * 64 + 2 * groups * 128

    def normal(*shape):
        return torch.randn(shape, generator=random)

    xbc = normal(batch, length, columns).to(DTYPES[dtype])
    of_heads = normal(heads), 1 + normal(heads), normal(heads)
    bias, a_log, d = (x.to(DTYPES[d_dtype]) for x in of_heads)
    rows = torch.tensor(pads, dtype=torch.int32)
    z = 3 * normal(batch, length, heads * 64 + columns + cdiv(heads, 8) * 8)  # whole 16 bytes
    z[..., -cdiv(heads, 2) :] *= 4  # dt from far below its bias to far above it
    z = z.to(DTYPES[dtype])
    wide = [t.double() for t in (xbc, z[..., -heads:], bias, a_log, d)]
    expected = ssd_scan_reference(*wide, rows, None, groups, 128, 64, *limits)

    packed = z.shape[2]
    walk = hopper.Walk(
        heads, groups, dtype, d_dtype, together, packed, gated, d_dtype, d_dtype, *limits, walks,
        gated and sums == 2, split,
    )
    y = torch.full((batch, length, heads * 64), torch.nan, dtype=DTYPES[dtype])
    state = torch.full((batch, heads, 64, 128), torch.nan)
    blocks = {"HEADS": together, "WALKS": walks, "SPLIT": split}
    grid = (launches.walk_programs(heads, groups, blocks), batch)
    squares, relus = (torch.full((batch, length, heads), torch.nan) for _ in range(2))
    memory = GlobalMemory()
    read = (xbc, z, bias, a_log, d, rows)
    written = (y, *(squares, relus)[: sums if gated else 0], state)
    inputs, outputs = ([memory.add(bits(t)) for t in tensors] for tensors in (read, written))
    scratch = memory.add(np.full(math.prod(grid) * walk.maps * 128, 0xA5, np.uint8))
    arguments = (*inputs, length, chunks, *outputs, scratch, 0)
    Machine(hopper.write(walk, "k"), grid, walk.shared, memory, arguments, order).run()
    found = torch.from_numpy(to_float(bits(y), KINDS[dtype]).reshape(y.shape)), state
    # Rounded operands and a rounded y: one and a half times 2^-11 or 2^-8 over the root of 3.
    limit = {"fp16": 4e-4, "bf16": 3.2e-3}[dtype]
    if gated:
        g = expected[0] * F.silu(z[:, :, : heads * 64].double())
        ours, plain = (x.view(batch, length, heads, 64) for x in (g, expected[0]))
        more = (ours.square().sum(3), plain.relu().mean(3))[:sums]
        expected, found = (g, expected[1], *more), (*found, *(squares, relus)[:sums])
    for got, want in zip(found, expected, strict=True):
        times = 2 if got is squares else 1  # what a square does to an error
        assert (got.double() - want).norm() <= times * limit * want.norm()
