"""The Triton kernel: a program takes one norm group of a few rows, in one pass."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_math import silu
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.row_tiles import (
    TACTICS,
    load_pieces,
    load_vector,
    piece_mask,
    row_tactic,
    rows_of,
)


@triton.jit
def gated_rows(
    y, zxbcdt, weight, out, row, there, first,
    E: tl.constexpr, Z: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write one group of some rows; returns y as it was read."""
    x = load_pieces(y + row * E + first, there, GROUP, BLOCK)
    z = load_pieces(zxbcdt + row * Z + first, there, GROUP, BLOCK)
    w = load_vector(weight + first, GROUP, BLOCK)  # before the sum: it would come late after it
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    values = ()
    for i in tl.static_range(len(x)):
        values = values + (x[i] if NORM_BEFORE_GATE else x[i] * silu(z[i]),)
        squares += values[i] * values[i]
    scale = tl.rsqrt(tl.sum(squares, axis=1) / GROUP + EPS)[:, None]
    for i in tl.static_range(len(x)):
        cols, mask = piece_mask(i, there, GROUP, BLOCK)
        normed = values[i] * scale * w[i]
        if NORM_BEFORE_GATE:
            normed *= silu(z[i])
        tl.store(out + row * E + first + cols, normed.to(out.dtype.element_ty), mask=mask)
    return x


@triton.jit(do_not_specialize=["length"])
def gated_rms_norm_kernel(
    y, zxbcdt, weight, length, out,
    E: tl.constexpr, Z: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, there = rows_of(tl.program_id(0), length, ROWS)
    gated_rows(
        y, zxbcdt, weight, out, row, there, tl.program_id(1) * GROUP,
        E, Z, GROUP, EPS, NORM_BEFORE_GATE, ROWS, BLOCK,
    )


@triton.jit(do_not_specialize=["length"])
def gated_rms_norm_scores_kernel(
    y, zxbcdt, weight, length, out, scores,
    E: tl.constexpr, Z: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, there = rows_of(tl.program_id(0), length, ROWS)
    x = gated_rows(
        y, zxbcdt, weight, out, row, there, 0,
        E, Z, GROUP, EPS, NORM_BEFORE_GATE, ROWS, BLOCK,
    )
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(len(x)):
        total += tl.maximum(x[i], 0.0)
    tl.store(scores + row, tl.sum(total, axis=1)[:, None] / E, mask=there)


INPUTS = ("y", "zxbcdt", "weight")
GATED_RMS_NORM = Kernel(
    "gated_rms_norm", gated_rms_norm_kernel, INPUTS, ("length",), ("out",), TACTICS
)
GATED_RMS_NORM_SCORES = Kernel(
    "gated_rms_norm_scores", gated_rms_norm_scores_kernel, INPUTS, ("length",),
    ("out", "scores"), TACTICS,
)


def calls(
    y: Spec, zxbcdt: Spec, weight: Spec, group_size: int, eps: float, norm_before_gate: bool,
    tactics: Mapping[str, Tactic] | None = None, scores: bool = False,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.gated_rms_norm.op.gated_rms_norm`.

    Args:
        y, zxbcdt, weight, group_size, eps, norm_before_gate: the op's arguments.
        tactics: kernel name -> tactic, where not the default.
        scores: also leave what ``token_importance`` gives for ``y``, which is at hand here.

    Raises:
        ValueError: scores asked for where a row is normalised in several groups.
    """
    batch, length, inner = y.shape
    if scores and group_size != inner:
        raise ValueError(
            f"scores come with norm groups of the whole row, found {group_size} of {inner} "
            "channels; run token_importance instead"
        )
    kernel = GATED_RMS_NORM_SCORES if scores else GATED_RMS_NORM
    tactic = choose(kernel, tactics, row_tactic(group_size))
    outputs = {"out": Spec(y.shape, y.dtype)}
    if scores:
        outputs["scores"] = Spec((batch, length), "fp32")
    call = Call(
        kernel=kernel,
        inputs={"y": y.dtype, "zxbcdt": zxbcdt.dtype, "weight": weight.dtype},
        extras={"length": length},
        outputs=outputs,
        constants={
            "E": inner, "Z": zxbcdt.shape[2], "GROUP": group_size, "EPS": eps,
            "NORM_BEFORE_GATE": bool(norm_before_gate),
        },
        tactic=tactic,
        grid=(cdiv(length, tactic.blocks["ROWS"]), inner // group_size),
    )
    return (call,)
