"""The ONNX face: ``tokred::EmbedRmsNorm``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.gated_rms_norm.function import rms


def body(b: Body, input_ids: ir.Value, table: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    """normed [B, L, D] and the residual [B, L, D]"""
    rows = b.op("Gather", table, input_ids, axis=0)
    wide = b.wide(rows)
    normed = b.narrow(rms(b, wide, b.wide(weight), float(b.literal("eps"))))
    return normed, (wide if b.literal("residual_in_fp32") else rows)


ONNX = OnnxOp(
    name="EmbedRmsNorm",
    inputs=("input_ids", "table", "weight"),
    outputs=("normed", "residual"),
    attributes={"eps": float, "residual_in_fp32": int},
    body=body,
)
