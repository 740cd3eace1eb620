"""The Triton kernel: a program walks down ROWS tokens of BLOCK channels.

The last K - 1 inputs stay in registers, so every input is read once (but for the K - 1 rows
above a program's first). All loads come before the first use and the first store: the compiler
cannot know that they do not overlap, and each would wait for the one before it.
"""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_math import silu
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose, power_of_two


@triton.jit
def load_rows(x, first, pad, length, inside, Z: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows from ``first`` on; padding and rows outside of the sequence are zero."""
    rows = ()
    for i in tl.static_range(COUNT):
        row = first + i
        real = (row >= pad) & (row < length)
        rows = rows + (tl.load(x + row.to(tl.int64) * Z, mask=inside & real, other=0),)
    return rows


@triton.jit(do_not_specialize=["length"])
def causal_conv1d_kernel(
    zxbcdt, weight, bias, pads, length, y, state,
    Z: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    batch = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = tl.program_id(1) * ROWS
    pad = tl.maximum(tl.load(pads + batch), 0)
    x = zxbcdt + batch.to(tl.int64) * length * Z + OFFSET + cols
    out = y + batch.to(tl.int64) * length * C + cols

    rows = load_rows(x, first - (K - 1), 0, length, inside, Z, ROWS + K - 1)
    # One wide load of all taps, then one vector a tap.
    taps = tl.arange(0, TAPS)
    w = tl.load(
        weight + cols[:, None] * K + taps[None, :],
        mask=inside[:, None] & (taps < K)[None, :], other=0,
    ).to(tl.float32)
    b = tl.load(bias + cols, mask=inside, other=0).to(tl.float32)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.sum(tl.where(taps[None, :] == k, w, 0.0), axis=1),)
    # Padding counts as zero, whatever lies there. Had the first loads masked it, they would all
    # have waited for its count.
    if pad > first - (K - 1):
        rows = load_rows(x, first - (K - 1), pad, length, inside, Z, ROWS + K - 1)
    history = ()
    for k in tl.static_range(K - 1):
        history = history + (rows[k].to(tl.float32),)

    for i in tl.static_range(ROWS):
        history = history + (rows[K - 1 + i].to(tl.float32),)
        acc = b
        for k in tl.static_range(K):
            acc += weights[k] * history[k]
        row = (first + i).to(tl.int64)
        tl.store(out + row * C, silu(acc).to(y.dtype.element_ty), mask=inside & (row < length))
        history = history[1:]

    if tl.program_id(1) == tl.num_programs(1) - 1:
        # The inputs a decode step continues from, in their own dtype.
        kept = load_rows(x, length - (K - 1), pad, length, inside, Z, K - 1)
        for k in tl.static_range(K - 1):
            slot = state + (batch.to(tl.int64) * C + cols) * (K - 1) + k
            tl.store(slot, kept[k].to(state.dtype.element_ty), mask=inside)


TACTICS = tuple(
    Tactic({"ROWS": rows, "BLOCK": 256 * warps}, warps)
    for rows, warps in ((8, 1), (16, 1), (4, 1), (32, 1), (8, 2), (8, 4), (16, 4), (4, 4))
)
CAUSAL_CONV1D = Kernel(
    "causal_conv1d", causal_conv1d_kernel,
    ("zxbcdt", "weight", "bias", "pads"), ("length",), ("y", "state"), TACTICS,
)


def calls(
    zxbcdt: Spec, weight: Spec, bias: Spec, pads: Spec, offset: int,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.causal_conv1d.op.causal_conv1d`."""
    batch, length, columns = zxbcdt.shape
    channels, taps = weight.shape
    tactic = choose(CAUSAL_CONV1D, tactics, TACTICS[0])
    call = Call(
        kernel=CAUSAL_CONV1D,
        inputs={
            "zxbcdt": zxbcdt.dtype, "weight": weight.dtype, "bias": bias.dtype,
            "pads": pads.dtype,
        },
        extras={"length": length},
        outputs={
            "y": Spec((batch, length, channels), zxbcdt.dtype),
            "state": Spec((batch, channels, taps - 1), zxbcdt.dtype),
        },
        constants={
            "Z": columns, "OFFSET": offset, "C": channels, "K": taps,
            "TAPS": power_of_two(taps),
        },
        tactic=tactic,
        grid=(cdiv(channels, tactic.blocks["BLOCK"]), cdiv(length, tactic.blocks["ROWS"])),
    )
    return (call,)
