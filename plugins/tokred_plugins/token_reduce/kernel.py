"""The Triton kernels: one program a survivor gathers it and adds the sources that merge into it.

Hidden states and residual are done in one pass. A program looks its sources up among all
targets, in order, so the result does not depend on who runs first and nothing is scattered.
Most survivors have none and are copied. Sources are loaded several at a time: a token that many
merge into would otherwise wait for each of them in turn. ``token_reduce_norm`` goes on with the
norm that reads both: their sum is at hand, and neither is written.
"""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_selection import count
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose


@triton.jit
def load_row(x, there, D: tl.constexpr, BLOCK: tl.constexpr):
    """One row as a tuple of float32 pieces."""
    pieces = ()
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        pieces = pieces + (tl.load(x + cols, mask=there & (cols < D), other=0).to(tl.float32),)
    return pieces


@triton.jit
def add_rows(total, rows):
    """The pieces ``total`` plus those of each of the rows, in their order."""
    for i in tl.static_range(len(total)):
        piece = total[0]
        for k in tl.static_range(len(rows)):
            piece += rows[k][i]
        # The oldest entry is this piece: the tuple turns once round.
        total = total[1:] + (piece,)
    return total


@triton.jit
def store_mean(total, parts, out, D: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(len(total)):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + cols, (total[i] / parts).to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def merged(
    hidden, residual, keep, src, dst, merge, length, removed, row,
    D: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr, SOURCES: tl.constexpr,
):
    """The sums of one survivor's hidden states and residual, and of how many rows each is."""
    batch = tl.program_id(2).to(tl.int64)
    me = tl.load(keep + row)
    hidden += batch * length * D
    residual += batch * length * D
    src += batch * removed
    dst += batch * removed
    merge += batch * removed
    j = tl.arange(0, TARGETS)
    targets = tl.load(dst + j, mask=j < removed, other=-1)
    h = load_row(hidden + me.to(tl.int64) * D, True, D, BLOCK)
    r = load_row(residual + me.to(tl.int64) * D, True, D, BLOCK)
    h_parts, r_parts = 1.0, 1.0
    for first in range(0, removed, TARGETS):
        if first > 0:
            targets = tl.load(dst + first + j, mask=first + j < removed, other=-1)
        mine = targets == me
        found = count(mine)
        if found > 0:
            nth = tl.where(mine, tl.cumsum(mine.to(tl.int32), axis=0), 0)
            for done in range(0, found, SOURCES):
                h_rows = ()
                r_rows = ()
                for k in tl.static_range(SOURCES):
                    there = done + k < found
                    at = first + tl.sum(tl.where(nth == done + k + 1, j, 0), axis=0)
                    source = tl.load(src + at, mask=there, other=0).to(tl.int64) * D
                    merges = tl.load(merge + at, mask=there, other=0) != 0
                    r_rows = r_rows + (load_row(residual + source, there, D, BLOCK),)
                    h_rows = h_rows + (load_row(hidden + source, merges, D, BLOCK),)
                    h_parts += merges.to(tl.float32)
                r = add_rows(r, r_rows)
                h = add_rows(h, h_rows)
            r_parts += found
    return h, r, h_parts, r_parts


@triton.jit
def survivor():
    """This program's row of what is written."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit(do_not_specialize=["length", "removed"])
def token_reduce_kernel(
    hidden, residual, keep, src, dst, merge, length, removed, hidden_out, residual_out,
    D: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr, SOURCES: tl.constexpr,
):
    row = survivor()
    h, r, h_parts, r_parts = merged(
        hidden, residual, keep, src, dst, merge, length, removed, row, D, BLOCK, TARGETS, SOURCES
    )
    store_mean(h, h_parts, hidden_out + row * D, D, BLOCK)
    store_mean(r, r_parts, residual_out + row * D, D, BLOCK)


@triton.jit(do_not_specialize=["length", "removed"])
def token_reduce_norm_kernel(
    hidden, residual, keep, src, dst, merge, weight, length, removed, normed, residual_out,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    row = survivor()
    h, r, h_parts, r_parts = merged(
        hidden, residual, keep, src, dst, merge, length, removed, row, D, BLOCK, TARGETS, SOURCES
    )
    w = load_row(weight, True, D, BLOCK)  # before the sum: it would come late after it
    squares = tl.zeros((BLOCK,), tl.float32)
    total = ()
    for i in tl.static_range(len(h)):
        total = total + (h[i] / h_parts + r[i] / r_parts,)
        squares += total[i] * total[i]
    scale = tl.rsqrt(tl.sum(squares, axis=0) / D + EPS)
    for i in tl.static_range(len(h)):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        out = row * D + cols
        tl.store(residual_out + out, total[i].to(residual_out.dtype.element_ty), mask=cols < D)
        y = total[i] * scale * w[i]
        tl.store(normed + out, y.to(normed.dtype.element_ty), mask=cols < D)


TACTICS = tuple(
    Tactic({"BLOCK": 256 * warps, "TARGETS": 512, "SOURCES": sources}, warps)
    for warps, sources in ((4, 4), (4, 2), (4, 1), (2, 2), (8, 2))
)
TOKEN_REDUCE = Kernel(
    "token_reduce", token_reduce_kernel,
    ("hidden", "residual", "keep", "src", "dst", "merge"), ("length", "removed"),
    ("hidden_out", "residual_out"), TACTICS,
)
TOKEN_REDUCE_NORM = Kernel(
    "token_reduce_norm", token_reduce_norm_kernel,
    ("hidden", "residual", "keep", "src", "dst", "merge", "weight"), ("length", "removed"),
    ("normed", "residual_out"), TACTICS,
)


def reduce_tactic(programs: int, width: int) -> Tactic:
    """More sources at a time where the longest list of them decides; fewer, for their registers,
    where rows are wide or programs many."""
    return TACTICS[width > 2048 or programs > 4096]


def calls(
    hidden: Spec, residual: Spec, keep: Spec, src: Spec, dst: Spec, merge: Spec,
    tactics: Mapping[str, Tactic] | None = None, weight: Spec | None = None, eps: float = 0.0,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_reduce.op.token_reduce`.

    With a ``weight`` [D] also of :func:`tokred_plugins.add_rms_norm.op.add_rms_norm` of both
    branches and ``eps``, in one: ``normed`` in the place of ``hidden_out``, and ``residual_out`` is
    the sum. The merged branches are not rounded in between.
    """
    batch, length, width = hidden.shape
    kept = keep.shape[1]
    kernel = TOKEN_REDUCE if weight is None else TOKEN_REDUCE_NORM
    inputs = {
        "hidden": hidden.dtype, "residual": residual.dtype, "keep": keep.dtype,
        "src": src.dtype, "dst": dst.dtype, "merge": merge.dtype,
    }
    constants = {"D": width}
    if weight is not None:
        inputs["weight"], constants["EPS"] = weight.dtype, eps
    call = Call(
        kernel=kernel,
        inputs=inputs,
        extras={"length": length, "removed": src.shape[1]},
        outputs={
            kernel.outputs[0]: Spec((batch, kept, width), hidden.dtype),
            "residual_out": Spec((batch, kept, width), residual.dtype),
        },
        constants=constants,
        tactic=choose(kernel, tactics, reduce_tactic(batch * kept, width)),
        grid=(kept, 1),
    )
    return (call,)
