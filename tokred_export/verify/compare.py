"""Measures of how far one tensor is from another, in float64. No verdicts here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tokred_export.verify.records import Comparison, LogitsComparison

# Elements converted to float64 at a time: logits of all tokens are gigabytes in float64.
BLOCK = 1 << 21


class Distance(NamedTuple):
    """How far a candidate is from a baseline; the attributes are those of Comparison."""

    max_abs: float
    mean_abs: float
    rel_l2: float
    cosine: float
    nonfinite: int


def distance(baseline: np.ndarray, candidate: np.ndarray) -> Distance:
    """Measure ``candidate`` against ``baseline``, two arrays of one shape and any real dtype.

    Elements that are NaN or infinite in either are counted and left out of the measures, which
    therefore are always finite numbers. Zero tensors: equal ones (both zero, or no elements) have
    relative L2 0 and cosine 1; where only the baseline is zero there is nothing to relate an
    error to, and both say "nothing in common": relative L2 1 and cosine 0.

    Raises:
        ValueError: the shapes differ.
    """
    if baseline.shape != candidate.shape:
        raise ValueError(f"shapes {baseline.shape} and {candidate.shape} cannot be compared")
    largest = total = error2 = a2 = b2 = ab = 0.0
    counted = 0
    for a, b in _blocks(baseline, candidate):
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        error = np.abs(b - a)
        largest = max(largest, float(error.max(initial=0.0)))
        total += float(error.sum())
        # Squares of anything that fits into float32 neither overflow nor vanish in float64.
        error2, a2, b2 = error2 + float(error @ error), a2 + float(a @ a), b2 + float(b @ b)
        ab += float(a @ b)
        counted += a.size
    if a2 == 0.0:
        rel_l2, cosine = (0.0, 1.0) if b2 == 0.0 else (1.0, 0.0)
    else:
        rel_l2 = (error2 / a2) ** 0.5
        cosine = ab / (a2 * b2) ** 0.5 if b2 else 0.0
    return Distance(largest, total / max(counted, 1), rel_l2, cosine, baseline.size - counted)


def compare(
    name: str, baseline: np.ndarray, candidate: np.ndarray, noise: np.ndarray
) -> Comparison:
    """One tensor of an engine against eager's.

    Args:
        name: of the tensor, as in the graph.
        baseline: eager's.
        candidate: the engine's.
        noise: eager's in the other precision; its distance to the baseline is the noise floor.

    Raises:
        ValueError: the shapes differ.
    """
    found = distance(baseline, candidate)
    return Comparison(
        name=name,
        shape=tuple(baseline.shape),
        noise_rel_l2=distance(baseline, noise).rel_l2,
        **found._asdict(),
    )


def compare_logits(baseline: np.ndarray, candidate: np.ndarray) -> LogitsComparison:
    """What the differences mean for next-token probabilities.

    A row with a NaN or an infinity in either agrees in nothing and has no divergence. Without
    any row there is no disagreement either.

    Args:
        baseline, candidate: logits [..., V] of one shape.
    """
    vocabulary = baseline.shape[-1]
    top = min(5, vocabulary)
    rows = baseline.size // vocabulary
    same_first = shared = finite_rows = 0
    kl = 0.0
    for a, b in _blocks(baseline, candidate, vocabulary):
        a, b = a.reshape(-1, vocabulary), b.reshape(-1, vocabulary)
        finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        a, b = a[finite], b[finite]
        finite_rows += len(a)
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        same_first += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        best_a, best_b = (np.argpartition(-x, top - 1, axis=1)[:, :top] for x in (a, b))
        shared += sum(len(set(x) & set(y)) for x, y in zip(best_a, best_b, strict=True))
    return LogitsComparison(
        # Rounding can leave the divergence of equal rows a little below zero.
        kl=max(0.0, kl / finite_rows) if finite_rows else None,
        top1_agreement=same_first / rows if rows else 1.0,
        top5_agreement=shared / (top * rows) if rows else 1.0,
    )


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    first, second = set(a), set(b)
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def _blocks(
    a: np.ndarray, b: np.ndarray, multiple: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both arrays flattened, piece by piece, as float64; pieces are multiples of ``multiple``."""
    a, b = a.reshape(-1), b.reshape(-1)
    step = max(BLOCK // multiple, 1) * multiple
    for start in range(0, a.size, step):
        yield tuple(np.asarray(x[start : start + step], dtype=np.float64) for x in (a, b))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
