"""The ONNX face: ``tokred::TokenImportance``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp


def body(b: Body, y: ir.Value) -> Sequence[ir.Value]:
    """float32 [B, L]"""
    return (b.mean(b.op("Relu", b.wide(y)), 2, keepdims=0),)


ONNX = OnnxOp("TokenImportance", ("y",), ("scores",), {}, body)
