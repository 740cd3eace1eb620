"""Products with a constant against float64: every tile shape, odd sizes, both ways to store it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import DTYPES, ON_GPU, TOLERANCE, close, make, require_kernels

require_kernels()

from tokred_plugins.kernels import Spec, run, spec_of  # noqa: E402
from tokred_plugins.linear import kernel as linear  # noqa: E402
from tokred_plugins.linear.kernel import Stream, Unnormed  # noqa: E402
from tokred_plugins.retune import candidates  # noqa: E402

# Small tiles, which the interpreter can do; a GPU tries all that fit it.
POINTERS = [t for t in linear.LINEAR.tactics if not t.blocks["PROGRAMS"]]
DESCRIPTORS = [t for t in linear.LINEAR.tactics if t.blocks["PROGRAMS"]]
MANY = POINTERS if ON_GPU else POINTERS[-3:]
FEW = linear.LINEAR_FEW.tactics if ON_GPU else linear.LINEAR_FEW.tactics[-2:]


def check(shape, inner, columns, turned, tactic, dtype, flat=False):
    """One product; rows of other sequences and columns beyond the end must not matter."""
    x = make(1, *shape, inner, dtype=dtype)
    weight = make(2, *((columns, inner) if turned else (inner, columns)), dtype=dtype)
    picked = {"linear": tactic, "linear_few": tactic}
    (call,) = linear.calls(spec_of(x), spec_of(weight), turned, flat, picked)
    got = run((call,), {"x": x, "weight": weight})["y"]
    assert call.kernel.name == ("linear" if shape[1] > linear.FEW else "linear_few")
    wide = weight.double().cpu()
    expected = x.double().cpu() @ (wide.T if turned else wide)
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
    for tactic in DESCRIPTORS if ON_GPU else DESCRIPTORS[-1:]:
        blocks = {**tactic.blocks, "PROGRAMS": 3}
        for picked in (replace(tactic, blocks=blocks), tactic)[: 2 if ON_GPU else 1]:
            check((batch, length), inner, columns, turned, picked, dtype)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (2, 16), (40, 1)])
def test_few_rows(batch, length, turned, dtype):
    """All sequences' rows in one walk over the weights, more of them than a tile has too."""
    for tactic in FEW:
        check((batch, length), 50, 130, turned, tactic, dtype)


def fused(shape, inner, columns, tactic, dtype, part):
    """A product of rows that are not normed yet, or one that is added to a residual stream: its
    results, and what float64 makes of the same."""
    x = make(1, *shape, inner, dtype=dtype)
    weight = make(2, columns, inner, dtype=dtype)
    given = {"x": x, "weight": weight}
    y = x.double().cpu() @ weight.double().cpu().T
    unnormed = stream = None
    if part == "unnormed":  # any sums will do: the kernel knows of no others
        squares = make(3, *shape, 27).square()
        given["squares"] = squares
        unnormed = Unnormed(spec_of(squares), 0.25, 4.0)
        y *= 4 / (squares.double().cpu().sum(2, keepdim=True) / inner + 0.25).sqrt()
    if part == "stream":
        given["residual"] = make(4, *shape, columns, scale=20)
        given["norm_weight"] = make(5, columns, dtype=dtype)
        stream = Stream(spec_of(given["residual"]), spec_of(given["norm_weight"]))
    (call,) = linear.calls(
        spec_of(x), spec_of(weight), True, tactics={"linear": tactic, "linear_add": tactic},
        unnormed=unnormed, stream=stream,
    )
    made = run((call,), given)
    if stream is None:
        return made, {"y": y}
    total = y + given["residual"].double().cpu()
    scaled = total * given["norm_weight"].double().cpu() / 16
    return made, {"residual_out": total, "weighted": scaled, "squares": total.square()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["unnormed", "stream"])
@pytest.mark.parametrize(
    ("length", "inner", "columns"), [(40, 72, 136), (150, 64, 256), (33, 40, 8)]
)
def test_norms_beside_products(length, inner, columns, part, dtype):
    """Rows are normed after the product, and their squares summed after the one before."""
    own = (linear.LINEAR_ADD if part == "stream" else linear.LINEAR).tactics
    few = [own[-1], next(t for t in own if t.blocks["PROGRAMS"] > 132)]
    for tactic in own if ON_GPU else few:
        if dtype == torch.float32 and (
            max(tactic.blocks["BLOCK_M"], tactic.blocks["BLOCK_N"]) > 64
            or tactic.blocks["PROGRAMS"]
        ):
            continue
        made, expected = fused((2, length), inner, columns, tactic, dtype, part)
        assert made.keys() == expected.keys()
        for name, value in expected.items():
            if name == "squares":
                assert made[name].shape == (2, length, -(-columns // 64))
                pieces = value.split(64, dim=2)
                value = torch.stack([piece.sum(2) for piece in pieces], dim=2)
            close(made[name], value, TOLERANCE[dtype], f"{name} with {tactic}")


def test_a_norm_between_two_products():
    """Product, residual and norm, product: as eager PyTorch does them one after another."""
    shape, width = (2, 40), 136
    x, first, second = make(1, *shape, 48), make(2, width, 48), make(3, 24, width)
    residual, norm_weight = make(4, *shape, width), make(5, width)
    stream = Stream(spec_of(residual), spec_of(norm_weight))
    tactics = {"linear_add": linear.LINEAR_ADD.tactics[-1], "linear": linear.LINEAR.tactics[-1]}
    one = linear.calls(spec_of(x), spec_of(first), True, tactics=tactics, stream=stream)
    given = {"x": x, "weight": first, "residual": residual, "norm_weight": norm_weight}
    made = run(one, given)
    unnormed = Unnormed(spec_of(made["squares"]), 1e-5, linear.HEADROOM)
    weighted = spec_of(made["weighted"])
    two = linear.calls(weighted, spec_of(second), True, tactics=tactics, unnormed=unnormed)
    given = {"x": made["weighted"], "weight": second, "squares": made["squares"]}
    got = run(two, given)["y"]
    wide = [t.double().cpu() for t in (x, first, second, residual, norm_weight)]
    total = wide[0] @ wide[1].T + wide[3]
    normed = torch.nn.functional.rms_norm(total, (width,), wide[4], 1e-5)
    close(got, normed @ wide[2].T, TOLERANCE[torch.float32], "y")
    close(made["residual_out"], total, TOLERANCE[torch.float32], "residual_out")


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
     ((2, 3, 8), (8, 4), {"flat": True}),
     ((2, 3, 8), (8, 4), {"unnormed": Unnormed(Spec((2, 3, 1), "fp32"), 0.0)}),
     ((2, 3, 8), (8, 4), {"stream": Stream(Spec((2, 3, 4), "fp32"), Spec((4,), "fp16"))}),
     ((2, 30, 8), (8, 4), {"stream": Stream(Spec((2, 30, 4), "fp32"), Spec((4,), "fp16")),
                           "unnormed": Unnormed(Spec((2, 30, 1), "fp32"), 0.0)})],
)
def test_shapes_that_do_not_fit(x, weight, options):
    """Depths that differ, a flat result of several tokens, norms where rows are few, and both."""
    with pytest.raises(ValueError, match="cannot be multiplied"):
        linear.calls(Spec(x, "fp16"), Spec(weight, "fp16"), **options)
