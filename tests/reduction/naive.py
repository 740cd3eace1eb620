"""Token reduction at one site, one sequence, in plain loops: the truth the fast code is held to.

Written from the text alone (UTRC, arXiv 2410.14725, equations 5 to 7 and the six steps around
them; ToMe; EViT) and from this project's decisions where the texts are open. Slow on purpose:
every choice is a `sorted` with its key spelled out, every value a float64.

Letters: L tokens, D d_model, E d_inner, r removed, n = r - min(pads, r) links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NORM_FLOOR = 1e-12  # a vector is divided by max(its norm, this): a zero vector has cosine 0

PADDING, ORDINARY, PROTECTED = 0, 1, 2  # protection beats padding where a position is both


class NaiveChoice(NamedTuple):
    """Which tokens go, where to, and whether the hidden branch merges them."""

    src: list[int]  # ascending
    dst: list[int]  # -1: no target
    merge: list[bool]


class NaiveResult(NamedTuple):
    """A choice and what it makes of the two branches, float64 [L-r,D]."""

    src: list[int]
    dst: list[int]
    merge: list[bool]
    keep: list[int]  # ascending
    hidden: np.ndarray
    residual: np.ndarray


def importance(y: np.ndarray) -> list[np.float32]:
    """S[t], the mean over E of max(0, y[t]) of y [L,E], in float32 (UTRC equation 5)."""
    scores = []
    for row in np.asarray(y):
        total = np.float32(0)
        for value in row:
            total = total + max(np.float32(0), np.float32(value))
        scores.append(total / np.float32(len(row)))
    return scores


def parity_scores(length: int, pads: int) -> list[int]:
    """ToMe's bipartite split as a score: 0 at even distance from the first real token, 1 at odd."""
    return [(position - pads) % 2 for position in range(length)]


