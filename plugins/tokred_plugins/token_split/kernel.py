"""The Triton kernels: every token's rank by counting, then the positions of both parts.

Where sequences are many, or long, all pairs are too many to count, and one program a sequence
searches for the threshold instead: its time does not depend on how many others do the same.

Either leaves most of the GPU idle. ``token_split_norm`` and ``token_split_search_norm`` have more
programs, which compute the norms that matching needs.
"""

# ruff: noqa: RUF005  Triton has no starred tuples
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_selection import (
    PLACE_TACTICS,
    RANK_TACTICS,
    check_length,
    count,
    count_pairs,
    ordered,
    rank_tactic,
)
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, cdiv, choose, power_of_two
from tokred_plugins.row_tiles import store_inverse_norms
from tokred_plugins.token_split.search import ascending_bits, kth_lowest, lowest


@triton.jit
def split_keys(scores, t, pad, length, protect):
    """Padding is lowest, the protected tail highest, places beyond the end higher still."""
    score = tl.load(scores + t, mask=t < length, other=0)
    score = tl.where(t < pad, -3.0e38, score)
    score = tl.where(t < length - protect, score, 3.0e38)
    return tl.where(t < length, ordered(score, t), 9223372036854775807)


@triton.jit(do_not_specialize=["length", "protect"])
def token_split_rank_kernel(
    scores, pads, length, protect, rank, MINE: tl.constexpr, OTHERS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    pad = tl.load(pads + batch)
    scores += batch * length
    start = tl.program_id(0) * MINE
    mine = ()
    totals = ()
    for m in tl.static_range(MINE):
        mine = mine + (split_keys(scores, start + m, pad, length, protect),)
        totals = totals + (0,)
    for first in range(0, length, OTHERS):
        keys = split_keys(scores, first + tl.arange(0, OTHERS), pad, length, protect)
        for m in tl.static_range(MINE // 2):
            one, two = count_pairs(keys < mine[2 * m], keys < mine[2 * m + 1])
            # The oldest entries are these tokens': the tuple turns once round a block.
            totals = totals[2:] + (totals[0] + one, totals[1] + two)
    for m in tl.static_range(MINE):
        tl.store(rank + batch * length + start + m, totals[m], mask=start + m < length)


@triton.jit
def store_places(
    rank, length, n_lower, lower, upper, TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):
    """Where this program's tokens stand in their half."""
    batch = tl.program_id(2).to(tl.int64)
    rank += batch * length
    start = tl.program_id(0) * TOKENS
    t = start + tl.arange(0, TOKENS)
    low = tl.load(rank + t, mask=t < length, other=n_lower) < n_lower
    before = 0
    for first in range(0, start, OTHERS):
        others = first + tl.arange(0, OTHERS)
        before += count(tl.load(rank + others, mask=others < start, other=n_lower) < n_lower)
    # Lower tokens up to and with this one: it is that many-th of them.
    place = before + tl.cumsum(low.to(tl.int32), axis=0)
    tl.store(lower + batch * n_lower + place - 1, t, mask=low)
    high = (t < length) & (low == 0)
    tl.store(upper + batch * (length - n_lower) + t - place, t, mask=high)


@triton.jit(do_not_specialize=["length", "n_lower"])
def token_split_kernel(
    rank, length, n_lower, lower, upper, TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):
    store_places(rank, length, n_lower, lower, upper, TOKENS, OTHERS)


@triton.jit(do_not_specialize=["length", "n_lower"])
def token_split_norm_kernel(
    rank, hidden, length, n_lower, lower, upper, inverse,
    D: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr, ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    program, places = tl.program_id(0), tl.cdiv(length, TOKENS)
    if program < places:
        store_places(rank, length, n_lower, lower, upper, TOKENS, OTHERS)
    else:
        store_inverse_norms(hidden, program - places, length, inverse, D, ROWS, PIECE)


@triton.jit
def store_found(
    scores, pads, length, n_lower, protect, lower, upper, BLOCK: tl.constexpr,
):
    """Where all tokens of a sequence stand in their half."""
    batch = tl.program_id(2)
    t = tl.arange(0, BLOCK)
    score = tl.load(scores + batch.to(tl.int64) * length + t, mask=t < length, other=0)
    # Padding is lowest, the protected tail highest, and places beyond the end are never taken.
    score = tl.where(t < tl.load(pads + batch), -3.0e38, score)
    score = tl.where(t < length - protect, score, 3.0e38)
    keys = tl.where(t < length, ascending_bits(score), 4294967295)
    kth = kth_lowest(keys, n_lower)
    mask, rank = lowest(keys, kth, n_lower)
    tl.store(lower + batch.to(tl.int64) * n_lower + rank - 1, t, mask=mask)
    others = (t < length) & (mask == 0)
    tl.store(upper + batch.to(tl.int64) * (length - n_lower) + t - rank, t, mask=others)


@triton.jit(do_not_specialize=["length", "n_lower", "protect"])
def token_split_search_kernel(
    scores, pads, length, n_lower, protect, lower, upper, BLOCK: tl.constexpr,
):
    store_found(scores, pads, length, n_lower, protect, lower, upper, BLOCK)


@triton.jit(do_not_specialize=["length", "n_lower", "protect"])
def token_split_search_norm_kernel(
    scores, pads, hidden, length, n_lower, protect, lower, upper, inverse,
    BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        store_found(scores, pads, length, n_lower, protect, lower, upper, BLOCK)
    else:
        store_inverse_norms(hidden, program - 1, length, inverse, D, ROWS, PIECE)


TOKEN_SPLIT_RANK = Kernel(
    "token_split_rank", token_split_rank_kernel,
    ("scores", "pads"), ("length", "protect"), ("rank",), RANK_TACTICS,
)
TOKEN_SPLIT = Kernel(
    "token_split", token_split_kernel,
    ("rank",), ("length", "n_lower"), ("lower", "upper"), PLACE_TACTICS,
)


TOKEN_SPLIT_SEARCH = Kernel(
    "token_split_search", token_split_search_kernel,
    ("scores", "pads"), ("length", "n_lower", "protect"), ("lower", "upper"),
    tuple(Tactic({}, warps) for warps in (8, 4, 16)),
)
TOKEN_SPLIT_NORM = Kernel(
    "token_split_norm", token_split_norm_kernel,
    ("rank", "hidden"), ("length", "n_lower"), ("lower", "upper", "inverse"),
    tuple(
        Tactic({"TOKENS": tokens, "OTHERS": 2048, "ROWS": rows, "PIECE": piece}, warps)
        for tokens, rows, piece, warps in (
            (128, 4, 256, 4), (128, 1, 1024, 4), (256, 2, 1024, 8), (256, 1, 2048, 8),
        )
    ),
)
TOKEN_SPLIT_SEARCH_NORM = Kernel(
    "token_split_search_norm", token_split_search_norm_kernel,
    ("scores", "pads", "hidden"), ("length", "n_lower", "protect"), ("lower", "upper", "inverse"),
    tuple(
        Tactic({"ROWS": rows, "PIECE": piece}, warps)
        for rows, piece, warps in (
            (2, 1024, 8), (1, 1024, 4), (4, 1024, 16), (8, 256, 8), (1, 2048, 8), (4, 256, 4),
        )
    ),
)
# Sequences times squared tokens, up to which counting is faster on a large GPU.
MOST_PAIRS = 2 * 2048 * 2048


def search_tactic(kernel: Kernel, length: int) -> Tactic:
    """Few warps for few tokens; many where one program would run out of registers."""
    tactics = kernel.tactics
    return tactics[1] if length <= 1024 else tactics[0] if length <= 4096 else tactics[2]


def calls(
    scores: Spec, pads: Spec, count: int, protect: int,
    tactics: Mapping[str, Tactic] | None = None, search: bool | None = None,
    hidden: Spec | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_split.op.token_split`.

    Args:
        scores, pads, count, protect: the op's arguments.
        tactics: kernel name -> tactic, where not the default.
        search: one program a sequence in place of two kernels; by default whichever is faster.
        hidden: [B, L, D] of whose tokens to leave ``inverse`` float32 [B, L] along, one over their
            norms, which :func:`tokred_plugins.token_match.kernel.calls` takes.

    Raises:
        ValueError: more tokens than a reduction site takes.
    """
    batch, length = scores.shape
    check_length(length)
    halves = {"lower": Spec((batch, count), "i32"), "upper": Spec((batch, length - count), "i32")}
    norms = hidden is not None
    more = {"hidden": hidden.dtype} if norms else {}
    left = {"inverse": Spec((batch, length), "fp32")} if norms else {}
    width = {"D": hidden.shape[2]} if norms else {}
    if batch * length**2 > MOST_PAIRS if search is None else search:
        kernel = TOKEN_SPLIT_SEARCH_NORM if norms else TOKEN_SPLIT_SEARCH
        tactic = choose(kernel, tactics, search_tactic(kernel, length))
        searching = Call(
            kernel=kernel,
            inputs={"scores": scores.dtype, "pads": pads.dtype, **more},
            extras={"length": length, "n_lower": count, "protect": protect},
            outputs=halves | left,
            constants={"BLOCK": power_of_two(length, 32), **width},
            tactic=tactic,
            grid=(1 + (cdiv(length, tactic.blocks["ROWS"]) if norms else 0), 1),
        )
        return (searching,)
    kernel = TOKEN_SPLIT_NORM if norms else TOKEN_SPLIT
    ranking = choose(TOKEN_SPLIT_RANK, tactics, rank_tactic(batch, length))
    wide = norms and hidden.shape[2] > 1536
    placing = choose(kernel, tactics, kernel.tactics[1 if wide else 0])
    programs = cdiv(length, placing.blocks["TOKENS"])
    rank = Call(
        kernel=TOKEN_SPLIT_RANK,
        inputs={"scores": scores.dtype, "pads": pads.dtype},
        extras={"length": length, "protect": protect},
        outputs={"rank": Spec((batch, length), "i32")},
        constants={},
        tactic=ranking,
        grid=(cdiv(length, ranking.blocks["MINE"]), 1),
    )
    place = Call(
        kernel=kernel,
        inputs={"rank": "i32", **more},
        extras={"length": length, "n_lower": count},
        outputs=halves | left,
        constants=width,
        tactic=placing,
        grid=(programs + (cdiv(length, placing.blocks["ROWS"]) if norms else 0), 1),
    )
    return rank, place
