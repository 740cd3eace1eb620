"""Tests of tokred_export.reduction.flops: formulas against literal loops, tables against sums."""

from __future__ import annotations

import random
from math import prod

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred_export.errors import InvalidRequest
from tokred_export.reduction.flops import (
    METHOD_STEPS,
    achieved_reduction,
    plan_rows,
    prefill_flops,
    scan_flops,
    site_flops,
)
from tokred_export.specs import ModelSpec, ReductionSchedule, Site

REDUCING = [name for name in METHOD_STEPS if name != "none"]


def tiny_model(**changes) -> ModelSpec:
    """A model small enough to count by hand."""
    sizes = dict(
        layout="mamba_ssm", vocab_size=11, d_model=5, n_layer=4, d_inner=8, n_heads=4, head_dim=2,
        d_state=3, n_groups=2, d_conv=4, chunk_size=3, norm_group_size=4,
    )
    return ModelSpec(**{**sizes, **changes})


MAMBA2_130M = tiny_model(
    vocab_size=50288, d_model=768, n_layer=24, d_inner=1536, n_heads=24, head_dim=64, d_state=128,
    n_groups=1, chunk_size=256, norm_group_size=1536,
)


def counted_scan(model, x, b, c, decay):
    """Chunked SSD in plain loops; returns outputs, the final state and the multiply-adds done."""
    heads, size, width = range(model.n_heads), range(model.head_dim), range(model.d_state)
    share = model.n_heads // model.n_groups
    state = [[[0.0 for _ in width] for _ in size] for _ in heads]
    outputs = [[[0.0 for _ in size] for _ in heads] for _ in x]
    done = 0
    for start in range(0, len(x), model.chunk_size):
        chunk = range(start, min(start + model.chunk_size, len(x)))
        scores = {}
        for g in range(model.n_groups):
            for i in chunk:
                for j in chunk:
                    scores[g, i, j] = 0.0
                    for n in width:
                        scores[g, i, j] += c[i][g][n] * b[j][g][n]
                        done += 1
        for h in heads:
            g = h // share
            fade = [row[h] for row in decay]
            for p in size:
                for i in chunk:
                    for j in chunk:  # the masked half is multiplied too, by zero
                        weight = prod(fade[j + 1 : i + 1]) if j <= i else 0.0
                        outputs[i][h][p] += scores[g, i, j] * weight * x[j][h][p]
                        done += 1
                    for n in width:
                        outputs[i][h][p] += (
                            c[i][g][n] * prod(fade[start : i + 1]) * state[h][p][n]
                        )
                        done += 1
                for n in width:
                    own = 0.0
                    for j in chunk:
                        own += b[j][g][n] * prod(fade[j + 1 : chunk.stop]) * x[j][h][p]
                        done += 1
                    state[h][p][n] = prod(fade[start : chunk.stop]) * state[h][p][n] + own
                    done += 1
    return outputs, state, done