def rank(scores: Sequence[float], pads: int, protect_tail: int) -> list[int]:
    """Positions from lowest to highest: padding, then by (score, position), then the tail.

    The only total order there is. Padding counts by position alone.
    """
    length = len(scores)

    def key(position: int) -> tuple[int, float, int]:
        if position >= length - protect_tail:
            return PROTECTED, float(scores[position]), position
        if position < pads:
            return PADDING, 0.0, position
        return ORDINARY, float(scores[position]), position

    return sorted(range(length), key=key)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine similarity of two vectors [D], each divided by max(norm, 1e-12) first."""
    norm_a = max(math.sqrt(sum(float(x) * float(x) for x in a)), NORM_FLOOR)
    norm_b = max(math.sqrt(sum(float(x) * float(x) for x in b)), NORM_FLOOR)
    total = 0.0
    for x, z in zip(a, b, strict=True):
        total += (float(x) / norm_a) * (float(z) / norm_b)
    return total


def similarities(hidden: np.ndarray) -> list[list[float]]:
    """Cosine of every pair of tokens of hidden [L,D], as [L][L] (sim of UTRC equation 6)."""
    rows = np.asarray(hidden, dtype=np.float64).tolist()
    return [[cosine(a, b) for b in rows] for a in rows]


class Link(NamedTuple):
    """One a of M_A with its nearest b of M_B."""

    a: int
    b: int
    similarity: float


def nearest(a: int, high: Sequence[int], similarity: Sequence[Sequence[float]]) -> Link:
    """f and g of UTRC equations 6 and 7: the most similar b of M_B, lowest position on a tie."""
    by_likeness = sorted(high, key=lambda b: (-similarity[a][b], b))
    return Link(a, by_likeness[0], similarity[a][by_likeness[0]])


def choose_linked(
    scores: Sequence[float],
    similarity: Sequence[Sequence[float]],
    pads: int,
    removed: int,
    pruned_permille: int,
    protect_tail: int,
) -> NaiveChoice:
    """UTRC's steps 2 to 5 over any scores: halves, links, the strongest act, some only prune.

    Args:
        scores: [L], what splits the tokens into M_A (low) and M_B (high).
        similarity: [L][L].
        pads: padding tokens at the front.
        removed: r, at most floor(L/2).
        pruned_permille: of the n acting links the floor(n * this / 1000) strongest prune in the
            hidden branch (q of the hybrid); 0 merges all.
        protect_tail: last positions of the window that must be in M_B.

    Raises:
        ValueError: more to remove than M_A holds, or a tail that M_B cannot hold.
    """
    length = len(scores)
    half = length // 2
    if removed > half:
        raise ValueError(f"{removed} tokens to remove, but M_A holds only {half} of {length}")
    if protect_tail > length - half:
        raise ValueError(f"a tail of {protect_tail} does not fit M_B, which holds {length - half}")

    order = rank(scores, pads, protect_tail)
    low, high = order[:half], order[half:]  # step 2: M_A is the floor(L/2) lowest, M_B the rest

    # Padding goes first, lowest positions first, into nothing. Only the others are links.
    gone = sorted(position for position in low if position < pads)[: min(pads, removed)]
    links = [nearest(a, high, similarity) for a in low if a >= pads]  # step 3
    links = sorted(links, key=lambda link: (-link.similarity, link.a))  # step 4: strongest first
    links = links[: removed - len(gone)]

    # Hybrid: the most similar links prune, for their target already says what they would add.
    pruned = len(links) * pruned_permille // 1000
    acts = [(position, -1, False) for position in gone]
    for place, link in enumerate(links):
        acts.append((link.a, link.b, place >= pruned))
    return in_order(acts)


def choose_utrc(
    scores: Sequence[float],
    similarity: Sequence[Sequence[float]],
    pads: int,
    removed: int,
    prune_permille: int,
    protect_tail: int,
) -> NaiveChoice:
    """UTRC as printed: importance splits, cosine links, hybrid in the hidden branch."""
    return choose_linked(scores, similarity, pads, removed, prune_permille, protect_tail)


def choose_pumer(
    similarity: Sequence[Sequence[float]], pads: int, removed: int, protect_tail: int
) -> NaiveChoice:
    """PuMer on a state space model, which is ToMe: parity splits, cosine links, all merge."""
    scores = parity_scores(len(similarity), pads)
    return choose_linked(scores, similarity, pads, removed, 0, protect_tail)


def choose_evit(
    scores: Sequence[float], pads: int, removed: int, protect_tail: int
) -> NaiveChoice:
    """EViT as intended: the r least important tokens go, and nothing takes them in.

    Raises:
        ValueError: the protected tail leaves fewer than r tokens.
    """
    if removed > len(scores) - protect_tail:
        raise ValueError(f"{removed} to remove, {len(scores) - protect_tail} not protected")
    order = rank(scores, pads, protect_tail)
    return in_order([(position, -1, False) for position in order[:removed]])


def choose_utrc_code(length: int, pads: int, removed: int, protect_tail: int) -> NaiveChoice:
    """What UTRC's official code selects, whatever the input: every other token of the prefix.

    With clipped metrics its argmax is always 0 and its order 0, 1, 2, ..., so that the current
    positions 0, 2, ..., 2(n-1) go, all into position 1. Here counted from the first real token.

    Raises:
        ValueError: the pattern would remove a protected position or leave the window.
    """
    padding = min(pads, removed)
    acts = [(position, -1, False) for position in range(padding)]
    for step in range(removed - padding):
        acts.append((pads + 2 * step, pads + 1, True))
    if any(src >= length - protect_tail or dst >= length for src, dst, _ in acts):
        raise ValueError(f"the fixed pattern does not fit {length} with a tail of {protect_tail}")
    return in_order(acts)


def in_order(acts: Sequence[tuple[int, int, bool]]) -> NaiveChoice:
    """(src, dst, merge) triples in ascending order of src, as three lists."""
    acts = sorted(acts, key=lambda act: act[0])
    return NaiveChoice([a[0] for a in acts], [a[1] for a in acts], [a[2] for a in acts])


def survivors(length: int, src: Sequence[int]) -> list[int]:
    """Positions that stay, in their order (UTRC step 6)."""
    return [position for position in range(length) if position not in src]


def fold(values: np.ndarray, pairs: Sequence[tuple[int, int]], keep: Sequence[int]) -> np.ndarray:
    """Mean-merge one branch [L,D] over (source, target) pairs: b <- (b + sum a) / (1 + k)."""
    values = np.asarray(values, dtype=np.float64)
    rows = []
    for position in keep:
        total, count = values[position].copy(), 1
        for source, target in pairs:
            if target == position:
                total, count = total + values[source], count + 1
        rows.append(total / count)
    return stack(rows, values.shape[1])


def fold_top_values(
    values: np.ndarray, pairs: Sequence[tuple[int, int]], keep: Sequence[int]
) -> np.ndarray:
    """The official code's hybrid: channel by channel, the floor(n/2) largest removed VALUES merge.

    The target becomes (target + their sum) / (1 + floor(n/2)) (audit of ToR_SSM 2e9fc62).
    """
    values = np.asarray(values, dtype=np.float64)
    rows = []
    for position in keep:
        row = values[position].copy()
        sources = [source for source, target in pairs if target == position]
        kept = len(sources) // 2
        for channel in range(len(row)):
            largest = sorted((values[source, channel] for source in sources), reverse=True)[:kept]
            row[channel] = (row[channel] + sum(largest)) / (1 + kept)
        rows.append(row)
    return stack(rows, values.shape[1])


def stack(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Rows [width] as one array, also when there are none."""
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def apply_naive(
    method: str, hidden: np.ndarray, residual: np.ndarray, choice: NaiveChoice
) -> NaiveResult:
    """Carry out a choice on hidden [L,D] and residual [L,D]: the same tokens go in both.

    Residual branch: every link merges. Hidden branch: only the links marked `merge` do, or the
    official code's per-channel half.
    """
    src, dst, merge = choice
    keep = survivors(len(hidden), src)
    links = [(a, b) for a, b in zip(src, dst, strict=True) if b >= 0]
    merging = [(a, b) for a, b, m in zip(src, dst, merge, strict=True) if b >= 0 and m]
    if method == "utrc-code":
        new_hidden = fold_top_values(hidden, merging, keep)
    else:
        new_hidden = fold(hidden, merging, keep)
    return NaiveResult(src, dst, merge, keep, new_hidden, fold(residual, links, keep))


