"""Tests of tokred_export.reduction.schedule: published ratios, limits, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokred_export.errors import InvalidRequest
from tokred_export.reduction.schedule import (
    METHOD_NAMES,
    TOLERANCE,
    achieved_reduction,
    default_sites,
    paper_keep_ratio,
    prefill_flops,
    solve_schedule,
)
from tokred_export.specs import ModelSpec, ReductionSchedule, ReductionSpec, Site

REDUCING = [name for name in METHOD_NAMES if name != "none"]


def mamba2(d_model: int, n_layer: int, **changes) -> ModelSpec:
    """A model with the sizes of the published ones: expand 2, heads of 64, state 128."""
    sizes = dict(
        layout="mamba_ssm", vocab_size=50288, d_model=d_model, n_layer=n_layer,
        d_inner=2 * d_model, n_heads=d_model // 32, head_dim=64, d_state=128,
        norm_group_size=2 * d_model,
    )
    return ModelSpec(**{**sizes, **changes})


MODEL_130M = mamba2(768, 24)
MODEL_1B3 = mamba2(2048, 48)
MODEL_2B7 = mamba2(2560, 64)

PUBLISHED = [
    (MODEL_2B7, 0.1, 0.9729, 0.825),
    (MODEL_2B7, 0.2, 0.9415, 0.656),
    (MODEL_2B7, 0.3, 0.9043, 0.495),
    (MODEL_1B3, 0.1, 0.9651, 0.808),
    (MODEL_1B3, 0.2, 0.9248, 0.626),
    (MODEL_1B3, 0.3, 0.8768, 0.455),
]


def solve(model: ModelSpec, length: int, **request):
    """Solves a request written as keywords."""
    return solve_schedule(model, ReductionSpec(**request), length)


def kept(schedule) -> list[int]:
    """Tokens that leave each site."""
    return [site.tokens_out for site in schedule.sites]


def test_default_sites_are_the_papers():
    """48 and 64 layers get the sites that the paper names."""
    assert default_sites(48) == (10, 15, 20, 25, 30, 35)
    assert default_sites(64) == (12, 17, 22, 27, 32, 37, 42)


@pytest.mark.parametrize(
    ("n_layer", "sites"),
    [(1, ()), (2, (0,)), (3, (1,)), (4, (1, 2)), (6, (1, 2, 3, 4)), (8, (2, 3, 4, 5)),
     (12, (2, 3, 4, 5, 6, 7, 8)), (24, (5, 7, 9, 11, 12, 14, 16)),
     (32, (6, 9, 11, 14, 16, 19, 21)), (96, (18, 26, 33, 41, 48, 56, 63))],
)
def test_default_sites_of_other_depths(n_layer, sites):
    """Other depths get up to seven, spread evenly, halves rounded up."""
    assert default_sites(n_layer) == sites


@given(st.integers(1, 500))
def test_default_sites_shorten_something(n_layer):
    """Sites ascend, come once, number at most seven, and a layer is left to profit from each."""
    sites = default_sites(n_layer)
    assert len(sites) <= 7
    assert all(a < b for a, b in pairwise(sites))
    assert all(0 <= site < n_layer - 1 for site in sites)


@pytest.mark.parametrize(("model", "target", "ratio", "final"), PUBLISHED)
def test_published_ratios(model, target, ratio, final):
    """The paper's count gives its keep ratios to four decimals, and ceil at each site."""
    sites = default_sites(model.n_layer)
    solved = paper_keep_ratio(model.n_layer, sites, target)
    assert round(solved, 4) == ratio
    assert solved ** len(sites) == pytest.approx(final, abs=1e-3)
    schedule = solve(model, 2048, target=target, flops="paper")
    assert tuple(site.layer for site in schedule.sites) == sites
    tokens = 2048
    for site in schedule.sites:
        assert site.tokens_in == tokens
        assert site.tokens_out == math.ceil(tokens * solved)
        tokens = site.tokens_out


def test_published_counts_at_2048():
    """The final counts at 2048 tokens, to the token; ceil leaves a few more than rho**sites."""
    final = [solve(m, 2048, target=t, flops="paper").length_out for m, t, _, _ in PUBLISHED]
    assert final == [1692, 1346, 1015, 1658, 1284, 933]
    for tokens, (_, _, _, share) in zip(final, PUBLISHED, strict=True):
        assert 0 <= tokens - share * 2048 <= 7


