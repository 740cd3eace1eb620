"""The Triton kernel: one program a survivor gathers it and adds the sources that merge into it.

Hidden states and residual are done in one pass. A program looks its sources up among all
targets, in order, so the result does not depend on who runs first and nothing is scattered.
"""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose


@triton.jit
def load_pieces(x, D: tl.constexpr, BLOCK: tl.constexpr):
    """One row as a tuple of float32 pieces."""
    pieces = ()
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        pieces = pieces + (tl.load(x + cols, mask=cols < D, other=0).to(tl.float32),)
    return pieces


@triton.jit
def add_pieces(pieces, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """The pieces plus the row at ``x``."""
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        more = tl.load(x + cols, mask=cols < D, other=0).to(tl.float32)
        pieces = pieces[1:] + (pieces[0] + more,)
    return pieces


@triton.jit
def store_pieces(pieces, count, out, D: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + cols, (pieces[i] / count).to(out.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["length", "removed"])
def token_reduce_kernel(
    hidden, residual, keep, src, dst, merge, length, removed, hidden_out, residual_out,
    D: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    me = tl.load(keep + row)
    hidden += batch * length * D
    residual += batch * length * D
    h = load_pieces(hidden + me.to(tl.int64) * D, D, BLOCK)
    r = load_pieces(residual + me.to(tl.int64) * D, D, BLOCK)
    h_count, r_count = 1.0, 1.0
    for first in range(0, removed, TARGETS):
        j = first + tl.arange(0, TARGETS)
        mine = tl.load(dst + batch * removed + j, mask=j < removed, other=-1) == me
        at = tl.min(tl.where(mine, j, removed), axis=0)
        while at < removed:
            source = tl.load(src + batch * removed + at).to(tl.int64) * D
            r = add_pieces(r, residual + source, D, BLOCK)
            r_count += 1
            if tl.load(merge + batch * removed + at):
                h = add_pieces(h, hidden + source, D, BLOCK)
                h_count += 1
            at = tl.min(tl.where(mine & (j > at), j, removed), axis=0)
    store_pieces(h, h_count, hidden_out + row * D, D, BLOCK)
    store_pieces(r, r_count, residual_out + row * D, D, BLOCK)


TACTICS = tuple(
    Tactic({"BLOCK": 256 * warps, "TARGETS": targets}, warps)
    for warps in (4, 2, 8, 1) for targets in (512, 1024)
)
TOKEN_REDUCE = Kernel(
    "token_reduce", token_reduce_kernel,
    ("hidden", "residual", "keep", "src", "dst", "merge"), ("length", "removed"),
    ("hidden_out", "residual_out"), TACTICS,
)


def calls(
    hidden: Spec, residual: Spec, keep: Spec, src: Spec, dst: Spec, merge: Spec,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_reduce.op.token_reduce`."""
    batch, length, width = hidden.shape
    kept = keep.shape[1]
    call = Call(
        kernel=TOKEN_REDUCE,
        inputs={
            "hidden": hidden.dtype, "residual": residual.dtype, "keep": keep.dtype,
            "src": src.dtype, "dst": dst.dtype, "merge": merge.dtype,
        },
        extras={"length": length, "removed": src.shape[1]},
        outputs={
            "hidden_out": Spec((batch, kept, width), hidden.dtype),
            "residual_out": Spec((batch, kept, width), residual.dtype),
        },
        constants={"D": width},
        tactic=choose(TOKEN_REDUCE, tactics, TACTICS[0]),
        grid=(kept, 1),
    )
    return (call,)