def reduce_naive(
    method: str,
    y: np.ndarray,
    hidden: np.ndarray,
    residual: np.ndarray,
    pads: int,
    removed: int,
    prune_permille: int,
    protect_tail: int,
    scores: Sequence[float] | None = None,
    similarity: Sequence[Sequence[float]] | None = None,
) -> NaiveResult:
    """Reduce one sequence by `removed` tokens.

    Args:
        method: "utrc", "utrc-code", "evit" or "pumer".
        y: [L,E], the scan's output before gate and norm.
        hidden: [L,D], the block's output.
        residual: [L,D].
        pads: padding tokens at the front, 0 to L.
        removed: r.
        prune_permille: q of utrc's hybrid in thousandths; the other methods have no use for it.
        protect_tail: last positions of the window, never removed.
        scores: [L], in place of the importance of y (exact ties).
        similarity: [L][L], in place of the cosines of hidden (exact ties).

    Raises:
        ValueError: an unknown method, or a request the method cannot meet.
    """
    length = len(hidden)
    if scores is None and method in ("utrc", "evit"):
        scores = importance(y)
    if similarity is None and method in ("utrc", "pumer"):
        similarity = similarities(hidden)

    if method == "utrc":
        choice = choose_utrc(scores, similarity, pads, removed, prune_permille, protect_tail)
    elif method == "pumer":
        choice = choose_pumer(similarity, pads, removed, protect_tail)
    elif method == "evit":
        choice = choose_evit(scores, pads, removed, protect_tail)
    elif method == "utrc-code":
        choice = choose_utrc_code(length, pads, removed, protect_tail)
    else:
        raise ValueError(f"unknown method {method!r}, expected utrc, utrc-code, evit or pumer")
    return apply_naive(method, hidden, residual, choice)
