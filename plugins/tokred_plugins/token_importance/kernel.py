"""The Triton kernel: a program takes a few tokens, in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.row_tiles import TACTICS, load_pieces, reading_tactic, rows_of


@triton.jit(do_not_specialize=["length"])
def token_importance_kernel(
    y, length, scores, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, there = rows_of(tl.program_id(0), length, ROWS)
    x = load_pieces(y + row * E, there, E, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(len(x)):
        total += tl.maximum(x[i], 0.0)
    tl.store(scores + row, tl.sum(total, axis=1)[:, None] / E, mask=there)


TOKEN_IMPORTANCE = Kernel(
    "token_importance", token_importance_kernel, ("y",), ("length",), ("scores",), TACTICS
)


def calls(y: Spec, tactics: Mapping[str, Tactic] | None = None) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_importance.op.token_importance`."""
    batch, length, inner = y.shape
    tactic = choose(TOKEN_IMPORTANCE, tactics, reading_tactic(inner))
    call = Call(
        kernel=TOKEN_IMPORTANCE,
        inputs={"y": y.dtype},
        extras={"length": length},
        outputs={"scores": Spec((batch, length), "fp32")},
        constants={"E": inner},
        tactic=tactic,
        grid=(cdiv(length, tactic.blocks["ROWS"]), 1),
    )
    return (call,)
