"""The Triton kernel: one program a token, one pass."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.add_rms_norm.kernel import TACTICS, row_tactic
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose


@triton.jit
def token_importance_kernel(y, scores, E: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range((E + BLOCK - 1) // BLOCK):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(y + row * E + cols, mask=cols < E, other=0).to(tl.float32)
        total += tl.maximum(x, 0.0)
    tl.store(scores + row, tl.sum(total) / E)


TOKEN_IMPORTANCE = Kernel(
    "token_importance", token_importance_kernel, ("y",), (), ("scores",), TACTICS
)


def calls(y: Spec, tactics: Mapping[str, Tactic] | None = None) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_importance.op.token_importance`."""
    batch, length, inner = y.shape
    call = Call(
        kernel=TOKEN_IMPORTANCE,
        inputs={"y": y.dtype},
        extras={},
        outputs={"scores": Spec((batch, length), "fp32")},
        constants={"E": inner},
        tactic=choose(TOKEN_IMPORTANCE, tactics, row_tactic(inner)),
        grid=(length, 1),
    )
    return (call,)
