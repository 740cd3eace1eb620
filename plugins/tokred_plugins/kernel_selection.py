"""Selection by counting: a token's rank is how many others are lower, ties by position.

All pairs are compared, which a large GPU does faster than one program finds a threshold: 2048
tokens make 4 million comparisons, spread over all multiprocessors.
"""

# ruff: noqa: ANN001, ANN201  Triton functions
from __future__ import annotations

import triton
import triton.language as tl

from tokred_plugins.kernels import Tactic

LONGEST = 32768  # the comparisons grow with the square


@triton.jit
def ordered(x, at):
    """int64 keys in the order of (float32 ``x``, position ``at``); both zeros are one value."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 2147483647)
    return (rising.to(tl.int64) << 32) | at


@triton.jit
def count(mask):
    """How many are true."""
    return tl.sum(mask.to(tl.int32), axis=0)


@triton.jit
def count_pairs(first, second):
    """How many are true of two masks, of fewer than 2^16 elements each, in one sum."""
    both = tl.sum(first.to(tl.int32) + (second.to(tl.int32) << 16), axis=0)
    return both & 65535, (both >> 16) & 65535


# MINE tokens a program, which each thread compares with its share of OTHERS, in registers.
RANK_TACTICS = tuple(
    Tactic({"MINE": mine, "OTHERS": others}, warps)
    for mine, others, warps in (
        (4, 2048, 4), (4, 1024, 4), (16, 1024, 2), (16, 1024, 4), (16, 2048, 4),
    )
)
# TOKENS written a program, after counting OTHERS at a time before them.
PLACE_TACTICS = tuple(
    Tactic({"TOKENS": tokens, "OTHERS": others}, warps)
    for tokens, others, warps in ((256, 2048, 8), (128, 2048, 4), (256, 2048, 4))
)


def rank_tactic(batch: int, tokens: int) -> Tactic:
    """As many others at a time as there are, if few; many tokens a program, which share the
    making of keys, where there are enough programs all the same."""
    return RANK_TACTICS[2 if batch * tokens > 4096 else int(tokens <= 1024)]


def check_length(length: int) -> None:
    """Raise ValueError above the longest sequence that a reduction site takes."""
    if length > LONGEST:
        raise ValueError(
            f"{length} tokens at a reduction site, expected at most {LONGEST}; "
            "shorten the sequence or remove the site"
        )
