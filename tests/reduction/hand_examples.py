"""One reduction site worked out on paper, method by method: small enough to check by eye."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from naive import NaiveResult


class Example(NamedTuple):
    """One sequence worked out by hand; src, dst, merge, keep and values are the answer."""

    method: str
    y: list
    hidden: list
    residual: list
    pads: int
    removed: int
    permille: int
    tail: int
    answer: NaiveResult


def answer(src, dst, merge, keep, hidden, residual):
    """A NaiveResult of plain lists."""
    return NaiveResult(src, dst, merge, keep, np.array(hidden, float), np.array(residual, float))


# S = 1, 4, 0, 3, 0; the order is 2 0 3 1, then 4, protected: M_A = {0, 2}, M_B = {1, 3, 4}.
# 0 -> 1 with cosine 1, 2 -> 3 with cosine 0.707. Half of two prunes: the stronger, 0.
HYBRID = Example(
    "utrc",
    y=[[2, -4], [4, 4], [-1, -1], [3, 3], [-9, -9]],
    hidden=[[1, 0], [2, 0], [0, 3], [3, 3], [0, -1]],
    residual=[[10, 1], [20, 2], [30, 3], [40, 4], [50, 5]],
    pads=0, removed=2, permille=500, tail=1,
    answer=answer(
        [0, 2], [1, 3], [False, True], [1, 3, 4],
        [[2, 0], [1.5, 3], [0, -1]],
        [[15, 1.5], [35, 3.5], [50, 5]],
    ),
)
# Position 0 is padding and goes first although it scores highest. Then S = 2, 5, 1, 6, 7:
# M_A = {0, 3, 1}. 1 and 3 both point along 2; floor(2 * 300 / 1000) = 0 prune, so both merge.
SHARED_TARGET = Example(
    "utrc",
    y=[[9], [2], [5], [1], [6], [7]],
    hidden=[[7, 7], [4, 0], [1, 0], [2, 0], [0, 1], [-1, 0]],
    residual=[[1, 0], [2, 0], [3, 0], [7, 0], [5, 0], [6, 0]],
    pads=1, removed=3, permille=300, tail=1,
    answer=answer(
        [0, 1, 3], [-1, 2, 2], [False, True, True], [2, 4, 5],
        [[7 / 3, 0], [0, 1], [-1, 0]],
        [[4, 0], [5, 0], [6, 0]],
    ),
)
# Everything ties: M_A = {0, 1, 2} by position, all of them link to 3, the lowest of M_B, and
# of the links the two lowest positions act; the first prunes.
ALL_TIED = Example(
    "utrc",
    y=[[1], [1], [1], [1], [1], [1]],
    hidden=[[2], [2], [2], [4], [2], [2]],
    residual=[[1], [2], [3], [4], [5], [6]],
    pads=0, removed=2, permille=500, tail=0,
    answer=answer(
        [0, 1], [3, 3], [False, True], [2, 3, 4, 5],
        [[2], [3], [2], [2]], [[3], [7 / 3], [5], [6]],
    ),
)
# More padding than removals: two of the three pads go, nothing merges.
ONLY_PADDING = Example(
    "utrc",
    y=[[5], [4], [3], [0], [0]],
    hidden=[[1], [2], [3], [4], [5]],
    residual=[[1], [2], [3], [4], [5]],
    pads=3, removed=2, permille=500, tail=1,
    answer=answer(
        [0, 1], [-1, -1], [False, False], [2, 3, 4], [[3], [4], [5]], [[3], [4], [5]],
    ),
)
# S = 3, 1, 1, 0, 0 with the last two protected: the order is 1 2 0. No values change.
DROPPED = Example(
    "evit",
    y=[[3], [1], [1], [0], [0]],
    hidden=[[1], [2], [3], [4], [5]],
    residual=[[6], [7], [8], [9], [10]],
    pads=0, removed=2, permille=500, tail=2,
    answer=answer(
        [1, 2], [-1, -1], [False, False], [0, 3, 4], [[1], [4], [5]], [[6], [9], [10]],
    ),
)
# Real tokens 1..5 at distances 0..4: 1 and 3 are candidates, 5 is protected. M_A = {0, 1, 3}.
# The pad goes; of 1 -> 2 (cosine 0.8) and 3 -> 4 (cosine 1) only the second acts, and merges.
BIPARTITE = Example(
    "pumer",
    y=[[0], [0], [0], [0], [0], [0]],
    hidden=[[9, 9], [1, 0], [4, 3], [0, 2], [0, 4], [-1, 0]],
    residual=[[1, 1], [2, 2], [3, 3], [4, 4], [8, 8], [6, 6]],
    pads=1, removed=2, permille=1000, tail=1,
    answer=answer(
        [0, 3], [-1, 4], [False, True], [1, 2, 4, 5],
        [[1, 0], [4, 3], [0, 3], [-1, 0]],
        [[2, 2], [3, 3], [6, 6], [6, 6]],
    ),
)
# 0, 2, 4 go into 1. Hidden keeps floor(3/2) = 1 value a channel, the largest: 5 and 6, so
# (7 + 5) / 2 and (0 + 6) / 2; residual is the mean of four.
CONSTANT = Example(
    "utrc-code",
    y=[[9], [0], [9], [0], [9], [0]],
    hidden=[[1, 6], [7, 0], [5, 2], [3, 3], [4, 4], [8, 8]],
    residual=[[1, 0], [2, 0], [3, 0], [4, 0], [6, 4], [9, 9]],
    pads=0, removed=3, permille=0, tail=1,
    answer=answer(
        [0, 2, 4], [1, 1, 1], [True, True, True], [1, 3, 5],
        [[6, 3], [3, 3], [8, 8]],
        [[3, 1], [4, 0], [9, 9]],
    ),
)
# One pad goes; the pattern starts behind it: 1 and 3 into 2, one value a channel.
CONSTANT_PADDED = Example(
    "utrc-code",
    y=[[0]] * 6,
    hidden=[[50], [1], [2], [-4], [5], [6]],
    residual=[[50], [1], [2], [-4], [5], [6]],
    pads=1, removed=3, permille=500, tail=1,
    answer=answer(
        [0, 1, 3], [-1, 2, 2], [False, True, True], [2, 4, 5],
        [[1.5], [5], [6]], [[-1 / 3], [5], [6]],
    ),
)
EXAMPLES = {
    "hybrid": HYBRID,
    "shared target": SHARED_TARGET,
    "all tied": ALL_TIED,
    "only padding": ONLY_PADDING,
    "dropped": DROPPED,
    "bipartite": BIPARTITE,
    "constant": CONSTANT,
    "constant padded": CONSTANT_PADDED,
}
