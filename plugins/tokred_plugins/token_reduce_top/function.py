"""The ONNX face: ``tokred::TokenReduceTop``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins._common import SENTINEL
from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import rows
from tokred_plugins.token_reduce.function import merge_branch


def body(
    b: Body, hidden: ir.Value, residual: ir.Value, keep: ir.Value, src: ir.Value, dst: ir.Value
) -> Sequence[ir.Value]:
    """hidden and residual [B, L - r, D]"""
    receives = b.op("Equal", b.unsqueeze(keep, 2), b.unsqueeze(dst, 1))  # [B, L - r, r]
    linked = b.op("GreaterOrEqual", dst, b.constant(np.asarray(0, np.int32)))
    keep, src = b.int64(keep), b.int64(src)

    two = b.constant(np.asarray([2], np.int32))
    top = b.op("Div", b.sum(b.int32(linked), 1), two)  # [B, 1]
    x = b.wide(hidden)
    sources = b.op("Where", b.unsqueeze(linked, 2), rows(b, x, src), b.number(-SENTINEL))
    sources = b.topk_values(sources, b.dim(dst, 1), largest=True)  # [B, r, D]
    index = b.unsqueeze(b.int32(b.range(b.dim(dst, 1))), 0)
    counted = b.unsqueeze(b.op("Less", index, top), 2)
    total = b.sum(b.op("Where", counted, sources, b.number(0.0)), 1)  # [B, 1, D]
    share = b.op("Add", b.cast(b.unsqueeze(top, 2), ir.DataType.FLOAT), b.number(1.0))
    kept = rows(b, x, keep)
    is_target = b.op("Greater", b.sum(b.int32(receives), 2), b.constant(np.asarray(0, np.int32)))
    merged = b.op("Where", is_target, b.op("Div", b.op("Add", kept, total), share), kept)

    wide_residual = bool(b.literal("residual_in_fp32"))
    residual = residual if wide_residual else b.wide(residual)
    residual = merge_branch(b, residual, keep, src, receives)
    return b.narrow(merged), (residual if wide_residual else b.narrow(residual))


ONNX = OnnxOp(
    name="TokenReduceTop",
    inputs=("hidden", "residual", "keep", "src", "dst"),
    outputs=("hidden_out", "residual_out"),
    attributes={"residual_in_fp32": int},
    body=body,
)
