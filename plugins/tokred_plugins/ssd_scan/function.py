"""The ONNX faces: ``tokred::SsdScan`` from a zero state, ``tokred::SsdScanFrom`` from a given one.

The scan is written as batched matrix products in the layout [B, G, H/G, c, Q, .] so that two
transposes (in and out) are all the data movement. Three foldings keep the number of passes
over [.., Q, Q] and [.., Q, P] small, since runtimes without plugins fuse little:
dt_j enters the exponent as log dt_j; the causal mask multiplies C B^T, which is H/G times
smaller than the decays; D sits on the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp
from tokred_plugins.ssd_scan.op import FORGOTTEN

# Above the diagonal the exponent may be large, and is multiplied by an exact zero: keep it finite.
LARGEST_EXPONENT = 80.0


def body(
    b: Body,
    xbc: ir.Value,
    zxbcdt: ir.Value,
    dt_bias: ir.Value,
    a_log: ir.Value,
    d: ir.Value,
    pads: ir.Value,
    initial_state: ir.Value | None = None,
) -> Sequence[ir.Value]:
    """y [B, L, E] and the final state float32 [B, H, P, N]."""
    heads, head_dim, groups, states, chunk = (
        int(b.literal(n)) for n in ("heads", "head_dim", "n_groups", "d_state", "chunk_size")
    )
    inner, share = heads * head_dim, heads // groups
    length = b.dim(xbc, 1)
    dt = _time_steps(b, zxbcdt, dt_bias, pads, length)
    ragged = any(n % chunk for n in b.lengths)
    if ragged:
        fill = b.op("Mod", b.op("Neg", length), b.ints([chunk]))
        ends = b.op("Concat", b.ints([0, 0, 0, 0]), fill, b.ints([0]), axis=0)
        xbc, dt = b.op("Pad", xbc, ends), b.op("Pad", dt, ends)
    x, keys, queries = b.split(b.wide(xbc), [inner, groups * states, groups * states], axis=2)

    def chunked(v: ir.Value, heads_per_group: int, size: int) -> ir.Value:
        # -> [B, G, H/G or 1, c, Q, size]
        v = b.reshape(v, b.dim(v, 0), -1, chunk, groups, heads_per_group, size)
        return b.op("Transpose", v, perm=[0, 3, 4, 1, 2, 5])

    x = chunked(x, share, head_dim)
    keys, queries = chunked(keys, 1, states), chunked(queries, 1, states)
    dt = b.op("Squeeze", chunked(dt, share, 1), b.ints([5]))  # [B, G, H/G, c, Q]

    a = b.reshape(b.op("Neg", b.op("Exp", a_log)), groups, share, 1, 1)
    decay = b.op("Max", b.op("Mul", dt, a), b.number(FORGOTTEN))
    total = b.op("CumSum", decay, b.constant(np.asarray(4, np.int64)))
    keys_t = b.op("Transpose", keys, perm=[0, 1, 2, 3, 5, 4])

    # 1. Within a chunk
    source = b.op("Sub", total, b.op("Log", dt))  # exp(total_i - source_j) = decay * dt_j
    exponent = b.op("Sub", b.unsqueeze(total, 5), b.unsqueeze(source, 4))
    exponent = b.op("Min", exponent, b.number(LARGEST_EXPONENT))
    causal = b.constant(np.tril(np.ones((chunk, chunk), np.float32)))
    scores = b.op("Mul", b.op("MatMul", queries, keys_t), causal)
    scores = b.op("Mul", b.op("Exp", exponent), scores)
    diagonal = b.constant(np.eye(chunk, dtype=np.float32))
    skip = b.op("Mul", b.reshape(d, groups, share, 1, 1, 1), diagonal)
    y = b.op("MatMul", b.op("Add", scores, skip), x)

    # 2. What each chunk adds to the state, [.., c, N, P]
    last = b.slice(total, 4, -1, np.iinfo(np.int64).max)  # [B, G, H/G, c, 1]
    weight = b.op("Mul", b.op("Exp", b.op("Sub", last, total)), dt)
    added = b.op("MatMul", keys_t, b.op("Mul", x, b.unsqueeze(weight, 5)))

    # 3. States at the chunk starts and at the end
    starts, final = _pass_states(b, last, added, initial_state)

    # 4. What the state at the chunk's start contributes
    carried = b.op("MatMul", queries, starts)
    y = b.op("Add", y, b.op("Mul", carried, b.unsqueeze(b.op("Exp", total), 5)))
    y = b.op("Transpose", y, perm=[0, 3, 4, 1, 2, 5])
    y = b.reshape(y, b.dim(y, 0), -1, inner)
    if ragged:
        y = b.slice(y, 1, 0, length)
    final = b.op("Transpose", final, perm=[0, 1, 2, 4, 3])
    return b.narrow(y), b.reshape(final, b.dim(final, 0), heads, head_dim, states)


def _time_steps(
    b: Body, zxbcdt: ir.Value, dt_bias: ir.Value, pads: ir.Value, length: ir.Value
) -> ir.Value:
    """dt float32 [B, L, H]: softplus, clamp, zero on padding."""
    raw = b.wide(b.slice(zxbcdt, 2, -int(b.literal("heads")), np.iinfo(np.int64).max))
    dt = b.op("Softplus", b.op("Add", raw, dt_bias))
    dt = b.op("Clip", dt, b.number(b.literal("dt_min")), b.number(b.literal("dt_max")))
    real = b.op("GreaterOrEqual", b.int32(b.range(length)), b.unsqueeze(pads, 1))
    return b.op("Where", b.unsqueeze(real, 2), dt, b.number(0.0))


def _pass_states(
    b: Body, last: ir.Value, added: ir.Value, initial: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Chunk states as one matrix product over chunks, instead of a loop over them.

    The state at the start of chunk k is sum over j < k of exp(gap[k, j]) added[j], where
    gap[k, j] is the log decay of chunks j + 1 to k - 1. The gaps are summed as such: taken as
    differences of one running sum they would lose digits with every strong decay before them.

    Args:
        last: log decay of each whole chunk [B, G, H/G, c, 1].
        added: [B, G, H/G, c, N, P].
        initial: [B, H, P, N] or None.

    Returns:
        States at chunk starts [B, G, H/G, c, N, P] and at the end [B, G, H/G, N, P].
    """
    heads, head_dim, groups, states = (
        int(b.literal(n)) for n in ("heads", "head_dim", "n_groups", "d_state")
    )
    chunks = b.constant(np.asarray(3, np.int64))  # the axis of chunks
    index = b.range(b.dim(last, 3))
    earlier = b.op("Less", b.unsqueeze(index, 0), b.unsqueeze(index, 1))  # [c, c]: j < k
    later = b.op("Mul", last, b.cast(earlier, ir.DataType.FLOAT))
    gap = b.op("CumSum", later, chunks, exclusive=1)  # [.., c, c]
    mix = b.op("Where", earlier, b.op("Exp", gap), b.number(0.0))
    to_end = b.slice(b.op("CumSum", later, chunks), 3, -1, np.iinfo(np.int64).max)  # [.., 1, c]
    flat = b.reshape(added, b.dim(added, 0), groups, heads // groups, -1, states * head_dim)
    starts = b.op("MatMul", mix, flat)
    final = b.op("MatMul", b.op("Exp", to_end), flat)  # [.., 1, N P]
    if initial is not None:
        first = b.reshape(
            b.op("Transpose", initial, perm=[0, 1, 3, 2]),
            b.dim(initial, 0), groups, heads // groups, 1, states * head_dim,
        )
        before = b.op("CumSum", last, chunks, exclusive=1)
        all_of_it = b.sum(last, 3)
        starts = b.op("Add", starts, b.op("Mul", b.op("Exp", before), first))
        final = b.op("Add", final, b.op("Mul", b.op("Exp", all_of_it), first))
    starts = b.reshape(starts, b.dim(starts, 0), groups, heads // groups, -1, states, head_dim)
    final = b.reshape(final, b.dim(final, 0), groups, heads // groups, states, head_dim)
    return starts, final


ATTRIBUTES = {
    "heads": int, "head_dim": int, "n_groups": int, "d_state": int, "chunk_size": int,
    "dt_min": float, "dt_max": float,
}
INPUTS = ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads")
ONNX = OnnxOp("SsdScan", INPUTS, ("y", "state"), ATTRIBUTES, body)
ONNX_FROM = OnnxOp("SsdScanFrom", (*INPUTS, "initial_state"), ("y", "state"), ATTRIBUTES, body)