def test_keep_ratio_of_the_official_code():
    """Its default, 0.905 at seven sites, gives the sparsity and the output that its log names."""
    schedule = solve(MODEL_2B7, 2048, keep_ratio=0.905)
    tokens, counts = 2048, []
    for _ in range(7):
        tokens = math.ceil(tokens * 0.905)
        counts.append(tokens)
    assert kept(schedule) == counts
    assert achieved_reduction(MODEL_2B7, schedule, "paper") == pytest.approx(0.298, abs=1e-3)
    assert schedule.length_out / 2048 == pytest.approx(0.497, abs=2e-3)


@pytest.mark.parametrize("length", [1000, 100, 10])
def test_keep_ratio_is_read_as_written(length):
    """0.55 of a hundred is 55, although the float 0.55 * 100 lies above 55."""
    assert kept(solve(MODEL_130M, length, keep_ratio=0.55, sites=(3,))) == [
        (length * 55 + 99) // 100
    ]


def test_keep_ratio_ignores_the_target():
    """A keep ratio is a whole answer: the target, even 0, changes nothing."""
    counts = kept(solve(MODEL_130M, 512, keep_ratio=0.9))
    assert counts == kept(solve(MODEL_130M, 512, keep_ratio=0.9, target=0.0))
    assert counts[0] == 461


@pytest.mark.parametrize("length", [1, 2, 2048])
@pytest.mark.parametrize(
    "request_", [{"method": "none", "target": 0.3}, {"target": 0.0}, {"keep_ratio": 1.0},
                 {"method": "none", "keep_ratio": 0.9}],
)
def test_dense_requests(length, request_):
    """The method none, a target of 0 and a keep ratio of 1 are the dense model."""
    schedule = solve(MODEL_130M, length, **request_)
    assert schedule.sites == ()
    assert schedule.length_out == schedule.length == length


@pytest.mark.parametrize("length", [256, 2048, 8192])
@pytest.mark.parametrize("target", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("method", REDUCING)
def test_full_target_is_met_by_real_flops(method, target, length):
    """The usual targets are met on the real sizes, by a count taken anew."""
    schedule = solve(MODEL_130M, length, method=method, target=target)
    dense = solve(MODEL_130M, length, method="none")
    share = prefill_flops(MODEL_130M, schedule).total / prefill_flops(MODEL_130M, dense).total
    assert 1 - share == pytest.approx(target, abs=TOLERANCE)


def test_matching_has_to_be_paid_for():
    """With the site's own cost counted, matching methods keep less for the same saving."""
    left = {m: solve(MODEL_130M, 8192, method=m, target=0.2).length_out for m in REDUCING}
    # Importance and merging cost next to nothing, and may vanish in the integers.
    assert left["utrc"] <= left["pumer"] < left["evit"] <= left["utrc-code"]


def test_options_travel_into_the_schedule():
    """What the run needs besides counts is carried over."""
    schedule = solve(MODEL_130M, 512, method="pumer", prune_permille=250, protect_tail=7)
    assert (schedule.method, schedule.length) == ("pumer", 512)
    assert (schedule.prune_permille, schedule.protect_tail) == (250, 7)


def test_single_sites_are_moved_at_short_lengths():
    """Where no one ratio comes near enough, single sites move, and the target is still met."""
    model, sites = mamba2(64, 6), (0, 1, 2, 3)
    one_ratio = [
        achieved_reduction(model, solve(model, 25, keep_ratio=k / 1000, sites=sites), "paper")
        for k in range(500, 1001)
    ]
    assert min(abs(share - 0.2) for share in one_ratio) > 2 * TOLERANCE
    schedule = solve(model, 25, target=0.2, flops="paper", sites=sites)
    assert achieved_reduction(model, schedule, "paper") == pytest.approx(0.2, abs=TOLERANCE)


@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
@pytest.mark.parametrize("length", [2048, 2000])
def test_round_to(length, multiple):
    """Kept counts are multiples, and the target is met all the same."""
    schedule = solve(MODEL_130M, length, target=0.3, round_to=multiple)
    assert schedule.sites
    assert all(site.tokens_out % multiple == 0 for site in schedule.sites)
    assert achieved_reduction(MODEL_130M, schedule) == pytest.approx(0.3, abs=TOLERANCE)


def test_round_to_goes_to_the_nearest_multiple():
    """By sixteens 95 goes up to 96 and 98 down to it; 109 of 110 cannot go up to 112 and stays."""
    assert kept(solve(MODEL_130M, 100, keep_ratio=0.95, sites=(3,), round_to=16)) == [96]
    assert kept(solve(MODEL_130M, 110, keep_ratio=0.89, sites=(3,), round_to=16)) == [96]
    assert kept(solve(MODEL_130M, 110, keep_ratio=0.99, sites=(3,), round_to=16)) == []


def test_round_to_too_coarse_says_so():
    """A multiple that leaves no choice near the target names the nearest share."""
    with pytest.raises(InvalidRequest, match=r"nearest found is [0-9.]+%.*smaller round_to"):
        solve(MODEL_130M, 2048, target=0.13, round_to=1024, sites=(5,))


@st.composite
def requests(draw):
    """A small model, a request and a length; most can be met, some cannot."""
    n_layer = draw(st.sampled_from([24, 12, 9, 6]) | st.integers(1, 14))
    heads, size = draw(st.sampled_from([(2, 4), (4, 8), (8, 16)]))
    model = mamba2(
        draw(st.sampled_from([8, 32, 96])), n_layer, d_inner=heads * size, n_heads=heads,
        head_dim=size, d_state=draw(st.sampled_from([4, 16])), norm_group_size=size,
        vocab_size=draw(st.sampled_from([16, 1000])), chunk_size=draw(st.sampled_from([4, 64])),
    )
    layers = st.sets(st.integers(0, n_layer - 1), max_size=7)
    sites = draw(st.none() | st.none() | layers.map(sorted))
    reduction = ReductionSpec(
        method=draw(st.sampled_from([*REDUCING, *REDUCING, "none"])),
        target=draw(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.3]) | st.floats(0, 0.7)),
        flops=draw(st.sampled_from(["full", "paper"])),
        sites=None if sites is None else tuple(sites),
        protect_tail=draw(st.sampled_from([1, 1, 1, 0, 4, 50])),
        round_to=draw(st.sampled_from([1, 1, 1, 2, 8])),
    )
    return model, reduction, draw(st.sampled_from([128, 500, 2048]) | st.integers(1, 3000))


