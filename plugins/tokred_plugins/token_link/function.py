"""The ONNX face: ``tokred::TokenLink``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins._common import SENTINEL
from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.selection import lowest, positions_of, without


def body(
    b: Body,
    similarity: ir.Value,
    target: ir.Value,
    lower: ir.Value,
    upper: ir.Value,
    pads: ir.Value,
) -> Sequence[ir.Value]:
    """src, dst int32 [B, r], merge bool [B, r], keep int32 [B, L - r]"""
    removed = b.attribute("removed")
    padding = b.op("Less", lower, b.unsqueeze(pads, 1))
    # Ascending order of the negated similarity: the strongest link is the lowest key.
    keys = b.op("Where", padding, b.number(-SENTINEL), b.op("Neg", similarity))
    index = positions_of(b, lowest(b, keys, removed, b.largest("removed")), removed)
    keys = b.op("GatherElements", keys, index, axis=1)  # [B, r]
    src = b.op("GatherElements", lower, index, axis=1)

    r = b.int32(removed)
    n_pad = b.op("Min", b.sum(b.int32(padding), 1), r)  # [B, 1]
    links = b.op("Sub", r, n_pad)
    scaled = b.op("Mul", links, b.int32(b.attribute("prune_permille")))
    n_prune = b.op("Div", scaled, b.constant(np.asarray([1000], np.int32)))
    merge = b.op("GreaterOrEqual", _ranks(b, keys), b.op("Add", n_pad, n_prune))

    linked = b.op("GatherElements", target, index, axis=1)
    is_pad = b.op("Less", src, b.unsqueeze(pads, 1))
    dst = b.op("Where", is_pad, b.constant(np.asarray(-1, np.int32)), linked)
    length = b.op("Add", b.dim(lower, 1), b.dim(upper, 1))
    return src, dst, merge, b.int32(without(b, b.int64(src), length))


def _ranks(b: Body, keys: ir.Value) -> ir.Value:
    """int32 rank of each of ``keys`` [B, r] by (key, position), by comparing all pairs."""
    mine, other = b.unsqueeze(keys, 2), b.unsqueeze(keys, 1)
    index = b.range(b.dim(keys, 1))
    earlier = b.op("Less", b.unsqueeze(index, 0), b.unsqueeze(index, 1))  # [r, r]: j < i
    tie = b.op("And", b.op("Equal", mine, other), earlier)
    before = b.op("Or", b.op("Less", other, mine), tie)
    return b.sum(b.int32(before), 2, keepdims=0)


ONNX = OnnxOp(
    name="TokenLink",
    inputs=("similarity", "target", "lower", "upper", "pads"),
    outputs=("src", "dst", "merge", "keep"),
    attributes={"removed": int, "prune_permille": int},
    body=body,
)
