"""The Triton kernel: one program a token, one pass; the row stays in registers."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.add_rms_norm.kernel import TACTICS, row_tactic
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose


@triton.jit
def embed_rms_norm_kernel(
    input_ids, table, weight, normed, residual,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    source = tl.load(input_ids + row).to(tl.int64) * D
    pieces: tl.constexpr = (D + BLOCK - 1) // BLOCK
    values = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(table + source + cols, mask=cols < D, other=0).to(tl.float32)
        values = values + (x,)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares) / D + EPS)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < D
        x = values[i]
        tl.store(residual + row * D + cols, x.to(residual.dtype.element_ty), mask=inside)
        w = tl.load(weight + cols, mask=inside, other=0).to(tl.float32)
        tl.store(normed + row * D + cols, (x * scale * w).to(normed.dtype.element_ty), mask=inside)


EMBED_RMS_NORM = Kernel(
    "embed_rms_norm", embed_rms_norm_kernel, ("input_ids", "table", "weight"), (),
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
    call = Call(
        kernel=EMBED_RMS_NORM,
        inputs={"input_ids": input_ids.dtype, "table": table.dtype, "weight": weight.dtype},
        extras={},
        outputs={
            "normed": Spec(shape, table.dtype),
            "residual": Spec(shape, "fp32" if residual_in_fp32 else table.dtype),
        },
        constants={"D": width, "EPS": eps},
        tactic=choose(EMBED_RMS_NORM, tactics, row_tactic(width)),
        grid=(length, 1),
    )
    return (call,)
