"""Products with a constant against float64: every tile shape, odd sizes, both ways to store it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import DTYPES, ON_GPU, TOLERANCE, close, make, require_kernels

require_kernels()

from tokred_plugins.kernels import Spec, run, spec_of  # noqa: E402
from tokred_plugins.linear import kernel as linear  # noqa: E402
from tokred_plugins.retune import candidates  # noqa: E402

# Small tiles, which the interpreter can do; a GPU tries all that fit it.
POINTERS = [t for t in linear.LINEAR.tactics if not t.blocks["PROGRAMS"]]
# Those with clusters are PTX, which test_aot_launch.py launches.
DESCRIPTORS = [
    t for t in linear.LINEAR.tactics if t.blocks["PROGRAMS"] and not t.blocks["CLUSTER"]
]
MANY = POINTERS if ON_GPU else POINTERS[-3:]
FEW = linear.LINEAR_FEW.tactics if ON_GPU else linear.LINEAR_FEW.tactics[-2:]


def check(shape, inner, columns, turned, tactic, dtype, flat=False, parts=0):
    """One product; rows of other sequences and columns beyond the end must not matter."""
    x = make(1, *shape, inner, dtype=dtype)
    weight = make(2, *((columns, inner) if turned else (inner, columns)), dtype=dtype)
    squares = make(3, *shape, parts).square() if parts else None
    picked = {"linear": tactic, "linear_few": tactic}
    (call,) = linear.calls(
        spec_of(x), spec_of(weight), turned, flat, picked,
        None if squares is None else spec_of(squares), 0.25,
    )
    got = run((call,), {"x": x, "weight": weight, "squares": squares})["y"]
    few = shape[1] <= linear.FEW and not parts
    assert call.kernel.name == ("linear_few" if few else "linear")
    wide = weight.double().cpu()
    expected = x.double().cpu() @ (wide.T if turned else wide)
    if parts:
        expected /= (squares.double().cpu().sum(2, keepdim=True) / inner + 0.25).sqrt()
    close(got, expected[:, 0] if flat else expected, TOLERANCE[dtype], f"y with {tactic}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize(
    ("length", "inner", "columns"), [(40, 70, 90), (150, 64, 128), (33, 32, 8)]
)
def test_many_rows(length, inner, columns, turned, dtype):
    """Lengths, depths and widths that are whole tiles and that are not; two sequences."""
    for tactic in MANY:
        if dtype != torch.float32 or max(tactic.blocks.values()) <= 64:  # shared memory
            check((2, length), inner, columns, turned, tactic, dtype)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
@pytest.mark.parametrize("turned", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize(
    ("batch", "length", "inner", "columns"), [(2, 150, 72, 136), (3, 33, 64, 8), (1, 300, 200, 64)]
)
def test_descriptors(batch, length, inner, columns, turned, dtype):
    """Sequences are one matrix there; programs that stay do several tiles, or none."""
    small = [t for t in DESCRIPTORS if t.blocks["BLOCK_N"] == 64]
    for tactic in DESCRIPTORS if ON_GPU else small:
        picked = replace(tactic, blocks={**tactic.blocks, "PROGRAMS": 3})
        check((batch, length), inner, columns, turned, picked, dtype)
        if ON_GPU:
            check((batch, length), inner, columns, turned, tactic, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 16, 37])
def test_scaled_rows(parts, dtype):
    """Rows divided by a root mean square that comes in parts; a few of them alone too."""
    tactics = [MANY[-1]]
    if dtype != torch.float32:
        tactics = MANY + DESCRIPTORS if ON_GPU else [*tactics, DESCRIPTORS[-1]]
    for tactic in tactics:
        check((2, 45), 64, 72, True, tactic, dtype, parts=parts)
        check((3, 2), 64, 72, True, tactic, dtype, parts=parts)


def test_squares_that_do_not_fit():
    """Of other rows, in 16 bits, and none."""
    for squares in (Spec((2, 4, 8), "fp32"), Spec((2, 3, 8), "fp16"), Spec((2, 3, 0), "fp32")):
        with pytest.raises(ValueError, match="expected float32 for each row"):
            linear.calls(Spec((2, 3, 8), "fp16"), Spec((8, 4), "fp16"), squares=squares)


def test_what_descriptors_cannot_hold():
    """Rows that are no multiple of 16 bytes, and float32."""
    picked = {"linear": DESCRIPTORS[0]}
    for x, weight in (((1, 40, 70), "fp16"), ((1, 40, 64), "fp32")):
        with pytest.raises(ValueError, match="fit no descriptor"):
            linear.calls(Spec(x, weight), Spec((x[-1], 64), weight), tactics=picked)
    (call,) = linear.calls(Spec((1, 40, 64), "fp16"), Spec((64, 92), "fp16"))
    assert all(not c.tactic.blocks["PROGRAMS"] for c in candidates(call))
    (call,) = linear.calls(Spec((1, 40, 64), "fp16"), Spec((64, 96), "fp16"))
    staying = [c for c in candidates(call) if c.tactic.blocks["PROGRAMS"]]
    assert [c.grid for c in staying] == [(t.blocks["PROGRAMS"], 1) for t in DESCRIPTORS]
    (call,) = linear.calls(Spec((1, 40, 64), "fp16"), Spec((96, 64), "fp16"), turned=True)
    staying = [c.tactic for c in candidates(call) if c.tactic.blocks["PROGRAMS"]]
    assert staying == [t for t in linear.LINEAR.tactics if t.blocks["PROGRAMS"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (2, 16), (40, 1)])
def test_few_rows(batch, length, turned, dtype):
    """All sequences' rows in one walk over the weights, more of them than a tile has too."""
    for tactic in FEW:
        check((batch, length), 50, 130, turned, tactic, dtype)


def test_the_head_is_flat():
    """One token a row gives [B, V]."""
    check((3, 1), 64, 96, True, linear.LINEAR_FEW.tactics[-1], torch.float32, flat=True)


def test_sums_are_float32():
    """4096 ones times 1.0 and a little more: a float16 sum would stop growing at 2048."""
    inner = 4096
    x = torch.ones(1, 20, inner, dtype=torch.float16, device=make(0, 1).device)
    weight = torch.ones(inner, 16, dtype=torch.float16, device=x.device)
    for few in (True, False):
        rows = x[:, :1] if few else x
        tactic = FEW[-1] if few else MANY[-1]
        picked = {"linear": tactic, "linear_few": tactic}
        calls = linear.calls(spec_of(rows), spec_of(weight), tactics=picked)
        assert (run(calls, {"x": rows.contiguous(), "weight": weight})["y"] == inner).all()


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [((2, 3, 8), (9, 4), {}), ((2, 3, 8), (8, 4), {"turned": True}),
     ((2, 3, 8), (8, 4), {"flat": True})],
)
def test_shapes_that_do_not_fit(x, weight, options):
    """Depths that differ, and a flat result of several tokens."""
    with pytest.raises(ValueError, match="cannot be multiplied"):
        linear.calls(Spec(x, "fp16"), Spec(weight, "fp16"), **options)
