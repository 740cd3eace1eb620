"""The ONNX face: ``tokred::TokenReduce``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import rows


def body(
    b: Body,
    hidden: ir.Value,
    residual: ir.Value,
    keep: ir.Value,
    src: ir.Value,
    dst: ir.Value,
    merge: ir.Value,
) -> Sequence[ir.Value]:
    """hidden and residual [B, L - r, D]"""
    # [B, L - r, r]: does this survivor receive that source? A product with it adds the sources
    # up; scattering with a reduction is what TensorRT cannot do. -1 equals no position.
    receives = b.op("Equal", b.unsqueeze(keep, 2), b.unsqueeze(dst, 1))
    merging = b.op("And", receives, b.unsqueeze(merge, 1))
    keep, src = b.int64(keep), b.int64(src)
    wide_residual = bool(b.literal("residual_in_fp32"))
    hidden = b.narrow(merge_branch(b, b.wide(hidden), keep, src, merging))
    residual = residual if wide_residual else b.wide(residual)
    residual = merge_branch(b, residual, keep, src, receives)
    return hidden, (residual if wide_residual else b.narrow(residual))


def merge_branch(
    b: Body, x: ir.Value, keep: ir.Value, src: ir.Value, receives: ir.Value
) -> ir.Value:
    """One branch, float32 [B, L, D] -> [B, L - r, D]."""
    weight = b.cast(receives, ir.DataType.FLOAT)
    # What merges into nothing may be anything, even NaN, and 0 * NaN is not 0.
    acts = b.op("Greater", b.op("ReduceMax", weight, b.ints([1]), keepdims=0), b.number(0.0))
    sources = b.op("Where", b.unsqueeze(acts, 2), rows(b, x, src), b.number(0.0))
    total = b.op("Add", rows(b, x, keep), b.op("MatMul", weight, sources))
    return b.op("Div", total, b.op("Add", b.sum(weight, 2), b.number(1.0)))


ONNX = OnnxOp(
    name="TokenReduce",
    inputs=("hidden", "residual", "keep", "src", "dst", "merge"),
    outputs=("hidden_out", "residual_out"),
    attributes={"residual_in_fp32": int},
    body=body,
)