def tail_is_safe(reduction: ReductionSpec, tokens_in: int, removed: int) -> bool:
    """Whether a site can take ``removed`` tokens and leave the tail alone."""
    tail = reduction.protect_tail
    return {
        "utrc": tail <= math.ceil(tokens_in / 2),
        "pumer": tail <= math.ceil(tokens_in / 2),
        "evit": tokens_in - removed >= tail,
        "utrc-code": 2 * (removed - 1) + 1 + tail <= tokens_in,
    }[reduction.method]


@settings(deadline=None, max_examples=300)
@given(requests())
def test_any_request_is_met_or_refused(case):
    """A schedule respects every limit and meets its target; else the request is refused."""
    model, reduction, length = case
    try:
        schedule = solve_schedule(model, reduction, length)
    except InvalidRequest as error:
        assert "saves at most" in str(error) or "nearest found is" in str(error)
        return
    assert schedule == solve_schedule(model, reduction, length)
    asked = default_sites(model.n_layer) if reduction.sites is None else reduction.sites
    assert set(site.layer for site in schedule.sites) <= set(asked)
    tokens = length
    for site in schedule.sites:
        assert site.tokens_in == tokens
        assert 1 <= site.tokens_out < site.tokens_in
        assert site.removed <= site.tokens_in // 2
        assert site.tokens_out % reduction.round_to == 0
        assert tail_is_safe(reduction, site.tokens_in, site.removed)
        tokens = site.tokens_out
    target = 0 if reduction.method == "none" else reduction.target
    share = achieved_reduction(model, schedule, reduction.flops)
    assert share == pytest.approx(target, abs=TOLERANCE)


@settings(deadline=None)
@given(requests())
def test_tokens_entering_agrees_with_a_walk(case):
    """Tokens entering the layers are what a walk past the sites counts, and never grow."""
    model, reduction, length = case
    try:
        schedule = solve_schedule(model, reduction, length)
    except InvalidRequest:
        assume(False)
    now, expected = length, []
    for layer in range(model.n_layer):
        expected.append(now)
        for site in schedule.sites:
            if site.layer == layer:
                now -= site.tokens_in - site.tokens_out
    entering = schedule.tokens_entering(model.n_layer)
    assert list(entering) == expected
    assert all(a >= b >= 1 for a, b in pairwise(entering))
    assert [row.tokens for row in prefill_flops(model, schedule).layers] == expected


