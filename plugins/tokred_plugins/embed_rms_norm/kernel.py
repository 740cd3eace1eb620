"""The Triton kernel: a few tokens a program, one pass; a row stays in registers."""

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
def embed_rms_norm_kernel(
    input_ids, table, weight, length, normed, residual,
    D: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, there = rows_of(tl.program_id(0), length, ROWS)
    source = tl.load(input_ids + row, mask=there, other=0).to(tl.int64) * D
    x = load_pieces(table + source, there, D, BLOCK)
    w = load_vector(weight, D, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(len(x)):
        squares += x[i] * x[i]
    scale = tl.rsqrt(tl.sum(squares, axis=1) / D + EPS)[:, None]
    for i in tl.static_range(len(x)):
        cols, mask = piece_mask(i, there, D, BLOCK)
        at = row * D + cols
        tl.store(residual + at, x[i].to(residual.dtype.element_ty), mask=mask)
        tl.store(normed + at, (x[i] * scale * w[i]).to(normed.dtype.element_ty), mask=mask)


EMBED_RMS_NORM = Kernel(
    "embed_rms_norm", embed_rms_norm_kernel, ("input_ids", "table", "weight"), ("length",),
    ("normed", "residual"), TACTICS,
)


def calls(
    input_ids: Spec, table: Spec, weight: Spec, eps: float, residual_in_fp32: bool,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.embed_rms_norm.op.embed_rms_norm`."""
    batch, length = input_ids.shape
    width = table.shape[1]
    shape = (batch, length, width)
    tactic = choose(EMBED_RMS_NORM, tactics, row_tactic(width))
    call = Call(
        kernel=EMBED_RMS_NORM,
        inputs={"input_ids": input_ids.dtype, "table": table.dtype, "weight": weight.dtype},
        extras={"length": length},
        outputs={
            "normed": Spec(shape, table.dtype),
            "residual": Spec(shape, "fp32" if residual_in_fp32 else table.dtype),
        },
        constants={"D": width, "EPS": eps},
        tactic=tactic,
        grid=(cdiv(length, tactic.blocks["ROWS"]), 1),
    )
    return (call,)
