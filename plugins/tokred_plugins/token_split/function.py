"""The ONNX face: ``tokred::TokenSplit``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins._common import SENTINEL
from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import lowest, positions_of


def body(b: Body, scores: ir.Value, pads: ir.Value) -> Sequence[ir.Value]:
    """lower int32 [B, count] and upper int32 [B, L - count], ascending"""
    length = b.dim(scores, 1)
    count = b.attribute("count")
    positions = b.unsqueeze(b.int32(b.range(length)), 0)
    padding = b.op("Less", positions, b.unsqueeze(pads, 1))
    keys = b.op("Where", padding, b.number(-SENTINEL), scores)
    tail = b.int32(b.op("Sub", length, b.attribute("protect")))
    keys = b.op("Where", b.op("Less", positions, tail), keys, b.number(SENTINEL))
    mask = lowest(b, keys, count, b.largest("count"))
    lower = positions_of(b, mask, count)
    upper = positions_of(b, b.op("Not", mask), b.op("Sub", length, count))
    return b.int32(lower), b.int32(upper)


ONNX = OnnxOp(
    "TokenSplit", ("scores", "pads"), ("lower", "upper"), {"count": int, "protect": int}, body
)
