"""The ONNX face: ``tokred::TokenMatch``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import rows
from tokred_plugins.token_match.reference import SMALLEST_NORM


def body(b: Body, hidden: ir.Value, lower: ir.Value, upper: ir.Value) -> Sequence[ir.Value]:
    """similarity float32 [B, La] and target int32 [B, La]"""
    x = b.wide(hidden)
    norm = b.op("ReduceL2", x, b.ints([2]), keepdims=1)
    x = b.op("Div", x, b.op("Max", norm, b.number(SMALLEST_NORM)))
    sources, targets = (rows(b, x, b.int64(p)) for p in (lower, upper))
    cosine = b.op("MatMul", sources, b.op("Transpose", targets, perm=[0, 2, 1]))
    best = b.op("ArgMax", cosine, axis=2, keepdims=0, select_last_index=0)
    similarity = b.op("ReduceMax", cosine, b.ints([2]), keepdims=0)
    return similarity, b.op("GatherElements", upper, best, axis=1)


ONNX = OnnxOp("TokenMatch", ("hidden", "lower", "upper"), ("similarity", "target"), {}, body)
