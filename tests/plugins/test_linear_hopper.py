"""The product written in PTX: by the assembler, and run by a machine that knows the instructions.

``test_aot_launch.py`` launches it on the GPU that it is for.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine import ORDERS, GlobalMemory, Machine, check_fences, integers, to_bits, to_float

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from tokred_plugins.aot import SHARED_LIMITS, DoesNotFit, compile_call, compile_key
from tokred_plugins.kernels import Spec, launch
from tokred_plugins.linear import hopper
from tokred_plugins.linear import kernel as linear

TACTICS = [t for t in linear.LINEAR.tactics if t.blocks["CLUSTER"]]
PLAIN = hopper.Product(
    inner=768, columns=3352, dtype="fp16", block_n=192, groups=2, high=1, stages=4, blocks=1,
    tall=8, programs=132,
)


def call_with(tactic, dtype="fp16", rows=(2, 300), inner=200, columns=264, parts=0):
    """One launch, of a weight stored as [N, K]; rows are scaled where they come with sums."""
    (call,) = linear.calls(
        Spec((*rows, inner), dtype), Spec((columns, inner), dtype), turned=True,
        tactics={"linear": tactic}, squares=Spec((*rows, parts), "fp32") if parts else None,
    )
    return call


@pytest.mark.parametrize("parts", [0, 24, 37, 80])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_the_assembler_takes_it(tactic, dtype, parts, tmp_path):
    """No spills, and none of the remarks by which it says that products wait for each other."""
    from triton import knobs

    compiled = compile_call(call_with(tactic, dtype, parts=parts), 90)
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", f"{source}.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
    assert not re.search(r"warning|C75\d\d|serializ", done.stderr), done.stderr


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_what_is_launched(tactic):
    """Threads, shared memory and clusters as the tactic says; only for compute capability 9.0."""
    call = call_with(tactic)
    compiled = compile_call(call, 90)
    assert compiled.block == 32 * tactic.num_warps and compiled.shared <= SHARED_LIMITS[90]
    assert compiled.scratch == 3 * 128 and compiled.hidden == 1
    cluster = tactic.blocks["CLUSTER"]
    assert (f".reqnctapercluster {cluster}, 1, 1" in compiled.ptx) == (cluster > 1)
    assert call.grid[0] % cluster == 0
    for target in (89, 100, 120):
        with pytest.raises(DoesNotFit, match=r"compute capability 9\.0, not"):
            compile_call(call, target)


def test_only_on_a_gpu():
    """It cannot be interpreted; and a change of its source is a change of the kernel."""
    call = call_with(TACTICS[0])
    with pytest.raises(ValueError, match="is PTX and runs on a GPU alone; the tensors are on cpu"):
        import torch

        launch(call, {"x": torch.zeros(2, 300, 200), "weight": torch.zeros(264, 200)})
    without = replace(linear.LINEAR, write=None)
    assert linear.LINEAR.code != without.code
    assert len({compile_key(call_with(t)) for t in TACTICS}) == len(TACTICS)


def test_code_of_its_own():
    """What rows are divided by is in the code: calls that differ there share none."""
    x, weight = Spec((1, 300, 200), "fp16"), Spec((264, 200), "fp16")
    keys = {
        compile_key(linear.calls(x, weight, True, squares=Spec((1, 300, n), "fp32"), eps=eps)[0])
        for n, eps in ((24, 1e-5), (24, 1e-6), (48, 1e-5))
    }
    assert len(keys) == 3


def test_what_the_call_says_of_rows():
    """Sums of squares and what is added to their mean are in the code."""
    (call,) = linear.calls(
        Spec((1, 300, 200), "fp16"), Spec((264, 200), "fp16"), turned=True,
        tactics={"linear": TACTICS[1]}, squares=Spec((1, 300, 24), "fp32"), eps=0.25,
    )
    tactic = TACTICS[1]
    made = hopper.Product(
        200, 264, "fp16", tactic.blocks["BLOCK_N"], 2, 1, tactic.num_stages, 1, 8, 132, 24, 0.25
    )
    assert hopper.written(call).ptx == hopper.write(made, "linear_hopper")


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_fences(tactic):
    """Before what threads wrote is read by others than threads."""
    check_fences(compile_call(call_with(tactic), 90).ptx)


def test_types_of_operands():
    """x and the weight are of one type."""
    with pytest.raises(ValueError, match="x is fp16 and the weight fp32"):
        linear.calls(Spec((1, 64, 64), "fp16"), Spec((128, 64), "fp32"), turned=True)


def test_clusters_are_whole():
    """An odd number of programs would leave a block without its other half."""
    call = call_with(TACTICS[0])
    tactic = replace(TACTICS[0], blocks={**TACTICS[0].blocks, "PROGRAMS": 131})
    with pytest.raises(ValueError, match="131 programs are no clusters of 2"):
        compile_call(replace(call, tactic=tactic), 90)


def test_weights_stored_the_other_way():
    """They are for the tactics of Triton."""
    with pytest.raises(ValueError, match="K x N, fit no descriptor"):
        linear.calls(Spec((1, 64, 64), "fp16"), Spec((64, 128), "fp16"),
                     tactics={"linear": TACTICS[0]})


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5000), columns=st.integers(1, 700).map(lambda n: 8 * n),
    block_n=st.sampled_from([96, 160, 192, 256]), groups=st.integers(1, 2),
    high=st.integers(1, 2), blocks=st.integers(1, 2), tall=st.integers(1, 9),
)
def test_every_tile_once(rows, columns, block_n, groups, high, blocks, tall):
    """Whatever the size, the blocks together walk over all tiles, each once."""
    made = replace(PLAIN, columns=columns, block_n=block_n, groups=groups, high=high,
                   blocks=blocks, tall=tall)
    prepared = list(hopper._prepare(made, "k"))
    counted = prepared[next(i for i, s in enumerate(prepared) if s.startswith("add.u32 stacks_m")):]
    known = integers(counted[:-2], {"rows": rows})  # the last two read which block this is
    found = []
    for stack, rank in product(range(known["stacks"]), range(blocks)):
        tile = integers([*hopper._next_tile(made)], {**known, "stack": stack, "rank": rank})
        found.append((tile["row"], tile["column"]))
    expected = product(
        range(0, known["stacks_m"] * blocks * made.block_m, made.block_m),
        range(0, columns, block_n),
    )
    assert sorted(found) == list(expected)
    assert 0 <= known["stacks_m"] * blocks * made.block_m - rows < blocks * made.block_m


@pytest.mark.parametrize(
    ("shape", "tile", "blocks", "programs", "dtype", "parts"),
    [
        ((1, 100, 264, 72), (192, 2, 1, 4), 1, 2, "fp16", 0),
        ((2, 150, 328, 200), (160, 2, 2, 4), 1, 4, "bf16", 0),
        ((1, 300, 264, 136), (256, 2, 1, 4), 2, 2, "fp16", 0),
        # An odd number of pieces of results: the last of a tile and the first of the next share.
        ((3, 70, 232, 64), (224, 1, 1, 2), 2, 4, "bf16", 0),
        ((1, 129, 200, 328), (96, 2, 2, 3), 1, 1, "fp16", 0),
        ((1, 7, 8, 8), (192, 1, 2, 2), 1, 3, "fp16", 0),
        ((2, 150, 328, 200), (160, 2, 2, 4), 1, 4, "bf16", 24),
        ((1, 300, 264, 136), (256, 2, 1, 4), 2, 2, "fp16", 37),
        ((1, 7, 8, 8), (192, 1, 2, 2), 1, 3, "fp16", 1),
        # Four sums at a time: all of a row at once, and half a load left over.
        ((1, 150, 96, 136), (96, 2, 1, 3), 1, 2, "fp16", 80),
        ((2, 70, 96, 72), (96, 1, 1, 3), 1, 2, "bf16", 24),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_run_by_the_machine(shape, tile, blocks, programs, dtype, parts, order):
    """Whole tiles and parts of them, more stages than steps and fewer, more blocks than tiles and
    fewer, rows as they are and scaled; nothing is written that should not be."""
    batch, length, columns, inner = shape
    block_n, groups, high, stages = tile
    made = hopper.Product(
        inner, columns, dtype, block_n, groups, high, stages, blocks, 2, programs, parts, 0.5
    )
    kind = {"fp16": "f16", "bf16": "bf16"}[dtype]
    random = np.random.default_rng(0)
    x = to_bits(random.standard_normal((batch, length, inner)), kind)
    weight = to_bits(random.standard_normal((columns, inner)), kind)
    y = to_bits(np.full((batch, length, columns), np.nan), kind)
    scratch = np.zeros(programs * batch * hopper.MAPS * 128, np.uint8)
    memory = GlobalMemory()
    squares = random.random((batch, length, parts), np.float32)
    inputs = [memory.add(array) for array in ((x, weight, squares) if parts else (x, weight))]
    arguments = (*inputs, length, memory.add(y), memory.add(scratch), 0)
    code = hopper.write(made, "k")
    Machine(code, (programs, batch), made.shared, memory, arguments, order).run()
    expected = to_float(x, kind).astype(float) @ to_float(weight, kind).astype(float).T
    if parts:
        expected /= np.sqrt(squares.sum(2, dtype=float, keepdims=True) / inner + 0.5)
    error = np.linalg.norm(to_float(y, kind) - expected) / np.linalg.norm(expected)
    assert error < {"fp16": 4e-4, "bf16": 3.2e-3}[dtype]
