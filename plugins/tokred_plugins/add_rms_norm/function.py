"""The ONNX face: ``tokred::AddRmsNorm``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.gated_rms_norm.function import rms


def body(b: Body, hidden: ir.Value, residual: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    """normed [B, L, D] and the new residual [B, L, D]"""
    wide_residual = bool(b.literal("residual_in_fp32"))
    residual = residual if wide_residual else b.wide(residual)
    total = b.op("Add", b.wide(hidden), residual)
    normed = rms(b, total, b.wide(weight), float(b.literal("eps")))
    return b.narrow(normed), (total if wide_residual else b.narrow(total))


ONNX = OnnxOp(
    name="AddRmsNorm",
    inputs=("hidden", "residual", "weight"),
    outputs=("normed", "total"),
    attributes={"eps": float, "residual_in_fp32": int},
    body=body,
)
