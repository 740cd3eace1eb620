"""The Triton kernel: a program takes a few rows, in one pass; they stay in registers."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.row_tiles import (
    TACTICS,
    load_pieces,
    load_vector,
    piece_mask,
    row_tactic,
    rows_of,
)


@triton.jit(do_not_specialize=["length"])
def add_rms_norm_kernel(
    hidden, residual, weight, length, normed, residual_out,
    D: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, there = rows_of(tl.program_id(0), length, ROWS)
    h = load_pieces(hidden + row * D, there, D, BLOCK)
    r = load_pieces(residual + row * D, there, D, BLOCK)
    w = load_vector(weight, D, BLOCK)  # before the sum: it would come late after it
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    total = ()
    for i in tl.static_range(len(h)):
        total = total + (h[i] + r[i],)
        squares += total[i] * total[i]
    scale = tl.rsqrt(tl.sum(squares, axis=1) / D + EPS)[:, None]
    for i in tl.static_range(len(h)):
        cols, mask = piece_mask(i, there, D, BLOCK)
        at = row * D + cols
        tl.store(residual_out + at, total[i].to(residual_out.dtype.element_ty), mask=mask)
        y = total[i] * scale * w[i]
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


ADD_RMS_NORM = Kernel(
    "add_rms_norm", add_rms_norm_kernel,
    ("hidden", "residual", "weight"), ("length",), ("normed", "residual_out"), TACTICS,
)


def calls(
    hidden: Spec, residual: Spec, weight: Spec, eps: float,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.add_rms_norm.op.add_rms_norm`."""
    _, length, width = hidden.shape
    tactic = choose(ADD_RMS_NORM, tactics, row_tactic(width))
    call = Call(
        kernel=ADD_RMS_NORM,
        inputs={"hidden": hidden.dtype, "residual": residual.dtype, "weight": weight.dtype},
        extras={"length": length},
        outputs={
            "normed": Spec(hidden.shape, hidden.dtype),
            "residual_out": Spec(residual.shape, residual.dtype),
        },
        constants={"D": width, "EPS": eps},
        tactic=tactic,
        grid=(cdiv(length, tactic.blocks["ROWS"]), 1),
    )
    return (call,)
