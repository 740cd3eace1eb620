"""The ONNX face: ``tokred::TokenStride``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import without


def body(b: Body, pads: ir.Value) -> Sequence[ir.Value]:
    """src, dst int32 [B, r], merge bool [B, r], keep int32 [B, L - r]"""
    removed = b.attribute("removed")
    one, minus, two = (b.constant(np.asarray(v, np.int32)) for v in (1, -1, 2))
    step = b.unsqueeze(b.int32(b.range(removed)), 0)  # [1, r]
    gone = b.unsqueeze(b.op("Min", pads, b.int32(removed)), 1)  # [B, 1]
    link = b.op("GreaterOrEqual", step, gone)
    src = b.op("Where", link, b.op("Sub", b.op("Mul", step, two), gone), step)
    dst = b.op("Where", link, b.op("Add", gone, one), minus)
    return src, dst, link, b.int32(without(b, b.int64(src), b.attribute("length")))


ONNX = OnnxOp(
    "TokenStride", ("pads",), ("src", "dst", "merge", "keep"), {"length": int, "removed": int}, body
)
