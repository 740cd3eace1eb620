"""Pieces of function bodies that pick tokens: exact k-th values, masks, ascending positions.

Every choice follows one total order, (score, position). TopK is used for values only, never
for its indices: ties are broken here by a cumulative sum over positions, so the result does
not depend on how a runtime's TopK orders equal values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokred_plugins._common import SENTINEL
from tokred_plugins.body import TOPK_LIMIT, Body


def cumulative(b: Body, mask: ir.Value) -> ir.Value:
    """int32 inclusive count of True along axis 1 of a bool [B, L]."""
    return b.op("CumSum", b.int32(mask), b.constant(np.asarray(1, dtype=np.int64)))


def lowest(b: Body, keys: ir.Value, count: ir.Value, most: int) -> ir.Value:
    """Mask of the ``count`` lowest keys by (key, position).

    Args:
        keys: float32 [B, L].
        count: int64 [1], static once the attribute is known.
        most: a literal upper bound of ``count``; above TensorRT's TopK limit the lowest keys
            are taken in several rounds of at most that many.

    Returns:
        bool [B, L] with exactly ``count`` True a row.
    """
    taken: ir.Value | None = None
    for start in range(0, max(most, 1), TOPK_LIMIT):
        left = b.op("Sub", count, b.ints([start]))
        k = b.op("Min", b.op("Max", left, b.ints([1])), b.ints([TOPK_LIMIT]))
        # In a round beyond ``count`` nothing is wanted; k stays 1 because TopK needs one.
        wanted = b.op("Min", b.op("Max", left, b.ints([0])), b.ints([TOPK_LIMIT]))
        now = keys if taken is None else b.op("Where", taken, b.number(SENTINEL * 1.1), keys)
        picked = _lowest_round(b, now, k, wanted)
        taken = picked if taken is None else b.op("Or", taken, picked)
    return taken


def _lowest_round(b: Body, keys: ir.Value, k: ir.Value, wanted: ir.Value) -> ir.Value:
    values = b.topk_values(keys, k, largest=False)
    kth = b.op("Gather", values, b.op("Sub", k, b.ints([1])), axis=1)  # [B, 1]
    below = b.op("Less", keys, kth)
    equal = b.op("Equal", keys, kth)
    room = b.op("Sub", b.int32(wanted), b.sum(b.int32(below), 1))  # [B, 1]
    tie = b.op("And", equal, b.op("LessOrEqual", cumulative(b, equal), room))
    picked = b.op("Or", below, tie)
    return b.op("And", picked, b.op("Greater", wanted, b.ints([0])))


def positions_of(b: Body, mask: ir.Value, count: ir.Value) -> ir.Value:
    """Ascending positions of the ``count`` True entries of each row.

    Args:
        mask: bool [B, L] with exactly ``count`` True a row.
        count: int64 [1].

    Returns:
        int64 [B, count].
    """
    batch, length = b.dim(mask, 0), b.dim(mask, 1)
    # True entries go to their rank; all others share one slot behind these, cut off below. The
    # target is as wide as the mask because TensorRT takes no more indices than it has places.
    rank = b.op("Sub", b.int64(cumulative(b, mask)), b.ints([1]))
    slot = b.op("Where", mask, rank, count)
    everywhere = b.op("Expand", b.unsqueeze(b.range(length), 0), b.shape(batch, length))
    width = b.op("Add", length, b.ints([1]))
    empty = b.op("Expand", b.constant(np.zeros((1, 1), np.int64)), b.shape(batch, width))
    packed = b.op("ScatterElements", empty, slot, everywhere, axis=1)
    return b.slice(packed, 1, 0, count)


def without(b: Body, positions: ir.Value, length: ir.Value) -> ir.Value:
    """Ascending positions of [0, length) not in ``positions`` (int64 [B, r] -> [B, L - r])."""
    batch, removed = b.dim(positions, 0), b.dim(positions, 1)
    ones = b.op("Expand", b.constant(np.ones((1, 1), np.int32)), b.shape(batch, length))
    zeros = b.op("Expand", b.constant(np.zeros((1, 1), np.int32)), b.op("Shape", positions))
    mask = b.op("ScatterElements", ones, positions, zeros, axis=1)
    mask = b.cast(mask, ir.DataType.BOOL)
    return positions_of(b, mask, b.op("Sub", length, removed))


def rows(b: Body, x: ir.Value, positions: ir.Value) -> ir.Value:
    """Rows of ``x`` [B, L, D] at int64 ``positions`` [B, K] -> [B, K, D]."""
    return b.op("GatherND", x, b.unsqueeze(positions, 2), batch_dims=1)
