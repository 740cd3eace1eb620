"""Measures of one tensor against another."""

import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest

from tokred_export.verify import compare as compare_module
from tokred_export.verify.compare import compare, compare_logits, distance, jaccard
from tokred_export.verify.records import Comparison, LogitsComparison


def test_distance_by_hand():
    """Errors 0, 3 and 4 on a vector of length 13."""
    found = distance(np.array([3.0, 4.0, 12.0]), np.array([3.0, 7.0, 8.0]))
    assert found.max_abs == 4
    assert found.mean_abs == pytest.approx(7 / 3)
    assert found.rel_l2 == pytest.approx(5 / 13)
    assert found.cosine == pytest.approx((9 + 28 + 96) / (13 * math.sqrt(9 + 49 + 64)))
    assert found.nonfinite == 0


def test_distance_is_taken_in_float64():
    """An error of one unit in the last place of float32 is measured exactly."""
    a = np.full(1000, 1.0, np.float32)
    b = np.nextafter(a, np.float32(2))
    exact = float(Fraction(float(b[0])) - 1)
    assert distance(a, b).rel_l2 == pytest.approx(exact, rel=1e-12)
    assert distance(a, b).mean_abs == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_any_dtype_equals_itself(dtype):
    """Nothing differs from itself, whatever the dtype."""
    x = np.arange(-3, 20).reshape(23, 1).astype(dtype)
    found = distance(x, x)
    assert found[:3] == (0, 0, 0)
    assert found.cosine == pytest.approx(1, abs=1e-15)


def test_blocks_change_nothing(monkeypatch):
    """A tensor measured in pieces gives what it gives in one."""
    a, b = np.random.default_rng(0).normal(size=(2, 7, 11))
    whole, logits = distance(a, b), compare_logits(a, b)
    monkeypatch.setattr(compare_module, "BLOCK", 13)
    assert distance(a, b) == pytest.approx(whole, rel=1e-14)
    assert msgspec.structs.astuple(compare_logits(a, b)) == pytest.approx(
        msgspec.structs.astuple(logits), rel=1e-14
    )


def test_zero_tensors():
    """Both zero: equal. Only one zero: nothing in common. No elements: equal."""
    zero, one = np.zeros(4), np.array([0.0, 1e-30, 0, 0])
    assert distance(zero, zero) == (0, 0, 0, 1, 0)
    assert distance(zero, one) == (1e-30, 2.5e-31, 1, 0, 0)
    assert distance(one, zero)[2:] == (1, 0, 0)
    assert distance(np.zeros((0, 5)), np.zeros((0, 5))) == (0, 0, 0, 1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_counted_and_left_out(value):
    """NaN and infinities are counted wherever they are, and all measures stay finite numbers."""
    a, b = np.array([3.0, 4.0, 1.0]), np.array([3.0, 4.0, value])
    assert distance(a, b) == (0, 0, 0, 1, 1)
    assert distance(b, a) == (0, 0, 0, 1, 1)
    assert distance(b, b) == (0, 0, 0, 1, 1)
    assert distance(b[2:], b[2:]) == (0, 0, 0, 1, 1)


def test_shapes_must_agree():
    """Tensors of different shapes are a mistake, even where numpy would broadcast."""
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2, 2\)"):
        distance(np.zeros((2, 1)), np.zeros((2, 2)))


def test_compare_keeps_the_noise_floor():
    """The noise is measured against the baseline too, and the record survives JSON."""
    a, b, c = (np.array([row]) for row in ([3.0, 4.0], [3.5, 4.0], [3.0, 4.1]))
    found = compare("logits", a, b, c)
    assert (found.name, found.shape) == ("logits", (1, 2))
    assert found.rel_l2 == pytest.approx(0.1)
    assert found.noise_rel_l2 == pytest.approx(0.02)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found


def test_compare_logits_by_hand():
    """Probabilities (3/4, 1/4) against (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    a, b = np.log([[0.75, 0.25]]) + 7, np.log([[0.5, 0.5]]) - 3
    found = compare_logits(a, b)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (found.top1_agreement, found.top5_agreement) == (1, 1)


def test_agreement_of_top_tokens():
    """Of two rows one has another best token; the other shares 4 of its best 5."""
    a = np.array([[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]])
    b = np.array([[8.0, 9, 7, 6, 5, 4, 3], [9, 8, 7, 6, 0, 4, 3]])
    found = compare_logits(a, b)
    assert (found.top1_agreement, found.top5_agreement) == (0.5, 0.9)


def test_logits_that_are_not_finite():
    """A row with NaN agrees in nothing; without any finite row there is no divergence."""
    a = np.array([[1.0, 2, 3], [1, 2, 3]])
    b = a.copy()
    b[1, 0] = np.nan
    found = compare_logits(a, b)
    assert (found.kl, found.top1_agreement, found.top5_agreement) == (0, 0.5, 0.5)
    found = compare_logits(a[1:], b[1:])
    assert (found.kl, found.top1_agreement, found.top5_agreement) == (None, 0, 0)
    assert msgspec.json.decode(msgspec.json.encode(found), type=LogitsComparison) == found


def test_no_logits_do_not_disagree():
    """A batch of empty prompts has no row to compare."""
    found = compare_logits(np.zeros((0, 9)), np.zeros((0, 9)))
    assert (found.kl, found.top1_agreement, found.top5_agreement) == (None, 1, 1)


def test_jaccard():
    """Intersection over union; nothing and nothing are equal."""
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([], []) == 1
    assert jaccard([1], []) == 0
