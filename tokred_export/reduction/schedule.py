"""From "save 30 %" to how many tokens each site keeps, in pure integers.

All sites share one keep ratio rho: a site that gets n tokens keeps ceil(n rho), snapped to
``round_to`` and to what its method allows. rho is solved so that the prefill saves the target by
the chosen count; where ceil is too coarse for that (short prompts, large multiples), single sites
are moved by a step or two. The same request always gives the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from itertools import pairwise

from tokred_export.errors import InvalidRequest
from tokred_export.reduction.flops import (
    METHOD_STEPS,
    Flops,
    PlanRow,
    achieved_reduction,
    plan_rows,
    prefill_flops,
)
from tokred_export.specs import ModelSpec, ReductionSchedule, ReductionSpec, Site

__all__ = [
    "METHOD_NAMES",
    "TOLERANCE",
    "Flops",
    "PlanRow",
    "achieved_reduction",
    "default_sites",
    "paper_keep_ratio",
    "plan_rows",
    "prefill_flops",
    "solve_schedule",
]

METHOD_NAMES = tuple(METHOD_STEPS)

TOLERANCE = 0.005  # how far a schedule may end from its target, as a share of the prefill
MAX_SITES = 7
RATIO_BITS = 40  # rho is a multiple of 2**-40: exact, and finer than any length can tell
MAX_ADJUSTMENTS = 200  # sees nearly all choices of a short prompt, a second at most
HALF = Fraction(1, 2)  # no site takes more than half of its tokens


def default_sites(n_layer: int) -> tuple[int, ...]:
    """Picks the layers after which tokens are taken away.

    The UTRC paper's for 48 layers and 64 (arXiv 2410.14725). Else up to seven, evenly
    from 0.19 n to 0.66 n; halves round up, so that 24 layers give (5, 7, 9, 11, 12, 14, 16).
    Shallow models get fewer, because none comes twice and none follows the last layer, where it
    could not shorten anything: 3 layers give (1,), 2 give (0,), and a single layer gives none.

    Args:
        n_layer: layers of the model, at least 1.

    Returns:
        0-based layer indices, ascending.
    """
    if n_layer == 48:
        return (10, 15, 20, 25, 30, 35)
    if n_layer == 64:
        return (12, 17, 22, 27, 32, 37, 42)
    first, last = _round_half_up(19 * n_layer, 100), _round_half_up(66 * n_layer, 100)
    steps = MAX_SITES - 1
    even = {
        _round_half_up(first * (steps - i) + last * i, steps) for i in range(MAX_SITES)
    }
    return tuple(sorted({min(layer, n_layer - 2) for layer in even if n_layer > 1}))


def _round_half_up(numerator: int, denominator: int) -> int:
    # Python's round() goes to the even neighbour, which would bend the spacing at halves.
    return (2 * numerator + denominator) // (2 * denominator)


def solve_schedule(
    model: ModelSpec, reduction: ReductionSpec, length: int
) -> ReductionSchedule:
    """Solves a reduction request for one length.

    Args:
        model: sizes of the model; weights are not needed.
        reduction: what is asked. A ``keep_ratio`` is taken as it is, read as the decimal that was
            written, and ``target`` is then not looked at. Else a ``target`` of 0, like the method
            "none", gives the dense model.
        length: L, tokens of the prompt.

    Returns:
        The schedule, within ``TOLERANCE`` of the target; sites that would take nothing away are
        left out of it.

    Raises:
        InvalidRequest: a value out of its range, a keep ratio that a site cannot follow, or a
            target that no counts at these sites reach (the message names the nearest).
    """
    sites = default_sites(model.n_layer) if reduction.sites is None else tuple(reduction.sites)
    _check_request(model, reduction, sites, length)
    if reduction.method == "none" or (reduction.keep_ratio is None and reduction.target == 0):
        return _schedule(reduction, sites, length, ())
    if reduction.keep_ratio is not None:
        counts = _counts_at_keep_ratio(reduction, sites, length)
    else:
        counts = _solve_counts(model, reduction, sites, length)
    return _schedule(reduction, sites, length, counts)


def paper_keep_ratio(n_layer: int, sites: Sequence[int], target: float) -> float:
    """Solves the keep ratio of each site for UTRC's own definition, before any rounding to tokens.

    1 - mean over layers of rho**(sites before the layer) = target.

    Args:
        n_layer: layers of the model.
        sites: 0-based layer indices.
        target: share to save, 0 to below 1.

    Returns:
        rho, at least 1/2, where a site has given all it may.
    """
    passed = [sum(site < layer for site in sites) for layer in range(n_layer)]

    def saves_enough(ratio: Fraction) -> bool:
        return 1 - sum(float(ratio) ** count for count in passed) / n_layer >= target

    return float(_largest_ratio(saves_enough)[0])


def _check_request(
    model: ModelSpec, reduction: ReductionSpec, sites: tuple[int, ...], length: int
) -> None:
    """Refuses values that are wrong at any length of prompt."""
    keep_ratio = reduction.keep_ratio
    complaints = [
        (reduction.method not in METHOD_NAMES,
         f"method is {reduction.method!r}, expected one of {', '.join(METHOD_NAMES)}; choose one"),
        (length < 1, f"the length is {length}, expected at least 1 token; give a longer one"),
        (not 0 <= reduction.target < 1,
         f"the target is {reduction.target}, expected a share from 0 to below 1; "
         "write 0.3 to save 30 %"),
        (keep_ratio is not None and not 0 < keep_ratio <= 1,
         f"keep_ratio is {keep_ratio}, expected above 0 and at most 1; 0.9 keeps nine in ten"),
        (reduction.flops not in ("full", "paper"),
         f"flops is {reduction.flops!r}, expected full or paper; choose one"),
        (not 0 <= reduction.prune_permille <= 1000,
         f"prune_permille is {reduction.prune_permille}, expected 0 to 1000; 500 prunes half"),
        (reduction.protect_tail < 0,
         f"protect_tail is {reduction.protect_tail}, expected 0 or more tokens; "
         "0 gives the paper to the letter"),
        (reduction.round_to < 1,
         f"round_to is {reduction.round_to}, expected at least 1; 1 rounds nothing"),
        (any(not 0 <= site < model.n_layer for site in sites),
         f"sites are {list(sites)}, expected layers from 0 to {model.n_layer - 1}, "
         f"for the model has {model.n_layer}; drop the others"),
        (any(a >= b for a, b in pairwise(sites)),
         f"sites are {list(sites)}, expected each layer once and in ascending order; sort them"),
    ]
    for wrong, complaint in complaints:
        if wrong:
            raise InvalidRequest(complaint)


def _removable(method: str, tokens: int, tail: int) -> int:
    """How many of ``tokens`` tokens a site may take away, with the last ``tail`` protected."""
    if method == "utrc-code":  # takes positions 0, 2, 4, ..., all of them ahead of the tail
        limit = (tokens - tail + 1) // 2
    elif METHOD_STEPS[method].matching:  # the tail must fit into the half that stays
        limit = tokens // 2 if tail <= tokens - tokens // 2 else 0
    else:
        limit = tokens - tail
    return max(0, min(limit, tokens // 2))


def _snap(kept: int, fewest: int, tokens: int, multiple: int) -> int:
    """The multiple nearest to ``kept`` (halves up), but at least ``fewest``; at most all tokens."""
    nearest = _round_half_up(kept, multiple) * multiple
    lowest = -(-fewest // multiple) * multiple
    return min(tokens, max(nearest, lowest))


def _counts_at_keep_ratio(
    reduction: ReductionSpec, sites: tuple[int, ...], length: int
) -> tuple[int, ...]:
    """Tokens that leave each site when all keep exactly ``keep_ratio``."""
    ratio = Fraction(str(reduction.keep_ratio))  # the decimal as written, not its binary neighbour
    counts, tokens = [], length
    for layer in sites:
        kept = math.ceil(tokens * ratio)
        fewest = tokens - _removable(reduction.method, tokens, reduction.protect_tail)
        if kept < fewest:
            raise InvalidRequest(
                f"keep_ratio {reduction.keep_ratio} asks the site after layer {layer} to leave "
                f"{kept} of {tokens} tokens, but {reduction.method} with protect_tail "
                f"{reduction.protect_tail} has to leave {fewest}; raise keep_ratio or lower "
                "protect_tail (0 gives the paper to the letter)"
            )
        tokens = _snap(kept, fewest, tokens, reduction.round_to)
        counts.append(tokens)
    return tuple(counts)


def _counts_at(
    reduction: ReductionSpec, n_sites: int, length: int, ratio: Fraction
) -> tuple[int, ...]:
    """Tokens that leave each of ``n_sites`` sites at one keep ratio, limits respected.

    No count falls as the ratio rises, so bisection works. For that, all sites of a matching method
    but the last leave enough for the next one to find room for the tail.
    """
    method, tail = reduction.method, reduction.protect_tail
    counts, tokens = [], length
    for index in range(n_sites):
        fewest = tokens - _removable(method, tokens, tail)
        if METHOD_STEPS[method].matching and index < n_sites - 1:
            fewest = max(fewest, min(tokens, 2 * tail - 1))
        tokens = _snap(math.ceil(tokens * ratio), fewest, tokens, reduction.round_to)
        counts.append(tokens)
    return tuple(counts)


def _largest_ratio(saves_enough: Callable[[Fraction], bool]) -> tuple[Fraction, Fraction]:
    """Bisects rho from 1/2 to 1: the largest found that saves enough, and its upper neighbour."""
    low, high = 1 << (RATIO_BITS - 1), 1 << RATIO_BITS
    while high - low > 1:
        middle = (low + high) // 2
        if saves_enough(Fraction(middle, 1 << RATIO_BITS)):
            low = middle
        else:
            high = middle
    return Fraction(low, 1 << RATIO_BITS), Fraction(high, 1 << RATIO_BITS)


def _solve_counts(
    model: ModelSpec, reduction: ReductionSpec, sites: tuple[int, ...], length: int
) -> tuple[int, ...]:
    """Tokens that leave each site so that the target is met."""
    target = reduction.target

    def saved(counts: tuple[int, ...]) -> float:
        schedule = _schedule(reduction, sites, length, counts)
        return achieved_reduction(model, schedule, reduction.flops)

    def at(ratio: Fraction) -> tuple[int, ...]:
        return _counts_at(reduction, n_sites, length, ratio)

    n_sites = _sites_needed(reduction, len(sites), length, saved)
    if reduction.flops == "paper":  # to the letter: one ratio, and ceil at each site
        counts = at(Fraction(paper_keep_ratio(model.n_layer, sites, target)))
        if abs(saved(counts) - target) <= TOLERANCE:
            return counts
    around = _largest_ratio(lambda ratio: saved(at(ratio)) >= target)
    counts = min(map(at, around), key=lambda counts: abs(saved(counts) - target))
    counts = _adjust(reduction, length, counts, lambda counts: abs(saved(counts) - target))
    if abs(saved(counts) - target) > TOLERANCE:
        raise InvalidRequest(
            f"a reduction of {target:.2%} cannot be met within {TOLERANCE:.1%} at {length} tokens "
            f"with round_to {reduction.round_to}: the nearest found is {saved(counts):.2%}; "
            "ask for that, or for a longer prompt or a smaller round_to"
        )
    return counts


def _sites_needed(
    reduction: ReductionSpec, n_sites: int, length: int, saved: Callable[[tuple[int, ...]], float]
) -> int:
    """How many of the sites, counted from the first, to use: all, unless fewer save more.

    Fewer do where a long protected tail keeps every site but the last from going below it, and
    where a site costs more than it saves.
    """
    reach = {
        count: saved(_counts_at(reduction, count, length, HALF)) for count in range(n_sites, -1, -1)
    }
    enough = [count for count, share in reach.items() if share >= reduction.target]
    best = enough[0] if enough else max(reach, key=lambda count: reach[count])
    if reach[best] < reduction.target - TOLERANCE:
        raise InvalidRequest(
            f"a reduction of {reduction.target:.2%} is out of reach: {reduction.method} at "
            f"{n_sites} sites, {length} tokens, protect_tail {reduction.protect_tail} and round_to "
            f"{reduction.round_to} saves at most {reach[best]:.2%} by the {reduction.flops} count; "
            "ask for less, choose other sites, or lower protect_tail "
            "(0 gives the paper to the letter)"
        )
    return best


def _adjust(
    reduction: ReductionSpec,
    length: int,
    counts: tuple[int, ...],
    gap: Callable[[tuple[int, ...]], float],
) -> tuple[int, ...]:
    """Moves single sites by a step until the target is met within the tolerance.

    Best-first search from the nearest counts known; where none will do, the nearest seen remain.
    """
    queue = [(gap(counts), counts)]
    best, seen = queue[0], {counts}
    for _ in range(MAX_ADJUSTMENTS):
        if best[0] <= TOLERANCE or not queue:
            break
        _, counts = heappop(queue)
        for moved in _moves(reduction, length, counts):
            if moved not in seen:
                seen.add(moved)
                heappush(queue, (gap(moved), moved))
        best = min([best, *queue[:1]])
    return best[1]


def _moves(
    reduction: ReductionSpec, length: int, counts: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Allowed counts in which one site went up or down to the next multiple."""
    step = reduction.round_to
    for site, kept in enumerate(counts):
        for target in ((kept - 1) // step * step, (kept // step + 1) * step):
            moved, tokens, allowed = [], length, True
            for index, now in enumerate(counts):
                # Nothing comes back at a later site.
                now = min(tokens, target if index == site else now)
                fewest = tokens - _removable(reduction.method, tokens, reduction.protect_tail)
                allowed = allowed and now >= fewest
                moved.append(now)
                tokens = now
            if allowed:
                yield tuple(moved)


def _schedule(
    reduction: ReductionSpec, sites: tuple[int, ...], length: int, counts: tuple[int, ...]
) -> ReductionSchedule:
    """The schedule for the tokens that leave the first sites; idle sites are dropped."""
    entering = [length, *counts]
    return ReductionSchedule(
        method=reduction.method,
        length=length,
        sites=tuple(
            Site(layer=layer, tokens_in=before, tokens_out=after)
            for layer, before, after in zip(sites, entering, counts, strict=False)
            if after < before
        ),
        prune_permille=reduction.prune_permille,
        protect_tail=reduction.protect_tail,
    )
