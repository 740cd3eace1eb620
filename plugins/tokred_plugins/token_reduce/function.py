"""The ONNX face: ``tokred::TokenReduce``.

A scatter with a reduction is what TensorRT cannot do, so every source works out the finished
row of its target, and all rows are written over the survivors. Sources of one target write the
same row, so the order of writing does not matter. That is r x r work, not (L - r) x r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import rows


class Links(NamedTuple):
    """What both branches share.

    Attributes:
        kept: int64 [B, L - r + 1], the survivors and one spare row behind them.
        src: int64 [B, r].
        target: int64 [B, r], dst, or 0 where there is none.
        linked: bool [B, r], whether there is a target.
        together: bool [B, r, r], whether source i (last axis) has the target of source j.
        place: int64 [B, r, 2], row and survivor that j's target is, or the spare row.
    """

    kept: ir.Value
    src: ir.Value
    target: ir.Value
    linked: ir.Value
    together: ir.Value
    place: ir.Value


def links_of(b: Body, keep: ir.Value, src: ir.Value, dst: ir.Value) -> Links:
    """Index work on int32 keep [B, L - r], src and dst [B, r]."""
    zero = b.constant(np.asarray(0, np.int32))
    linked = b.op("GreaterOrEqual", dst, zero)
    mine, other = b.unsqueeze(dst, 2), b.unsqueeze(dst, 1)
    together = b.op("And", b.op("Equal", mine, other), b.unsqueeze(linked, 1))
    # A target's place among the survivors: its position less the sources before it.
    before = b.op("Less", b.unsqueeze(src, 1), mine)
    place = b.op("Sub", dst, b.sum(b.int32(before), 2, keepdims=0))
    place = b.op("Where", linked, b.int64(place), b.dim(keep, 1))
    batch = b.unsqueeze(b.range(b.dim(dst, 0)), 1)
    batch = b.op("Expand", batch, b.op("Shape", dst))
    spare = b.slice(b.op("Mul", keep, zero), 1, 0, 1)
    return Links(
        kept=b.int64(b.op("Concat", keep, spare, axis=1)),
        src=b.int64(src),
        target=b.int64(b.op("Max", dst, zero)),
        linked=linked,
        together=together,
        place=b.op("Concat", b.unsqueeze(batch, 2), b.unsqueeze(place, 2), axis=2),
    )


def merge_branch(b: Body, x: ir.Value, links: Links, acts: ir.Value) -> ir.Value:
    """One branch, float32 [B, L, D] -> [B, L - r, D]; ``acts`` bool [B, r]: links that merge."""
    weight = b.cast(b.op("And", links.together, b.unsqueeze(acts, 1)), ir.DataType.FLOAT)
    # What merges into nothing may be anything, even NaN, and 0 * NaN is not 0.
    sources = b.op("Where", b.unsqueeze(acts, 2), rows(b, x, links.src), b.number(0.0))
    total = b.op("Add", rows(b, x, links.target), b.op("MatMul", weight, sources))
    merged = b.op("Div", total, b.op("Add", b.sum(weight, 2), b.number(1.0)))
    written = b.op("ScatterND", rows(b, x, links.kept), links.place, merged)
    return b.slice(written, 1, 0, -1)


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
    links = links_of(b, keep, src, dst)
    wide_residual = bool(b.literal("residual_in_fp32"))
    acts = b.op("And", links.linked, merge)
    hidden = b.narrow(merge_branch(b, b.wide(hidden), links, acts))
    residual = residual if wide_residual else b.wide(residual)
    residual = merge_branch(b, residual, links, links.linked)
    return hidden, (residual if wide_residual else b.narrow(residual))


ONNX = OnnxOp(
    name="TokenReduce",
    inputs=("hidden", "residual", "keep", "src", "dst", "merge"),
    outputs=("hidden_out", "residual_out"),
    attributes={"residual_in_fp32": int},
    body=body,
)
