"""The ONNX face: ``tokred::GatedRmsNorm``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp


def rms(b: Body, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * weight, in the form that ONNX Runtime fuses."""
    mean = b.mean(b.op("Pow", x, b.number(2.0)), -1)
    root = b.op("Sqrt", b.op("Add", mean, b.number(eps)))
    return b.op("Mul", b.op("Div", x, root), weight)


def body(b: Body, y: ir.Value, zxbcdt: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    """[B, L, E]"""
    inner, group = int(b.literal("inner")), int(b.literal("group_size"))
    before = bool(b.literal("norm_before_gate"))
    x, weight = b.wide(y), b.wide(weight)
    gate = b.sigmoid_times(b.wide(b.slice(zxbcdt, 2, 0, inner)))
    if not before:
        x = b.op("Mul", x, gate)
    if group != inner:
        x = b.reshape(x, 0, 0, inner // group, group)
        weight = b.reshape(weight, inner // group, group)
    x = rms(b, x, weight, float(b.literal("eps")))
    if group != inner:
        x = b.reshape(x, 0, 0, inner)
    if before:
        x = b.op("Mul", x, gate)
    return (b.narrow(x),)


ONNX = OnnxOp(
    name="GatedRmsNorm",
    inputs=("y", "zxbcdt", "weight"),
    outputs=("normed",),
    attributes={"inner": int, "group_size": int, "eps": float, "norm_before_gate": int},
    body=body,
)
