"""The Triton kernels: cosines tile by tile, keeping each row's best; never the whole matrix.

The first kernel leaves every token's inverse norm, so that the second only multiplies: products
of the raw vectors run on the tensor cores with float32 accumulation and are scaled at the end.
The partners are split over programs so that few tokens still fill the GPU; a third kernel picks
the best of the splits.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.aot import SHARED_LIMITS
from tokred_plugins.faces import MULTIPROCESSORS
from tokred_plugins.kernels import PRECISION, Call, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.row_tiles import TACTICS as ROW_TACTICS
from tokred_plugins.row_tiles import reading_tactic, store_inverse_norms

# Programs that fill the GPU, a multiprocessor.
EACH = 2
# The tactic with the widest tiles, and bytes of the operands that it has in flight.
WIDE, WIDE_BYTES = 9, 3 * (128 + 256) * 64 * 2


@triton.jit(do_not_specialize=["length"])
def token_norm_kernel(
    hidden, length, inverse, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    store_inverse_norms(hidden, tl.program_id(0), length, inverse, D, ROWS, BLOCK)


@triton.jit(do_not_specialize=["length", "n_lower", "n_upper", "share"])
def token_match_kernel(
    hidden, inverse, lower, upper, length, n_lower, n_upper, share, best, place,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    hidden += batch * length * D
    inverse += batch * length
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)
    row_a = tl.load(lower + batch * n_lower + a, mask=a < n_lower, other=0).to(tl.int64)
    norm_a = tl.load(inverse + row_a)
    winner = tl.full((BLOCK_A,), -1, tl.int32)
    value = tl.full((BLOCK_A,), float("-inf"), tl.float32)

    for first in range(part * share, tl.minimum((part + 1) * share, n_upper), BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        position = tl.load(upper + batch * n_upper + b, mask=b < n_upper, other=0)
        row_b = position.to(tl.int64)
        dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for k in range(0, D, BLOCK_D):
            inside = (k + d < D)[None, :]
            x = tl.load(hidden + row_a[:, None] * D + k + d[None, :], mask=inside, other=0)
            z = tl.load(hidden + row_b[:, None] * D + k + d[None, :], mask=inside, other=0)
            dots = tl.dot(x, tl.trans(z), acc=dots, input_precision=PRECISION)
        cosine = dots * norm_a[:, None] * tl.load(inverse + row_b)[None, :]
        # NaN (poisoned padding) is nobody's partner.
        valid = (cosine == cosine) & (b < n_upper)[None, :]
        cosine = tl.where(valid, cosine, float("-inf"))
        now = tl.max(cosine, axis=1)
        # Positions ascend: the lowest of equally similar partners is the first.
        best_here = cosine == now[:, None]
        found = tl.min(tl.where(best_here, position[None, :], 2147483647), axis=1)
        better = now > value  # a tie keeps the earlier partner
        value = tl.where(better, now, value)
        winner = tl.where(better, found, winner)
    slot = (batch * parts + part) * n_lower + a
    tl.store(best + slot, value, mask=a < n_lower)
    tl.store(place + slot, winner, mask=a < n_lower)


@triton.jit(do_not_specialize=["n_lower", "parts"])
def token_match_best_kernel(
    best, place, n_lower, parts, similarity, target, BLOCK: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = a < n_lower
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.full((BLOCK,), -1, tl.int32)
    for part in range(parts):
        slot = (batch * parts + part) * n_lower + a
        now = tl.load(best + slot, mask=inside, other=0)
        found = tl.load(place + slot, mask=inside, other=0)
        better = now > value
        value = tl.where(better, now, value)
        winner = tl.where(better, found, winner)
    tl.store(similarity + batch * n_lower + a, value, mask=inside)
    tl.store(target + batch * n_lower + a, winner, mask=inside)


TOKEN_NORM = Kernel(
    "token_norm", token_norm_kernel, ("hidden",), ("length",), ("inverse",), ROW_TACTICS
)
TOKEN_MATCH = Kernel(
    "token_match", token_match_kernel,
    ("hidden", "inverse", "lower", "upper"), ("length", "n_lower", "n_upper", "share"),
    ("best", "place"),
    tuple(
        Tactic({"BLOCK_A": a, "BLOCK_B": b, "BLOCK_D": d}, warps, stages)
        for a, b, d, warps, stages in (
            (64, 128, 64, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 4),
            (64, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 64, 128, 4, 3), (128, 64, 128, 4, 2),
            (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
        )
    ),
)
TOKEN_MATCH_BEST = Kernel(
    "token_match_best", token_match_best_kernel,
    ("best", "place"), ("n_lower", "parts"), ("similarity", "target"),
    tuple(Tactic({"BLOCK": 32 * warps}, warps) for warps in (2, 1, 4)),
)


def tile_tactic(
    dtype: str, batch: int, n_lower: int, n_upper: int, programs: int, target: int | None = None
) -> Tactic:
    """The largest tiles of which there are enough to fill the GPU, and whose operands fit."""
    if dtype == "fp32":
        return TOKEN_MATCH.tactics[4]

    def tiles(tactic: Tactic) -> int:
        a, b = tactic.blocks["BLOCK_A"], tactic.blocks["BLOCK_B"]
        return batch * cdiv(n_lower, a) * cdiv(n_upper, b)

    small, large, wide = (TOKEN_MATCH.tactics[i] for i in (0, 1, WIDE))
    # Before 9.0 operands take registers too, of which sums of the widest leave none. One program
    # with them fits a multiprocessor: they must be most of two rounds.
    fits = target is not None and target >= 90 and SHARED_LIMITS.get(target, 0) >= WIDE_BYTES
    if fits and 2 * EACH * tiles(wide) >= 3 * programs:
        return wide
    return large if tiles(large) >= programs else small


def calls(
    hidden: Spec, lower: Spec, upper: Spec, tactics: Mapping[str, Tactic] | None = None,
    programs: int = EACH * MULTIPROCESSORS, inverse: Spec | None = None,
    target: int | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_match.op.token_match`.

    Args:
        hidden, lower, upper: the op's inputs.
        tactics: kernel name -> tactic, where not the default.
        programs: as many as fill the GPU; the upper tokens are shared out among so many.
        inverse: of one over the norm of each token, float32 [B, L], where another kernel has left
            it: then none is launched for it.
        target: compute capability times ten, where known; without, tiles are taken that fit all.
    """
    batch, length, width = hidden.shape
    n_lower, n_upper = lower.shape[1], upper.shape[1]
    default = tile_tactic(hidden.dtype, batch, n_lower, n_upper, programs, target)
    tactic = choose(TOKEN_MATCH, tactics, default)
    rows = cdiv(n_lower, tactic.blocks["BLOCK_A"])
    tiles = cdiv(n_upper, tactic.blocks["BLOCK_B"])
    parts = max(1, min(tiles, cdiv(programs, batch * rows)))
    share = cdiv(tiles, parts) * tactic.blocks["BLOCK_B"]
    parts = max(1, cdiv(n_upper, share))
    pick = choose(TOKEN_MATCH_BEST, tactics, TOKEN_MATCH_BEST.tactics[0])
    norms = choose(TOKEN_NORM, tactics, reading_tactic(width))
    found = (batch, n_lower)
    norm = Call(
        kernel=TOKEN_NORM,
        inputs={"hidden": hidden.dtype},
        extras={"length": length},
        outputs={"inverse": Spec((batch, length), "fp32")},
        constants={"D": width},
        tactic=norms,
        grid=(cdiv(length, norms.blocks["ROWS"]), 1),
    )
    search = Call(
        kernel=TOKEN_MATCH,
        inputs={
            "hidden": hidden.dtype, "inverse": "fp32", "lower": lower.dtype, "upper": upper.dtype
        },
        extras={"length": length, "n_lower": n_lower, "n_upper": n_upper, "share": share},
        outputs={
            "best": Spec((batch, parts, n_lower), "fp32"),
            "place": Spec((batch, parts, n_lower), "i32"),
        },
        constants={"D": width, "PRECISION": PRECISION[hidden.dtype]},
        tactic=tactic,
        grid=(rows, parts),
    )
    best = Call(
        kernel=TOKEN_MATCH_BEST,
        inputs={"best": "fp32", "place": "i32"},
        extras={"n_lower": n_lower, "parts": parts},
        outputs={"similarity": Spec(found, "fp32"), "target": Spec(found, "i32")},
        constants={},
        tactic=pick,
        grid=(cdiv(n_lower, pick.blocks["BLOCK"]), 1),
    )
    return (norm, search, best) if inverse is None else (search, best)
