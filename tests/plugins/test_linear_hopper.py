"""The product written in PTX, as far as that can be told without the GPU that it is for.

Its results are checked on one, by ``test_aot_launch.py``.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_integers import execute

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


def call_with(tactic, dtype="fp16", rows=(2, 300), inner=200, columns=264):
    """One launch, of a weight stored as [N, K]."""
    (call,) = linear.calls(
        Spec((*rows, inner), dtype), Spec((columns, inner), dtype), turned=True,
        tactics={"linear": tactic},
    )
    return call


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_the_assembler_takes_it(tactic, dtype, tmp_path):
    """No spills, and none of the remarks by which it says that products wait for each other."""
    from triton import knobs

    compiled = compile_call(call_with(tactic, dtype), 90)
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
        with pytest.raises(DoesNotFit, match="compute capability 9"):
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
    known = execute(counted[: -2], {"rows": rows})  # the last two read which block this is
    found = []
    for stack, rank in product(range(known["stacks"]), range(blocks)):
        tile = execute(hopper._next_tile(made), {**known, "stack": stack, "rank": rank})
        found.append((tile["row"], tile["column"]))
    expected = product(
        range(0, known["stacks_m"] * blocks * made.block_m, made.block_m),
        range(0, columns, block_n),
    )
    assert sorted(found) == list(expected)
    assert 0 <= known["stacks_m"] * blocks * made.block_m - rows < blocks * made.block_m


def scattered(address, row_bytes):
    """Where the accelerator puts a byte: 16-byte units of a row, changed by bits from 7 on."""
    mask = row_bytes // 16 - 1
    return address ^ (address >> 7 & mask) << 4


@pytest.mark.parametrize(
    ("block_n", "groups", "high"), [(256, 2, 1), (160, 2, 2), (192, 1, 2), (96, 2, 2)]
)
def test_results_land_where_they_belong(block_n, groups, high):
    """Every sum of every thread, through stmatrix and the accelerator, to its row and column.

    The layouts are the PTX ISA's: which thread holds what of a product (wgmma, "register
    fragments"), and whose registers stmatrix stores where.
    """
    made = replace(PLAIN, block_n=block_n, groups=groups, high=high)
    for group in range(groups):
        code = list(hopper._multiply(made, group))
        first = next(i for i, s in enumerate(code) if s.startswith("shr.u32 t, thread"))
        last = max(i for i, s in enumerate(code) if re.match(r"add\.u32 to\d", s))
        out = made.out_at + 2 * made.piece_bytes * group
        places = [
            execute(code[first : last + 1], {"thread": t, "lane": t % 32, "base": 0})
            for t in range(128)
        ]
        result = {}
        shared: dict[int, tuple[int, int]] = {}
        two: dict[str, tuple[int, int]] = {}
        known = {"base": 0, "row": 0, "column": 0}
        for line in hopper._store(made, 1, out):
            if found := re.fullmatch(r"cvt\.rn\.f16x2\.f32 (two\d), sum(\d+), sum(\d+);", line):
                two[found[1]] = int(found[3]), int(found[2])  # the low half comes last
            elif found := re.match(r"stmatrix\S+ \[(to\d) \+ (\d+)\]", line):
                store_matrices(shared, places, found[1], int(found[2]), two)
            elif found := re.search(r"\[map_y, \{(\w), (\w)\}\], \[(\w)\];", line):
                column, row, at = (known[name] for name in found.groups())
                for i, j in product(range(64), range(made.piece)):
                    byte = made.piece_row * i + 2 * j
                    result[row + i, column + j] = shared[at + scattered(byte, made.piece_row)]
            elif line.startswith("add.u32"):
                known = execute([line], known)
        assert len(result) == 64 * high * block_n
        for (row, column), (thread, register) in result.items():
            part, inside = divmod(register, block_n // 2)
            eight, which = divmod(inside, 4)
            holds = (64 * part + 16 * (thread // 32) + thread % 32 // 4 + 8 * (which // 2),
                     8 * eight + 2 * (thread % 4) + which % 2)
            assert holds == (row, column)


@pytest.mark.parametrize("block_n", [256, 224, 192, 160, 96])
def test_results_wait_until_earlier_ones_have_left(block_n):
    """A place is written again only when the accelerator has read it, in the next tile too."""
    made = replace(PLAIN, block_n=block_n)
    leaving: list[int] = []
    place = None
    for line in [*hopper._store(made, 1, 0)] * 2:
        if found := re.fullmatch(r"@leads cp\.async\.bulk\.wait_group\.read (\d);", line):
            leaving = leaving[len(leaving) - int(found[1]) :] if int(found[1]) else []
        elif found := re.match(r"stmatrix\S+ \[to\d \+ (\d+)\]", line):
            place = int(found[1])
            assert place not in leaving
        elif "commit_group" in line:
            leaving.append(place)
    assert leaving


def store_matrices(shared, places, register, offset, two):
    """stmatrix .x4: eight threads give the rows of one matrix, all give two numbers of a row."""
    for warp, matrix, row in product(range(4), range(4), range(8)):
        address = places[32 * warp + 8 * matrix + row][register] + offset
        for i in range(4):
            thread = 32 * warp + 4 * row + i
            for half, number in enumerate(two[f"two{matrix}"]):
                shared[address + 4 * i + 2 * half] = thread, number
