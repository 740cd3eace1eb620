"""The Triton kernels: every link's rank by counting, then who goes where."""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_selection import (
    RANK_TACTICS,
    check_length,
    count,
    count_pairs,
    ordered,
    rank_tactic,
)
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose


@triton.jit
def link_keys(similarity, lower, i, pad, n_lower):
    """Padding first, then the strongest link; places beyond the end last."""
    strength = tl.load(similarity + i, mask=i < n_lower, other=0)
    position = tl.load(lower + i, mask=i < n_lower, other=0)
    key = ordered(tl.where(position < pad, -3.0e38, -strength), i)
    return tl.where(i < n_lower, key, 9223372036854775807)


@triton.jit(do_not_specialize=["n_lower"])
def token_link_rank_kernel(
    similarity, lower, pads, n_lower, rank, MINE: tl.constexpr, OTHERS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    pad = tl.load(pads + batch)
    similarity += batch * n_lower
    lower += batch * n_lower
    start = tl.program_id(0) * MINE
    mine = ()
    totals = ()
    for m in tl.static_range(MINE):
        mine = mine + (link_keys(similarity, lower, start + m, pad, n_lower),)
        totals = totals + (0,)
    for first in range(0, n_lower, OTHERS):
        keys = link_keys(similarity, lower, first + tl.arange(0, OTHERS), pad, n_lower)
        for m in tl.static_range(MINE // 2):
            one, two = count_pairs(keys < mine[2 * m], keys < mine[2 * m + 1])
            # The oldest entries are these links': the tuple turns once round a block.
            totals = totals[2:] + (totals[0] + one, totals[1] + two)
    for m in tl.static_range(MINE):
        tl.store(rank + batch * n_lower + start + m, totals[m], mask=start + m < n_lower)


@triton.jit(do_not_specialize=["n_lower", "n_upper", "removed"])
def token_link_kernel(
    rank, target, lower, upper, pads, n_lower, n_upper, removed, src, dst, merge, keep, left,
    PRUNE_PERMILLE: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    pad = tl.load(pads + batch)
    rank += batch * n_lower
    lower += batch * n_lower
    upper += batch * n_upper
    keep += batch * (n_lower + n_upper - removed)
    start = tl.program_id(0) * TOKENS
    i = start + tl.arange(0, TOKENS)
    inside = i < n_lower
    position = tl.load(lower + i, mask=inside, other=0)
    mine = tl.load(rank + i, mask=inside, other=removed)
    partner = tl.load(target + batch * n_lower + i, mask=inside, other=-1)
    # An upper position p at place j has p - j lower ones before it.
    others = ()
    moved = ()
    for m in tl.static_range(TOKENS):
        others = others + (tl.load(upper + start + m, mask=start + m < n_upper, other=0),)
        moved = moved + (0,)

    # How many of the lower tokens go before each upper one, and before this program's lower ones.
    n_pad = 0
    before = 0
    for first in range(0, n_lower, OTHERS):
        k = first + tl.arange(0, OTHERS)
        goes = tl.load(rank + k, mask=k < n_lower, other=removed) < removed
        n_pad += count(tl.load(lower + k, mask=k < n_lower, other=pad) < pad)
        before += count(goes & (k < start))
        for m in tl.static_range(0, TOKENS, 2):
            one, two = count_pairs(
                goes & (k < others[m] - (start + m)),
                goes & (k < others[m + 1] - (start + m + 1)),
            )
            moved = moved[2:] + (moved[0] + one, moved[1] + two)
    for m in tl.static_range(TOKENS):
        tl.store(keep + others[m] - moved[m], others[m], mask=start + m < n_upper)

    n_pad = tl.minimum(n_pad, removed)
    n_prune = (removed - n_pad) * PRUNE_PERMILLE // 1000
    gone = mine < removed
    place = before + tl.cumsum(gone.to(tl.int32), axis=0)
    slot = batch * removed + place - 1
    tl.store(src + slot, position, mask=gone)
    tl.store(dst + slot, tl.where(mine < n_pad, -1, partner), mask=gone)
    tl.store(merge + slot, mine >= n_pad + n_prune, mask=gone)
    tl.store(keep + position - place, position, mask=inside & (gone == 0))
    # Every program says the same of what padding the next layers see.
    tl.store(left + batch, tl.maximum(pad - removed, 0))


TOKEN_LINK_RANK = Kernel(
    "token_link_rank", token_link_rank_kernel,
    ("similarity", "lower", "pads"), ("n_lower",), ("rank",), RANK_TACTICS,
)
TOKEN_LINK = Kernel(
    "token_link", token_link_kernel,
    ("rank", "target", "lower", "upper", "pads"), ("n_lower", "n_upper", "removed"),
    ("src", "dst", "merge", "keep", "left"),
    tuple(
        Tactic({"TOKENS": tokens, "OTHERS": others}, warps)
        for tokens, others, warps in (
            (8, 1024, 4), (16, 1024, 2), (4, 1024, 4), (16, 1024, 4),
        )
    ),
)


def calls(
    similarity: Spec, target: Spec, lower: Spec, upper: Spec, pads: Spec,
    removed: int, prune_permille: int, tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_link.op.token_link`.

    They also leave ``left`` int32 [B]: how much of the padding stays, max(pads - removed, 0).

    Raises:
        ValueError: more tokens than a reduction site takes.
    """
    batch, n_lower = lower.shape
    n_upper = upper.shape[1]
    check_length(n_lower + n_upper)
    ranking = choose(TOKEN_LINK_RANK, tactics, rank_tactic(batch, n_lower))
    placing = choose(TOKEN_LINK, tactics, TOKEN_LINK.tactics[batch * n_lower > 4096])
    rank = Call(
        kernel=TOKEN_LINK_RANK,
        inputs={"similarity": similarity.dtype, "lower": lower.dtype, "pads": pads.dtype},
        extras={"n_lower": n_lower},
        outputs={"rank": Spec((batch, n_lower), "i32")},
        constants={},
        tactic=ranking,
        grid=(cdiv(n_lower, ranking.blocks["MINE"]), 1),
    )
    place = Call(
        kernel=TOKEN_LINK,
        inputs={
            "rank": "i32", "target": target.dtype, "lower": lower.dtype, "upper": upper.dtype,
            "pads": pads.dtype,
        },
        extras={"n_lower": n_lower, "n_upper": n_upper, "removed": removed},
        outputs={
            "src": Spec((batch, removed), "i32"), "dst": Spec((batch, removed), "i32"),
            "merge": Spec((batch, removed), "i1"),
            "keep": Spec((batch, n_lower + n_upper - removed), "i32"),
            "left": Spec((batch,), "i32"),
        },
        constants={"PRUNE_PERMILLE": prune_permille},
        tactic=placing,
        grid=(cdiv(max(n_lower, n_upper), placing.blocks["TOKENS"]), 1),
    )
    return rank, place
