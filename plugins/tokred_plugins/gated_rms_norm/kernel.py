"""The Triton kernel: one program a row and norm group, one pass."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.add_rms_norm.kernel import TACTICS, row_tactic
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose


@triton.jit
def gated_rms_norm_kernel(
    y, zxbcdt, weight, out,
    E: tl.constexpr, Z: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first = tl.program_id(1) * GROUP
    pieces: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK
    values = ()
    gates = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < GROUP
        x = tl.load(y + row * E + first + cols, mask=inside, other=0).to(tl.float32)
        z = tl.load(zxbcdt + row * Z + first + cols, mask=inside, other=0).to(tl.float32)
        gate = z / (1 + tl.exp(-z))
        if NORM_BEFORE_GATE:
            gates = gates + (gate,)
        else:
            x *= gate
        values = values + (x,)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares) / GROUP + EPS)
    for i in tl.static_range(pieces):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < GROUP
        w = tl.load(weight + first + cols, mask=inside, other=0).to(tl.float32)
        x = values[i] * scale * w
        if NORM_BEFORE_GATE:
            x *= gates[i]
        tl.store(out + row * E + first + cols, x.to(out.dtype.element_ty), mask=inside)


GATED_RMS_NORM = Kernel(
    "gated_rms_norm", gated_rms_norm_kernel, ("y", "zxbcdt", "weight"), (), ("out",), TACTICS
)


def calls(
    y: Spec, zxbcdt: Spec, weight: Spec, group_size: int, eps: float, norm_before_gate: bool,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.gated_rms_norm.op.gated_rms_norm`."""
    _, length, inner = y.shape
    call = Call(
        kernel=GATED_RMS_NORM,
        inputs={"y": y.dtype, "zxbcdt": zxbcdt.dtype, "weight": weight.dtype},
        extras={},
        outputs={"out": Spec(y.shape, y.dtype)},
        constants={
            "E": inner, "Z": zxbcdt.shape[2], "GROUP": group_size, "EPS": eps,
            "NORM_BEFORE_GATE": bool(norm_before_gate),
        },
        tactic=choose(GATED_RMS_NORM, tactics, row_tactic(group_size)),
        grid=(length, inner // group_size),
    )
    return (call,)