def all_counts(reduction: ReductionSpec, n_sites: int, length: int):
    """Every list of counts that the limits allow."""
    if n_sites == 0:
        yield []
        return
    for removed in range(length // 2 + 1):
        if removed == 0 or tail_is_safe(reduction, length, removed):
            for later in all_counts(reduction, n_sites - 1, length - removed):
                yield [length - removed, *later]


@pytest.mark.parametrize("tail", [0, 1, 5])
@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("definition", ["full", "paper"])
def test_largest_reduction_is_the_largest(method, definition, tail):
    """The share named as out of reach is the best of all counts, tried one by one."""
    model = mamba2(64, 9)
    reduction = ReductionSpec(
        method=method, target=0.95, flops=definition, sites=(1, 3, 4), protect_tail=tail
    )
    best = 0.0
    for counts in all_counts(reduction, 3, 16):
        sites = tuple(
            Site(layer=layer, tokens_in=a, tokens_out=b)
            for layer, a, b in zip(reduction.sites, [16, *counts], counts, strict=False)
            if b < a
        )
        schedule = ReductionSchedule(method=method, length=16, sites=sites)
        best = max(best, achieved_reduction(model, schedule, definition))
    with pytest.raises(InvalidRequest, match=rf"saves at most {best:.2%}"):
        solve_schedule(model, reduction, 16)


def test_whatever_was_named_as_largest_can_be_had():
    """Asking for the largest reachable share succeeds."""
    with pytest.raises(InvalidRequest) as caught:
        solve(MODEL_130M, 2048, target=0.9)
    largest = float(str(caught.value).split("saves at most ")[1].split("%")[0]) / 100
    schedule = solve(MODEL_130M, 2048, target=largest)
    assert achieved_reduction(MODEL_130M, schedule) == pytest.approx(largest, abs=TOLERANCE)


def test_long_prompts_pay_more_for_matching_than_they_save():
    """Matching grows with the square: far enough out the sites save nothing, and that is said."""
    with pytest.raises(InvalidRequest, match=r"at 7 sites, 1048576 tokens.*at most 0\.00%"):
        solve(MODEL_130M, 2**20, target=0.1)
    assert solve(MODEL_130M, 2**20, target=0.1, method="evit").sites


def test_a_long_tail_uses_fewer_sites_if_that_saves_more():
    """With a tail near half the prompt, one early site beats many timid ones."""
    schedule = solve(MODEL_130M, 2048, target=0.3, protect_tail=1000)
    assert (schedule.sites[0].layer, schedule.sites[0].tokens_in) == (5, 2048)
    assert achieved_reduction(MODEL_130M, schedule) == pytest.approx(0.3, abs=TOLERANCE)
    assert all(math.ceil(site.tokens_in / 2) >= 1000 for site in schedule.sites)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"method": "tome"}, "'tome', expected one of utrc, utrc-code, evit, pumer, none"),
        ({"target": -0.1}, "the target is -0.1"),
        ({"target": 1.0}, "the target is 1.0"),
        ({"target": 30}, "the target is 30, .*write 0.3"),
        ({"target": math.nan}, "the target is nan"),
        ({"flops": "half"}, "flops is 'half'"),
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": 1.01}, "keep_ratio is 1.01"),
        ({"keep_ratio": math.nan}, "keep_ratio is nan"),
        ({"sites": (3, 24)}, r"sites are \[3, 24\], expected layers from 0 to 23"),
        ({"sites": (-1, 3)}, r"sites are \[-1, 3\], expected layers"),
        ({"sites": (3, 3)}, r"sites are \[3, 3\], expected each layer once"),
        ({"sites": (5, 3)}, r"sites are \[5, 3\], .*ascending"),
        ({"prune_permille": -1}, "prune_permille is -1"),
        ({"prune_permille": 1001}, "prune_permille is 1001"),
        ({"protect_tail": -1}, "protect_tail is -1, .*0 gives the paper to the letter"),
        ({"round_to": 0}, "round_to is 0"),
        ({"sites": ()}, r"at 0 sites.*saves at most 0\.00%"),
        ({"sites": (23,)}, r"saves at most 0\.00%"),
        ({"keep_ratio": 0.3}, "layer 5 to leave 615 of 2048 tokens, .* has to leave 1024; raise"),
        ({"keep_ratio": 0.9, "protect_tail": 1025}, "protect_tail 1025 has to leave 2048"),
        ({"protect_tail": 2000}, r"protect_tail 2000 .*saves at most 0\.00%.*lower protect_tail"),
    ],
)
def test_refused(request_, said):
    """What cannot be meant is refused with what was found and what was expected."""
    with pytest.raises(InvalidRequest, match=said):
        solve(MODEL_130M, 2048, **request_)


@pytest.mark.parametrize("length", [0, -5])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_refuses_a_length_below_one(length, method):
    """No length below one token has a schedule, not even a dense one."""
    with pytest.raises(InvalidRequest, match=f"the length is {length}, expected at least 1"):
        solve(MODEL_130M, length, method=method)


def test_one_layer_cannot_be_reduced():
    """A single layer has no site; asking for less is refused, asking for nothing is not."""
    with pytest.raises(InvalidRequest, match=r"at 0 sites"):
        solve(mamba2(64, 1), 128)
    assert solve(mamba2(64, 1), 128, target=0.0).sites == ()
