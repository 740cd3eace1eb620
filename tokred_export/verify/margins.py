"""By how little two sets of choices at one site differ.

Two correct implementations round differently, so that tokens whose scores nearly tie can end up
on different sides. For each token that did, this module finds the smallest movement of scores,
in multiples of their rounding noise, that makes the engine's decision possible:

- lambda is a movement of importance differences by lambda * importance noise and of similarity
  differences by lambda * similarity noise, both at once.
- A token is in the lower half if it was, or if it reaches the lower half's highest importance
  within lambda; likewise for the upper half. Sources and targets of the engine show their side.
- A link's target must be the best of those in the upper half, within lambda.
- A link that acts must be at least as strong as every link that does not, within lambda.
- A pruned link must be at least as strong as every merged one, within lambda.

Each condition is judged given what else the engine did. So a near tie in the split answers for
what follows from it (a target that is no longer there, a place among the strongest that became
free), and for nothing else. Whatever choice comes of scores that moved by at most half of lambda
times their noise passes at lambda; the tests try it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tokred_export.verify.records import Flip, ParityCase, ParityRecord

# Two scores whose order differs between two computations lie within the sum of their errors, in
# each: 2 x noise if both err like eager. An engine may sum in another order or on other units
# and err up to twice as much. Beyond that it is no longer rounding.
EXPLAINED = 4.0


class RowChoice(NamedTuple):
    """One row of a Choice: src, dst, merge, each [r]."""

    src: np.ndarray
    dst: np.ndarray
    merge: np.ndarray


class RowScores(NamedTuple):
    """What one row's choice rests on, from the more exact of two computations.

    Attributes:
        pads: padding tokens at the front.
        protected: first position of the protected tail.
        score: [L], what the split ranks by; None where positions alone decide.
        lower: bool [L], the lower part of the split; None as above.
        unit: float64 [L, D], vectors of length 1 whose products are similarities; None for a
            method without links.
        score_noise, similarity_noise: largest rounding differences of either at this site.
    """

    pads: int
    protected: int
    score: np.ndarray | None
    lower: np.ndarray | None
    unit: np.ndarray | None
    score_noise: float
    similarity_noise: float


class _Links(NamedTuple):
    """The engine's links [n], ascending, and the similarities they compete in.

    ``cosine`` [m, k] is between ``rows``, every prompt token that may be a source, and every
    token that may be a target; ``gone`` [k] is the lambda from which on the latter need not be
    in the upper half. ``strength`` is each link's own similarity.
    """

    src: np.ndarray
    dst: np.ndarray
    merge: np.ndarray
    strength: np.ndarray
    rows: np.ndarray
    idle: np.ndarray  # bool [m]: rows that are not sources of the engine
    cosine: np.ndarray
    gone: np.ndarray
    noise: float


def unexplained(case: ParityCase) -> list[Flip]:
    """The flips of one case that rounding does not explain."""
    flips = (flip for site in case.sites for flip in site.flips)
    return [flip for flip in flips if flip.margin is None or flip.margin > EXPLAINED]


def unexplained_flips(record: ParityRecord) -> list[Flip]:
    """The flips of all cases that rounding does not explain."""
    return [flip for case in record.cases for flip in unexplained(case)]


def find_flips(
    site: int, row: int, eager: RowChoice, engine: RowChoice, scores: RowScores
) -> tuple[Flip, ...]:
    """Every token on which two choices over the same tokens differ, by position.

    A token whose target and merge side both differ counts twice.
    """
    differing = sorted(_differences(eager, engine))
    if not differing:
        return ()
    margin = _margins(engine, scores) if _possible(eager, engine, scores) else None
    flips = []
    for position, what in differing:
        found = np.inf
        # Padding has no score: which of it goes is fixed.
        if margin is not None and position >= scores.pads:
            found = margin(position, what)
        flips.append(
            Flip(
                site=site,
                row=row,
                position=position,
                what=what,
                margin=float(found) if np.isfinite(found) else None,
            )
        )
    return tuple(flips)


def _differences(eager: RowChoice, engine: RowChoice) -> Iterator[tuple[int, str]]:
    mine = {int(a): (int(b), bool(m)) for a, b, m in zip(*eager, strict=True)}
    theirs = {int(a): (int(b), bool(m)) for a, b, m in zip(*engine, strict=True)}
    yield from ((position, "removed") for position in theirs.keys() - mine.keys())
    yield from ((position, "kept") for position in mine.keys() - theirs.keys())
    for position in mine.keys() & theirs.keys():
        if mine[position][0] != theirs[position][0]:
            yield position, "target"
        if mine[position][1] != theirs[position][1]:
            yield position, "merge"


def _possible(eager: RowChoice, engine: RowChoice, scores: RowScores) -> bool:
    """Whether any scores at all can lead to the engine's numbers of links and of prunes."""
    if scores.score is None:
        return False

    def numbers(choice: RowChoice) -> tuple[int, int, int]:
        real = choice.src >= scores.pads
        linked = real & (choice.dst >= 0)
        return int(real.sum()), int(linked.sum()), int((linked & choice.merge).sum())

    return numbers(eager) == numbers(engine)


