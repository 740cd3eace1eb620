"""The Triton kernel: one program a row, one pass; the row stays in registers."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose


@triton.jit
def add_rms_norm_kernel(
    hidden, residual, weight, normed, residual_out,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    pieces: tl.constexpr = (D + BLOCK - 1) // BLOCK
    # A row is rarely a power of two: pieces waste no lanes, 2560 = 5 x 512.
    total = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * D + cols, mask=cols < D, other=0).to(tl.float32)
        r = tl.load(residual + row * D + cols, mask=cols < D, other=0).to(tl.float32)
        x = h + r
        total = total + (x,)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares) / D + EPS)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < D
        x = total[i]
        tl.store(residual_out + row * D + cols, x.to(residual_out.dtype.element_ty), mask=inside)
        w = tl.load(weight + cols, mask=inside, other=0).to(tl.float32)
        y = (x * scale * w).to(normed.dtype.element_ty)
        tl.store(normed + row * D + cols, y, mask=inside)


# Eight elements a thread and piece: one 16-byte access of a 16-bit tensor.
TACTICS = tuple(Tactic({"BLOCK": 256 * warps}, warps) for warps in (1, 2, 4, 8, 16))
ADD_RMS_NORM = Kernel(
    "add_rms_norm", add_rms_norm_kernel,
    ("hidden", "residual", "weight"), (), ("normed", "residual_out"), TACTICS,
)


def row_tactic(width: int) -> Tactic:
    """The fewest warps that hold a row of ``width`` in at most three pieces."""
    return next((t for t in TACTICS if cdiv(width, t.blocks["BLOCK"]) <= 3), TACTICS[-1])


def calls(
    hidden: Spec, residual: Spec, weight: Spec, eps: float,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.add_rms_norm.op.add_rms_norm`."""
    _, length, width = hidden.shape
    call = Call(
        kernel=ADD_RMS_NORM,
        inputs={"hidden": hidden.dtype, "residual": residual.dtype, "weight": weight.dtype},
        extras={},
        outputs={
            "normed": Spec(hidden.shape, hidden.dtype),
            "residual_out": Spec(residual.shape, residual.dtype),
        },
        constants={"D": width, "EPS": eps},
        tactic=choose(ADD_RMS_NORM, tactics, row_tactic(width)),
        grid=(length, 1),
    )
    return (call,)
