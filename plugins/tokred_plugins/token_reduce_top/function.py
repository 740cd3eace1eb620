"""The ONNX face: ``tokred::TokenReduceTop``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins._common import SENTINEL
from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import rows
from tokred_plugins.token_reduce.function import links_of, merge_branch


def body(
    b: Body, hidden: ir.Value, residual: ir.Value, keep: ir.Value, src: ir.Value, dst: ir.Value
) -> Sequence[ir.Value]:
    """hidden and residual [B, L - r, D]"""
    links = links_of(b, keep, src, dst)

    two = b.constant(np.asarray([2], np.int32))
    top = b.op("Div", b.sum(b.int32(links.linked), 1), two)  # [B, 1]
    x = b.wide(hidden)
    linked = b.unsqueeze(links.linked, 2)
    sources = b.op("Where", linked, rows(b, x, links.src), b.number(-SENTINEL))
    sources = b.topk_values(sources, b.dim(dst, 1), largest=True)  # [B, r, D]
    index = b.unsqueeze(b.int32(b.range(b.dim(dst, 1))), 0)
    counted = b.unsqueeze(b.op("Less", index, top), 2)
    total = b.sum(b.op("Where", counted, sources, b.number(0.0)), 1)  # [B, 1, D]
    share = b.op("Add", b.cast(b.unsqueeze(top, 2), ir.DataType.FLOAT), b.number(1.0))
    kept = rows(b, x, b.int64(keep))
    target = b.op("ReduceMax", dst, b.ints([1]), keepdims=1)  # all links have the same one
    is_target = b.unsqueeze(b.op("Equal", keep, target), 2)
    merged = b.op("Where", is_target, b.op("Div", b.op("Add", kept, total), share), kept)

    wide_residual = bool(b.literal("residual_in_fp32"))
    residual = residual if wide_residual else b.wide(residual)
    residual = merge_branch(b, residual, links, links.linked)
    return b.narrow(merged), (residual if wide_residual else b.narrow(residual))


ONNX = OnnxOp(
    name="TokenReduceTop",
    inputs=("hidden", "residual", "keep", "src", "dst"),
    outputs=("hidden_out", "residual_out"),
    attributes={"residual_in_fp32": int},
    body=body,
)
