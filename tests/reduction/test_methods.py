"""The reduction methods against plain loops, and the plain loops against examples by hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hand_examples import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import (
    NaiveChoice,
    apply_naive,
    cosine,
    importance,
    reduce_naive,
    similarities,
)
from tokred_plugins.opset import CUSTOM, PLAIN

from tokred_export.reduction.methods import METHODS, Choice, reduce_tokens
from tokred_export.specs import Site

LINKED = ("utrc", "pumer")
NAMES = ("utrc", "utrc-code", "evit", "pumer")
PERMILLES = (0, 300, 500, 700, 1000)
TAILS = (0, 1, 3)


class Batch(NamedTuple):
    """Inputs of one site: y [B,L,E], hidden and residual [B,L,D], pads [B]."""

    y: np.ndarray
    hidden: np.ndarray
    residual: np.ndarray
    pads: list[int]


by_hand = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


def site_of(length, removed):
    """A site that takes `removed` of `length` tokens away."""
    return Site(layer=0, tokens_in=length, tokens_out=length - removed)


def run(method, batch, removed, permille, tail, *, ops=PLAIN, dtype=torch.float32, choice=None):
    """The implementation on a batch of arrays."""
    tensors = [torch.tensor(np.asarray(x), dtype=dtype) for x in batch[:3]]
    pads = torch.tensor(batch.pads, dtype=torch.int32)
    site = site_of(tensors[1].shape[1], removed)
    return reduce_tokens(method, *tensors, pads, site, permille, tail, ops=ops, choice=choice)


def truth(method, batch, removed, permille, tail):
    """The loops on each sequence of a batch."""
    rows = zip(batch.y, batch.hidden, batch.residual, batch.pads, strict=True)
    return [reduce_naive(method, *row, removed, permille, tail) for row in rows]


def assert_close(got, expected, what):
    """Equal within 1e-6 of the array's largest magnitude."""
    scale = max(np.abs(expected).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(
        got.double().numpy(), expected, rtol=1e-6, atol=1e-6 * scale, err_msg=what
    )


def assert_same(reduced, expected):
    """Positions equal, values close, types as promised."""
    assert reduced.choice.src.dtype == torch.int32
    assert reduced.choice.dst.dtype == torch.int32
    assert reduced.choice.merge.dtype == torch.bool
    assert reduced.keep.dtype == torch.int32
    got = {
        "src": reduced.choice.src.tolist(),
        "dst": reduced.choice.dst.tolist(),
        "merge": reduced.choice.merge.tolist(),
        "keep": reduced.keep.tolist(),
    }
    assert got == {name: [getattr(row, name) for row in expected] for name in got}
    for b, row in enumerate(expected):
        assert_close(reduced.hidden[b], row.hidden, f"hidden of sequence {b}")
        assert_close(reduced.residual[b], row.residual, f"residual of sequence {b}")


def pad_kinds(length, removed):
    """None, fewer than r, r, more, more than half, all but one, all."""
    half = length // 2
    kinds = (0, 1, removed - 1, removed, removed + 1, half, half + 1, length - 1, length)
    return sorted({pads for pads in kinds if 0 <= pads <= length})


def feasible(method, length, removed, tail):
    """Whether the method can remove this many whatever the padding."""
    if method == "evit":
        return removed <= length - tail
    if method == "utrc-code":  # its highest source is 2 (r - 1), with no padding
        return removed <= length // 2 and 2 * removed - 1 <= length - tail
    return removed <= length // 2 and tail <= length - length // 2


def most(method, length, tail):
    """The largest feasible r up to floor(L/2)."""
    return max(r for r in range(length // 2 + 1) if feasible(method, length, r, tail))


def exact_vectors(rng, count, width):
    """Vectors [count,width] whose norms are powers of two: every cosine is exact, most tie.

    0, 1 or 4 entries (or 16) are plus or minus one power of two, the others are zero.
    """
    rows = np.zeros((count, width))
    for row in rows:
        size = rng.choice([size for size in (0, 1, 1, 4, 4, 16) if size <= width])
        where = rng.choice(width, size=size, replace=False)
        row[where] = rng.choice([-1, 1], size=size) * 2.0 ** rng.integers(-2, 3)
    return rows


def tied_batch(rng, length, pads):
    """Small integers and exact cosines: ties everywhere."""
    count, width = len(pads), int(rng.choice([1, 4, 16]))
    y = rng.integers(-2, 3, size=(count, length, int(rng.choice([1, 2, 3]))))
    hidden = exact_vectors(rng, count * length, width).reshape(count, length, width)
    residual = rng.integers(-8, 9, size=(count, length, width))
    return Batch(y.astype(float), hidden, residual.astype(float), pads)


def apart(values, gap):
    """Whether no two values lie closer than `gap`."""
    return bool((np.diff(np.sort(np.asarray(values, dtype=float))) > gap).all())


def float_batch(rng, length, pads, width=24):
    """Random normal float32 values, drawn again until rounding cannot change any order."""
    while True:
        y, hidden, residual = rng.standard_normal((3, len(pads), length, width), dtype=np.float32)
        likeness = [similarities(row) for row in hidden]
        pairs = [np.array(s)[np.triu_indices(length, 1)] for s in likeness]
        if all(apart(importance(row), 1e-6) for row in y) and all(apart(p, 1e-6) for p in pairs):
            return Batch(y, hidden, residual, pads)


@by_hand
def test_naive_by_hand(example):
    """The loops give what was worked out on paper."""
    *question, expected = example
    got = reduce_naive(*question)
    assert got[:4] == expected[:4]
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=1e-15)
    np.testing.assert_allclose(got.residual, expected.residual, rtol=1e-15)


def test_naive_parts_by_hand():
    """Importance clips below zero; a zero vector has cosine 0; given scores replace computed."""
    assert importance([[-5, 3], [4, 0], [-1, -1]]) == [1.5, 2, 0]
    assert cosine([3, 4], [4, 3]) == pytest.approx(24 / 25, abs=1e-15)
    assert cosine([0, 0], [1, 0]) == 0
    # Order 3 1 0 2: M_A = {3, 1}. 1 ties between 0 and 2 and takes 0; the links 1 -> 0 and
    # 3 -> 2 tie, so that 1 comes first and prunes.
    likeness = [[1, 0.5, 0, 0.25], [0.5, 1, 0.5, 0], [0, 0.5, 1, 0.5], [0.25, 0, 0.5, 1]]
    got = reduce_naive(
        "utrc", None, np.eye(4), np.eye(4), 0, 2, 500, 0, scores=[4, 2, 4, 1], similarity=likeness
    )
    assert got[:4] == ([1, 3], [0, 2], [False, True], [0, 2])


@pytest.mark.parametrize(
    ("method", "length", "removed", "tail"),
    [("utrc", 6, 4, 0), ("pumer", 6, 1, 4), ("evit", 6, 5, 2), ("utrc-code", 6, 3, 2)],
)
def test_naive_refuses(method, length, removed, tail):
    """The loops do not guess where a request cannot be met."""
    zeros = np.zeros((length, 2))
    with pytest.raises(ValueError):
        reduce_naive(method, zeros, zeros, zeros, 0, removed, 500, tail)


def test_registry_names_every_method():
    """The registry offers the methods that are compared here."""
    assert set(NAMES) <= set(METHODS)


@pytest.mark.parametrize("ops", [PLAIN, CUSTOM], ids=["plain", "custom"])
@by_hand
def test_implementation_by_hand(example, ops):
    """The implementation gives what was worked out on paper."""
    batch = Batch([example.y], [example.hidden], [example.residual], [example.pads])
    got = run(example.method, batch, example.removed, example.permille, example.tail, ops=ops)
    assert_same(got, [example.answer])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(NAMES),
    length=st.integers(2, 21),
    share=st.floats(0, 1),
    kinds=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    permille=st.sampled_from(PERMILLES),
    tail=st.sampled_from(TAILS),
    ops=st.sampled_from(["plain", "custom"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties(method, length, share, kinds, permille, tail, ops, seed):
    """Scores and cosines full of ties: every position is the loops', ties go by position."""
    tail = min(tail, length - length // 2)
    removed = max(1, round(share * most(method, length, tail)))
    choices = pad_kinds(length, removed)
    batch = tied_batch(
        np.random.default_rng(seed), length, [choices[k % len(choices)] for k in kinds]
    )
    got = run(method, batch, removed, permille, tail, ops=CUSTOM if ops == "custom" else PLAIN)
    assert_same(got, truth(method, batch, removed, permille, tail))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("length", [7, 18, 25])
@pytest.mark.parametrize("method", NAMES)
def test_random_floats(method, length, tail, dtype):
    """Random floats, every kind of padding in one sweep of batches of one to three."""
    rng = np.random.default_rng([length, tail])
    for number, removed in enumerate(sorted({1, length // 4, most(method, length, tail)})):
        kinds = pad_kinds(length, removed)
        size = number % 3 + 1
        for start in range(0, len(kinds), size):
            batch = float_batch(rng, length, kinds[start : start + size])
            permille = PERMILLES[(start + number) % len(PERMILLES)]
            got = run(method, batch, removed, permille, tail, dtype=dtype)
            assert got.hidden.dtype == got.residual.dtype == dtype
            assert_same(got, truth(method, batch, removed, permille, tail))


@pytest.mark.parametrize("permille", PERMILLES)
@pytest.mark.parametrize("removed", [1, 3, 7, 8, 10])
def test_hybrid_split(removed, permille):
    """The strongest floor(n q) links prune and the others merge, for every n and q."""
    batch = float_batch(np.random.default_rng(removed), 21, [0, 2, 9])
    got = run("utrc", batch, removed, permille, 1)
    assert_same(got, truth("utrc", batch, removed, permille, 1))
    assert int(got.choice.merge[0].sum()) == removed - removed * permille // 1000


@pytest.mark.parametrize("width", [3, 8, 40, 65])
@pytest.mark.parametrize("method", LINKED)
def test_equal_vectors_tie(method, width):
    """Repeated tokens have equal similarities whatever their norm: the lowest position wins."""
    length, removed = 31, 12
    for seed in range(5):
        rng = np.random.default_rng([seed, width])
        while True:
            pool_a, pool_b = rng.standard_normal((2, 3, width), dtype=np.float32)
            likeness = [cosine(a, b) for a in pool_a for b in pool_b]
            if apart(likeness, 1e-5):
                break
        # Even positions draw from one small pool and rank low, odd ones from another.
        low = np.arange(length) % 2 == 0
        hidden = np.where(
            low[:, None], pool_a[rng.integers(0, 3, length)], pool_b[rng.integers(0, 3, length)]
        )[None]
        y = np.where(low, 1.0, 2.0)[None, :, None]
        batch = Batch(y, hidden, rng.standard_normal(hidden.shape), [0])
        assert_same(run(method, batch, removed, 500, 1), truth(method, batch, removed, 500, 1))


@pytest.mark.parametrize("method", NAMES)
def test_padding_content_is_irrelevant(method):
    """What stands in the padding changes no position and no real value, however large."""
    rng = np.random.default_rng(3)
    for removed, pads in [(5, 2), (5, 5), (4, 9), (6, 1)]:
        clean = float_batch(rng, 17, [pads])
        dirty = Batch(*(x.copy() for x in clean[:3]), clean.pads)
        for array in dirty[:3]:
            array[:, :pads] = rng.standard_normal(array[:, :pads].shape) * 1e6
        one = run(method, clean, removed, 500, 1)
        two = run(method, dirty, removed, 500, 1)
        assert_same(two, truth(method, dirty, removed, 500, 1))
        assert torch.equal(one.keep, two.keep)
        assert all(torch.equal(a, b) for a, b in zip(one.choice, two.choice, strict=True))
        real = one.keep[0] >= pads
        assert torch.equal(one.hidden[0, real], two.hidden[0, real])
        assert torch.equal(one.residual[0, real], two.residual[0, real])


@pytest.mark.parametrize("method", ["utrc", "evit"])
def test_scores_of_any_size(method):
    """Huge scores stay below the protected tail, zero and tiny ones above the padding."""
    length, scores = 9, [0, 1e30, 0, 1e-30, 1e30, 3e37, 0, 1e-42, 0]
    rng = np.random.default_rng(11)
    base = float_batch(rng, length, [0, 1, 3])
    batch = base._replace(y=np.array([scores] * 3, dtype=np.float32)[..., None])
    for removed in range(1, 5):
        for tail in TAILS:
            got = run(method, batch, removed, 300, tail)
            assert_same(got, truth(method, batch, removed, 300, tail))


@pytest.mark.parametrize("tail", TAILS)
def test_evit_beyond_half(tail):
    """Dropping needs no halves: all but the tail may go."""
    length = 8
    batch = float_batch(np.random.default_rng(tail), length, [0, 3, 8])
    for removed in (5, length - max(tail, 1)):
        got = run("evit", batch, removed, 500, tail)
        assert_same(got, truth("evit", batch, removed, 500, tail))


@pytest.mark.parametrize("ops", [PLAIN, CUSTOM], ids=["plain", "custom"])
@pytest.mark.parametrize("method", NAMES)
def test_replay(method, ops):
    """A choice passed back in gives the same values, and on other values it still rules."""
    rng = np.random.default_rng(5)
    first, other = (float_batch(rng, 19, [0, 3, 12]) for _ in range(2))
    chosen = run(method, first, 7, 500, 1, ops=ops)
    again = run(method, first, 7, 500, 1, ops=ops, choice=chosen.choice)
    for name in ("hidden", "residual", "keep"):
        assert torch.equal(getattr(chosen, name), getattr(again, name))
    assert all(torch.equal(a, b) for a, b in zip(chosen.choice, again.choice, strict=True))

    carried = run(method, other, 7, 500, 1, ops=ops, choice=chosen.choice)
    rows = zip(other.hidden, other.residual, *(x.tolist() for x in chosen.choice), strict=True)
    expected = [apply_naive(method, h, r, NaiveChoice(*choice)) for h, r, *choice in rows]
    assert_same(carried, expected)


def test_replay_of_a_foreign_choice():
    """A choice no method would make is carried out as it stands, branch by branch."""
    batch = float_batch(np.random.default_rng(6), 9, [0])
    rows = NaiveChoice([1, 3, 4, 8], [0, 2, 2, -1], [True, False, True, False])
    choice = Choice(
        torch.tensor([rows.src], dtype=torch.int32),
        torch.tensor([rows.dst], dtype=torch.int32),
        torch.tensor([rows.merge]),
    )
    got = run("utrc", batch, 4, 500, 1, choice=choice)
    assert_same(got, [apply_naive("utrc", batch.hidden[0], batch.residual[0], rows)])


@pytest.mark.parametrize("ops", [PLAIN, CUSTOM], ids=["plain", "custom"])
@pytest.mark.parametrize("method", NAMES)
def test_deterministic(method, ops):
    """Twice the same bits, alone or in a batch the same positions, and no input is written to."""
    batch = tied_batch(np.random.default_rng(8), 20, [0, 4, 15])
    tensors = [torch.tensor(x, dtype=torch.float32) for x in batch[:3]]
    pads = torch.tensor(batch.pads, dtype=torch.int32)
    before = [x.clone() for x in (*tensors, pads)]

    def call(rows):
        inputs = [x[rows] for x in (*tensors, pads)]
        return reduce_tokens(method, *inputs, site_of(20, 8), 500, 1, ops=ops)

    one, two = call(slice(0, 3)), call(slice(0, 3))
    assert torch.equal(one.hidden, two.hidden) and torch.equal(one.residual, two.residual)
    assert all(torch.equal(a, b) for a, b in zip(one.choice, two.choice, strict=True))
    for b in range(3):
        alone = call(slice(b, b + 1))
        assert torch.equal(alone.keep[0], one.keep[b])
        pairs = zip(alone.choice, one.choice, strict=True)
        assert all(torch.equal(x[0], z[b]) for x, z in pairs)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, pads), strict=True))


@pytest.mark.parametrize("method", NAMES)
def test_tail_survives(method):
    """The protected tail is kept as it is ranked lowest, padded or not."""
    length, tail = 16, 3
    for pads in (0, 2, 14, 16):
        batch = tied_batch(np.random.default_rng(pads), length, [pads])
        batch.y[:, -tail:] = -1
        kept = run(method, batch, most(method, length, tail), 500, tail).keep[0].tolist()
        assert kept[-tail:] == [13, 14, 15]