def recurrent_scan(model, x, b, c, decay):
    """The same SSM one token at a time: the definition."""
    heads, size, width = range(model.n_heads), range(model.head_dim), range(model.d_state)
    share = model.n_heads // model.n_groups
    state = [[[0.0 for _ in width] for _ in size] for _ in heads]
    outputs = []
    for t in range(len(x)):
        for h in heads:
            for p in size:
                for n in width:
                    state[h][p][n] *= decay[t][h]
                    state[h][p][n] += b[t][h // share][n] * x[t][h][p]
        outputs.append(
            [[sum(c[t][h // share][n] * state[h][p][n] for n in width) for p in size]
             for h in heads]
        )
    return outputs, state


def flat(nested):
    """All numbers of nested lists, in order."""
    return [n for item in nested for n in flat(item)] if isinstance(nested, list) else [nested]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_scan_matches_a_counted_scan(tokens, chunk_size):
    """The formula is twice the multiply-adds of a literal chunked scan that computes the SSM."""
    model = tiny_model(chunk_size=chunk_size)
    rng = random.Random(tokens)

    def noise(*shape):
        return [noise(*shape[1:]) for _ in range(shape[0])] if shape else rng.uniform(0.1, 0.9)

    x = noise(tokens, model.n_heads, model.head_dim)
    b, c = (noise(tokens, model.n_groups, model.d_state) for _ in range(2))
    decay = noise(tokens, model.n_heads)
    outputs, state, done = counted_scan(model, x, b, c, decay)
    assert (flat(outputs), flat(state)) == tuple(
        pytest.approx(flat(part), rel=1e-12) for part in recurrent_scan(model, x, b, c, decay)
    )
    assert scan_flops(model, tokens) == 2 * done


def counted_layer(model, tokens, last=False):
    """FLOPs of a layer's other parts, one loop step for each multiply-add or norm element.

    Behind the scan of the last layer only the last token goes on.
    """
    counts = dict.fromkeys(["in_proj", "conv", "norms", "out_proj"], 0)
    gate, values, inputs, outputs = (
        model.d_inner, model.d_inner, model.n_groups * model.d_state, model.n_groups * model.d_state
    )
    for token in range(tokens):
        goes_on = not last or token == tokens - 1
        for _ in range(model.d_model):
            for _ in range(gate + values + inputs + outputs + model.n_heads):
                counts["in_proj"] += 2
            for _ in range(model.d_inner):
                counts["out_proj"] += 2 * goes_on
            counts["norms"] += 4
        for _ in range(values + inputs + outputs):
            for _ in range(model.d_conv):
                counts["conv"] += 2
        for _ in range(model.d_inner):
            counts["norms"] += 4 * goes_on
    return counts


def counted_site(model, method, site):
    """FLOPs of a site, one loop step for each operation."""
    count = 0
    low = site.tokens_in // 2
    for _ in range(site.tokens_in):
        if method in ("utrc", "evit"):
            for _ in range(model.d_inner):
                count += 1
        if method in ("utrc", "pumer"):
            for _ in range(model.d_model):
                count += 3
    if method in ("utrc", "pumer"):
        for _ in range(low):
            for _ in range(low, site.tokens_in):
                for _ in range(model.d_model):
                    count += 2
    if method in ("utrc", "utrc-code", "pumer"):
        for _ in range(site.tokens_in - site.tokens_out):
            for _ in range(model.d_model):
                count += 1 + 1  # hidden, residual
    return count


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("length", [5, 8])
def test_prefill_matches_nested_loops(method, length):
    """Every column of every row agrees with a count by loops, and so do the totals."""
    model = tiny_model()
    sites = (
        Site(layer=0, tokens_in=length, tokens_out=length - 2),
        Site(layer=2, tokens_in=length - 2, tokens_out=length - 3),
    )
    flops = prefill_flops(model, ReductionSchedule(method=method, length=length, sites=sites))
    assert [row.tokens for row in flops.layers] == [length, length - 2, length - 2, length - 3]
    total = 0
    for row, site in zip(flops.layers, [sites[0], None, sites[1], None], strict=True):
        for name, count in counted_layer(model, row.tokens, row.layer == 3).items():
            assert getattr(row, name) == count, name
            total += count
        assert row.reduction == (counted_site(model, method, site) if site else 0)
        assert row.scan == scan_flops(model, row.tokens)
        total += row.scan + row.reduction
    assert flops.head == 2 * model.d_model * model.vocab_size + 4 * model.d_model
    assert flops.total == total + flops.head


def test_130m_by_hand():
    """The 130m sizes at 2048 tokens give the numbers worked out on paper."""
    row = prefill_flops(MAMBA2_130M, ReductionSchedule(method="none", length=2048)).layers[7]
    assert row.in_proj == 2 * 2048 * 768 * 3352
    assert row.conv == 2 * 2048 * 1792 * 4
    assert row.scan == 8 * (2 * 256 * 256 * (128 + 1536) + 4 * 256 * 1536 * 128 + 2 * 1536 * 128)
    assert row.out_proj == 2 * 2048 * 1536 * 768
    site = Site(layer=7, tokens_in=2048, tokens_out=1800)
    assert site_flops(MAMBA2_130M, "utrc", site) == (
        2048 * 1536 + 2 * 1024 * 1024 * 768 + 3 * 2048 * 768 + 2 * 248 * 768
    )
    assert site_flops(MAMBA2_130M, "utrc-code", site) == 2 * 248 * 768


@given(st.integers(1, 3000), st.integers(1, 300))
def test_scan_grows_with_tokens(tokens, chunk_size):
    """One token more never costs less, and a whole number of chunks costs that many chunks."""
    model = tiny_model(chunk_size=chunk_size)
    assert scan_flops(model, tokens) > scan_flops(model, tokens - 1)
    assert scan_flops(model, tokens * chunk_size) == tokens * scan_flops(model, chunk_size)


@pytest.mark.parametrize("method", ["none", "tome"])
def test_sites_need_a_reducing_method(method):
    """A schedule with sites and a method that removes nothing, or is unknown, is refused."""
    site = Site(layer=1, tokens_in=6, tokens_out=5)
    with pytest.raises(InvalidRequest, match=rf"'{method}'; expected one of utrc, .*; take"):
        prefill_flops(tiny_model(), ReductionSchedule(method=method, length=6, sites=(site,)))


@st.composite
def schedules(draw):
    """A tiny model and any schedule for it, solved or not."""
    model = tiny_model(n_layer=draw(st.integers(1, 9)), chunk_size=draw(st.integers(1, 40)))
    now = length = draw(st.integers(1, 200))
    sites = []
    for layer in sorted(draw(st.sets(st.integers(0, model.n_layer - 1), max_size=5))):
        if now > 1:
            kept = draw(st.integers(now - now // 2, now - 1))
            sites.append(Site(layer=layer, tokens_in=now, tokens_out=kept))
            now = kept
    method = draw(st.sampled_from(REDUCING))
    return model, ReductionSchedule(method=method, length=length, sites=tuple(sites))


@settings(deadline=None)
@given(schedules())
def test_plan_rows_add_up(case):
    """Each row's running total is the sum of the layers so far; the last one is everything."""
    model, schedule = case
    reduced = prefill_flops(model, schedule)
    dense = prefill_flops(model, ReductionSchedule(method="none", length=schedule.length))
    *site_rows, end = plan_rows(model, schedule)
    assert [(r.layer, r.tokens_in, r.tokens_out) for r in site_rows] == [
        (s.layer, s.tokens_in, s.tokens_out) for s in schedule.sites
    ]
    for row in site_rows:
        assert row.removed == row.tokens_in - row.tokens_out
        assert row.cumulative_flops == sum(r.total for r in reduced.layers[: row.layer + 1])
        assert row.cumulative_flops_dense == sum(r.total for r in dense.layers[: row.layer + 1])
        assert row.share == row.cumulative_flops / row.cumulative_flops_dense
    assert (end.layer, end.removed) == (model.n_layer - 1, 0)
    assert end.tokens_in == end.tokens_out == schedule.length_out
    assert (end.cumulative_flops, end.cumulative_flops_dense) == (reduced.total, dense.total)
    assert 1 - end.share == achieved_reduction(model, schedule, "full")


@settings(deadline=None)
@given(schedules())
def test_paper_count_is_the_mean_token_share(case):
    """The paper's count agrees with a walk over the layers."""
    model, schedule = case
    now, shares = schedule.length, []
    for layer in range(model.n_layer):
        shares.append(now / schedule.length)
        for site in schedule.sites:
            if site.layer == layer:
                now -= site.removed
    expected = 1 - sum(shares) / len(shares)
    assert achieved_reduction(model, schedule, "paper") == pytest.approx(expected, abs=1e-12)


def test_dense_saves_nothing():
    """Without sites both counts say exactly zero, and the plan is a single row."""
    dense = ReductionSchedule(method="none", length=77)
    assert achieved_reduction(MAMBA2_130M, dense, "full") == 0
    assert achieved_reduction(MAMBA2_130M, dense, "paper") == 0
    [row] = plan_rows(MAMBA2_130M, dense)
    assert (row.layer, row.tokens_in, row.tokens_out, row.share) == (23, 77, 77, 1.0)


def test_flops_are_plain_values():
    """Counts cannot be changed and survive a trip through JSON."""
    flops = prefill_flops(MAMBA2_130M, ReductionSchedule(method="none", length=2048))
    with pytest.raises(AttributeError):
        flops.head = 0
    assert msgspec.json.decode(msgspec.json.encode(flops), type=type(flops)) == flops
