"""Token ops: op and function body against the references, ties and odd sizes included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from single_op import run_body
from tokred_plugins import onnx_ops, selection
from tokred_plugins.token_importance.op import custom as token_importance
from tokred_plugins.token_importance.reference import token_importance_reference
from tokred_plugins.token_link.op import custom as token_link
from tokred_plugins.token_link.reference import token_link_reference
from tokred_plugins.token_match.op import custom as token_match
from tokred_plugins.token_match.reference import token_match_reference
from tokred_plugins.token_reduce.op import custom as token_reduce
from tokred_plugins.token_reduce.reference import token_reduce_reference
from tokred_plugins.token_reduce_top.op import custom as token_reduce_top
from tokred_plugins.token_reduce_top.reference import token_reduce_top_reference
from tokred_plugins.token_split.op import custom as token_split
from tokred_plugins.token_split.reference import token_split_reference
from tokred_plugins.token_stride.op import custom as token_stride
from tokred_plugins.token_stride.reference import token_stride_reference

QUICK = settings(max_examples=25, deadline=None)


def same(found, expected):
    """Exactly equal values, shapes and types."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def numpy(tensors):
    return [t.numpy() for t in tensors]


@st.composite
def sites(draw):
    """(length, removed, tail, pads of three rows, seed)."""
    length = draw(st.integers(2, 41))
    removed = draw(st.integers(1, length // 2))
    tail = draw(st.integers(0, length - length // 2))
    pads = draw(st.lists(st.integers(0, length), min_size=3, max_size=3))
    return length, removed, tail, torch.tensor(pads, dtype=torch.int32), draw(st.integers(0, 99))


def tied(*shape, seed):
    """Small integers: full of ties, and exact in any arithmetic."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def one_hot(*shape, seed):
    """Vectors along an axis, scaled by powers of two: cosines are exactly 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    axis = torch.randint(0, shape[2], shape[:2], generator=rng)
    scale = 2.0 ** torch.randint(-2, 3, shape[:2], generator=rng)
    return torch.nn.functional.one_hot(axis, shape[2]) * scale[:, :, None]


@given(sites())
@QUICK
def test_split(site):
    """Ranking by (tier, score, position), whatever the ties."""
    length, count, tail, pads, seed = site
    scores = tied(3, length, seed=seed)
    expected = token_split_reference(scores, pads, count, tail)
    same(token_split(scores, pads, count, tail), expected)
    for varying in ({}, {"count": length // 2}):
        attributes = {"count": count, "protect": tail}
        same(run_body(onnx_ops.TOKEN_SPLIT, numpy([scores, pads]), attributes, varying), expected)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 13, 19])
def test_split_above_the_topk_limit(monkeypatch, count):
    """Counts above TensorRT's TopK limit are taken in rounds; here the limit is 4."""
    monkeypatch.setattr(selection, "TOPK_LIMIT", 4)
    scores, pads = tied(3, 40, seed=count), torch.tensor([0, 3, 17], dtype=torch.int32)
    expected = token_split_reference(scores, pads, count, 2)
    attributes = {"count": count, "protect": 2}
    for varying in ({}, {"count": 19}):
        same(run_body(onnx_ops.TOKEN_SPLIT, numpy([scores, pads]), attributes, varying), expected)


@given(sites())
@QUICK
def test_match(site):
    """The first of equally similar partners."""
    length, _, tail, pads, seed = site
    hidden = one_hot(3, length, 4, seed=seed)
    lower, upper = token_split_reference(tied(3, length, seed=seed), pads, length // 2, tail)
    expected = token_match_reference(hidden, lower, upper)
    same(token_match(hidden, lower, upper), expected)
    same(run_body(onnx_ops.TOKEN_MATCH, numpy([hidden, lower, upper]), {}), expected)


def test_match_of_any_vectors():
    """Without ties the partners are the same and the cosines agree to float32."""
    hidden = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
    hidden[0, 5] = 0  # a zero vector is similar to nothing, not NaN
    pads = torch.zeros(2, dtype=torch.int32)
    lower, upper = token_split_reference(tied(2, 37, seed=0), pads, 18, 1)
    expected = token_match_reference(hidden.double(), lower, upper)
    for found in (
        token_match(hidden, lower, upper),
        run_body(onnx_ops.TOKEN_MATCH, numpy([hidden, lower, upper]), {}),
    ):
        np.testing.assert_allclose(np.asarray(found[0]), expected[0], atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found[1]), expected[1])


@given(sites(), st.sampled_from([0, 300, 500, 700, 1000]))
@QUICK
def test_link(site, permille):
    """Padding first, then the strongest links; the most similar of them prune."""
    length, removed, tail, pads, seed = site
    lower, upper = token_split_reference(tied(3, length, seed=seed), pads, length // 2, tail)
    similarity = tied(*lower.shape, seed=seed + 1) / 4
    target = upper[:, :1].expand(lower.shape).contiguous()
    tensors = (similarity, target, lower, upper, pads)
    expected = token_link_reference(*tensors, removed, permille)
    same(token_link(*tensors, removed, permille), expected)
    attributes = {"removed": removed, "prune_permille": permille}
    for varying in ({}, {"removed": length // 2}):
        same(run_body(onnx_ops.TOKEN_LINK, numpy(tensors), attributes, varying), expected)


def linked(length, removed, tail, pads, seed, permille=500):
    """A valid choice: keep, src, dst, merge."""
    lower, upper = token_split_reference(tied(3, length, seed=seed), pads, length // 2, tail)
    rng = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, upper.shape[1], lower.shape, generator=rng)
    target = upper.gather(1, pick)
    similarity = tied(*lower.shape, seed=seed + 1)
    src, dst, merge, keep = token_link_reference(
        similarity, target, lower, upper, pads, removed, permille
    )
    return keep, src, dst, merge


@given(sites())
@QUICK
def test_reduce(site):
    """Means of targets and their sources, in either branch."""
    length, removed, tail, pads, seed = site
    choice = linked(length, removed, tail, pads, seed)
    rng = torch.Generator().manual_seed(seed)
    hidden, residual = (torch.randn(3, length, 6, generator=rng) for _ in range(2))
    expected = token_reduce_reference(hidden.double(), residual.double(), *choice)
    tensors = (hidden, residual, *choice)
    ran = run_body(onnx_ops.TOKEN_REDUCE, numpy(tensors), {"residual_in_fp32": 1})
    for found in (token_reduce(*tensors), ran):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


def test_what_merges_into_nothing_leaves_no_trace():
    """NaN and infinity in removed padding reach no survivor."""
    pads = torch.full((3,), 4, dtype=torch.int32)
    keep, src, dst, merge = linked(12, 6, 1, pads, seed=0)
    rng = torch.Generator().manual_seed(0)
    hidden, residual = (torch.randn(3, 12, 6, generator=rng) for _ in range(2))
    expected = token_reduce_reference(hidden, residual, keep, src, dst, merge)
    hidden[:, :4], residual[:, :4] = torch.nan, torch.inf
    tensors = (hidden, residual, keep, src, dst, merge)
    ran = run_body(onnx_ops.TOKEN_REDUCE, numpy(tensors), {"residual_in_fp32": 1})
    for found in (token_reduce(*tensors), ran):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


@given(sites())
@QUICK
def test_stride(site):
    """The published code's positions, behind the padding."""
    length, removed, _, pads, _ = site
    if 2 * (removed - 1) + 1 >= length:
        removed = max(1, removed - 1)
    expected = token_stride_reference(pads, length, removed)
    same(token_stride(pads, length, removed), expected)
    attributes = {"length": length, "removed": removed}
    for varying in ({}, {"length": 99, "removed": 50}):
        same(run_body(onnx_ops.TOKEN_STRIDE, numpy([pads]), attributes, varying), expected)


@given(sites())
@QUICK
def test_reduce_top(site):
    """Per channel the larger half of the removed values merges; the residual merges all."""
    length, removed, _, pads, seed = site
    if 2 * (removed - 1) + 1 >= length:
        removed = max(1, removed - 1)
    src, dst, _, keep = token_stride_reference(pads, length, removed)
    rng = torch.Generator().manual_seed(seed)
    hidden, residual = (torch.randn(3, length, 6, generator=rng) for _ in range(2))
    tensors = (hidden, residual, keep, src, dst)
    expected = token_reduce_top_reference(hidden.double(), residual.double(), *tensors[2:])
    ran = run_body(onnx_ops.TOKEN_REDUCE_TOP, numpy(tensors), {"residual_in_fp32": 1})
    for found in (token_reduce_top(*tensors), ran):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


def test_importance():
    """The mean of the positive parts, in float32 also for 16-bit outputs."""
    y = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    expected = token_importance_reference(y.double())
    np.testing.assert_allclose(token_importance(y), expected, rtol=1e-6)
    np.testing.assert_allclose(
        run_body(onnx_ops.TOKEN_IMPORTANCE, [y.numpy()], {})[0], expected, rtol=1e-6
    )
    assert token_importance(y.half()).dtype == torch.float32