def _margins(engine: RowChoice, scores: RowScores) -> Callable[[int, str], float]:
    """(position, what) -> lambda, for prompt tokens."""
    to_lower, to_upper = _crossings(scores)
    if scores.unit is None:  # the lower part is what goes
        to_cross = {"removed": to_lower, "kept": to_upper}
        return lambda position, what: to_cross[what][position] if what in to_cross else np.inf
    links = _find_links(engine, scores, to_lower)
    place = {int(position): i for i, position in enumerate(links.src)}

    def margin(position: int, what: str) -> float:
        if what == "kept":
            return _kept(position, links, to_upper)
        link = place[position]
        if what == "merge":
            return _merge(link, links)
        target = max(
            to_upper[links.dst[link]],
            float(_rival(links, links.rows == position, links.strength[link])[0]),
        )
        if what == "target":
            return target
        return max(target, to_lower[position], _removed(link, links, to_upper))

    return margin


def _crossings(scores: RowScores) -> tuple[np.ndarray, np.ndarray]:
    """Lambda [L] from which on each token may be in the lower half, and in the upper half."""
    position = np.arange(len(scores.score))
    free = (position >= scores.pads) & (position < scores.protected)
    lower = scores.lower
    highest = scores.score[free & lower].max(initial=-np.inf)
    lowest = scores.score[free & ~lower].min(initial=np.inf)
    if scores.score_noise > 0:
        down = (scores.score - highest) / scores.score_noise
        up = (lowest - scores.score) / scores.score_noise
    else:  # exact scores leave no room, not even for ties: position breaks them
        down = up = np.full(len(position), np.inf)
    to_lower = np.where(lower, 0.0, np.where(free, down, np.inf))
    to_upper = np.where(lower, np.where(free, up, np.inf), 0.0)
    return to_lower, to_upper


def _find_links(engine: RowChoice, scores: RowScores, to_lower: np.ndarray) -> _Links:
    real = engine.src >= scores.pads
    src, dst, merge = (part[real] for part in engine)
    position = np.arange(len(scores.score))
    is_source, is_target = np.isin(position, src), np.isin(position, dst)
    rows = position[(scores.lower & (position >= scores.pads)) | is_source]
    columns = position[~scores.lower | is_target]
    cosine = scores.unit[rows] @ scores.unit[columns].T
    return _Links(
        src, dst, merge,
        strength=cosine[np.searchsorted(rows, src), np.searchsorted(columns, dst)],
        rows=rows,
        idle=~is_source[rows],
        cosine=cosine,
        # A token that the engine merges into is in its upper half, whatever else moves.
        gone=np.where(is_target[columns], np.inf, to_lower[columns]),
        noise=scores.similarity_noise,
    )  # fmt: skip


def _ratio(difference: np.ndarray, noise: float) -> np.ndarray:
    """How many times the noise; nothing to overcome where the difference is not positive."""
    if noise > 0:
        return np.maximum(difference, 0.0) / noise
    return np.where(difference > 0, np.inf, 0.0)


def _rival(links: _Links, rows: np.ndarray, strength: float) -> np.ndarray:
    """Lambda from which on no link of ``rows`` (a mask) must be stronger than ``strength``."""
    stronger = _ratio(links.cosine[rows] - strength, links.noise)
    return np.minimum(stronger, links.gone).max(axis=1, initial=0.0)


def _kept(position: int, links: _Links, to_upper: np.ndarray) -> float:
    """For a token that the engine keeps: it is in the upper half, or its link is too weak."""
    if position in links.dst or to_upper[position] == 0:
        return to_upper[position]
    weakest = links.strength.min()
    return min(to_upper[position], float(_rival(links, links.rows == position, weakest)[0]))


def _removed(link: int, links: _Links, to_upper: np.ndarray) -> float:
    """For a link that acts: every idle token is in the upper half, or its link is weaker."""
    strength = links.strength[link]
    stronger = links.idle & (links.cosine.max(axis=1, initial=-np.inf) > strength)
    needed = np.minimum(to_upper[links.rows[stronger]], _rival(links, stronger, strength))
    return float(needed.max(initial=0.0))


def _merge(link: int, links: _Links) -> float:
    """For a link on the other side of the prune/merge boundary: its distance to that side."""
    strength = links.strength[link]
    if links.merge[link]:
        beyond = strength - links.strength[~links.merge].min(initial=np.inf)
    else:
        beyond = links.strength[links.merge].max(initial=-np.inf) - strength
    return float(_ratio(np.asarray(beyond), links.noise))
