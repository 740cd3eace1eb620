"""The k-th lowest of many keys inside one program, without sorting them.

Floats become integers of the same order; the k-th lowest is found from its highest bits down,
two bits at a time, by counting. Ties go to the lower position by a running count.
"""

# ruff: noqa: ANN001, ANN201, ANN202  Triton functions
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ascending_bits(x):
    """uint32 keys in the order of float32 ``x``; both zeros are one value."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _three_counts(keys, low, step):
    # Counts of at most 2^15 in three 20-bit fields of one sum.
    one = (keys < low + step).to(tl.int64)
    two = (keys < low + 2 * step).to(tl.int64)
    three = (keys < low + 3 * step).to(tl.int64)
    return one + (two << 20) + (three << 40)


@triton.jit
def _advance(low, step, counts, rank):
    field: tl.constexpr = (1 << 20) - 1
    steps = ((counts & field) < rank).to(tl.uint32)
    steps += (((counts >> 20) & field) < rank).to(tl.uint32)
    steps += ((counts >> 40) < rank).to(tl.uint32)
    return low + steps * step


@triton.jit
def kth_lowest(keys, rank):
    """The ``rank``-th lowest of uint32 ``keys`` (1 is the lowest)."""
    low = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        low = _advance(low, step, tl.sum(_three_counts(keys, low, step), axis=0), rank)
        step = step >> 2
    return low


@triton.jit
def lowest(keys, kth, rank):
    """Mask of the ``rank`` lowest keys, given the ``rank``-th; and its running count."""
    below = keys < kth
    equal = keys == kth
    # Two running counts of at most 2^15 in one sum.
    running = tl.cumsum(below.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
    ties = running >> 16
    room = rank - tl.sum(below.to(tl.int32), axis=0)
    mask = below | (equal & (ties <= room))
    return mask, (running & 65535) + tl.minimum(ties, room)
