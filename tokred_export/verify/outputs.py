"""Does an engine return what a prefill graph must: every name, its shape, choices that can be?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tokred_export.specs import ModelSpec, ReductionSchedule, Site


def expected_shapes(
    spec: ModelSpec, schedule: ReductionSchedule, batch: int, logits: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of all outputs of a prefill graph, by name, states in layer order."""
    head = (batch, spec.vocab_size)
    if logits == "all":
        head = (batch, schedule.length_out, spec.vocab_size)
    shapes = {"logits": head, "kept_positions": (batch, schedule.length_out)}
    for s, site in enumerate(schedule.sites):
        for part in ("src", "dst", "merge"):
            shapes[f"choice.{part}.{s}"] = (batch, site.removed)
    for i in range(spec.n_layer):
        shapes[f"present.conv_state.{i}"] = (batch, spec.conv_dim, spec.d_conv - 1)
        shapes[f"present.ssm_state.{i}"] = (batch, spec.n_heads, spec.head_dim, spec.d_state)
    return shapes


def find_problems(
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    schedule: ReductionSchedule,
) -> dict[str, str]:
    """What is wrong with an engine's outputs before any value is compared.

    Args:
        found: the engine's outputs.
        shapes: of :func:`expected_shapes`.
        schedule: the model's.

    Returns:
        One clause for each output with a problem, by name.
    """
    problems = {}
    for name, shape in shapes.items():
        if problem := _malformed(name, found.get(name), shape):
            problems[name] = problem
    for s, site in enumerate(schedule.sites):
        src, dst = f"choice.src.{s}", f"choice.dst.{s}"
        if src in problems or dst in problems:
            continue
        if problem := _bad_sources(found[src], site):
            problems[src] = problem
        elif problem := _bad_targets(found[src], found[dst], site):
            problems[dst] = problem
    return problems


def _malformed(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if array is None:
        return "is missing"
    if array.shape != shape:
        return f"has shape {list(array.shape)}, expected {list(shape)}"
    dtype = _exact_dtype(name)
    if dtype is not None and array.dtype != dtype:
        return f"is {array.dtype}, expected {dtype}"
    return None


def _exact_dtype(name: str) -> np.dtype | None:
    """The dtype of an output that has the same one in every precision."""
    if name.startswith("present.ssm_state."):
        return np.dtype(np.float32)
    if name.startswith("choice.merge."):
        return np.dtype(bool)
    if name == "kept_positions" or name.startswith("choice."):
        return np.dtype(np.int32)
    return None


def _bad_sources(src: np.ndarray, site: Site) -> str | None:
    outside = (src < 0) | (src >= site.tokens_in)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        return (
            f"removes position {src[row, column]} in row {row}, expected 0 to {site.tokens_in - 1}"
        )
    unordered = np.diff(src, axis=1) <= 0
    if unordered.any():
        row, column = np.argwhere(unordered)[0]
        return (
            f"lists position {src[row, column + 1]} after {src[row, column]} in row {row}, "
            "expected distinct positions in ascending order"
        )
    return None


def _bad_targets(src: np.ndarray, dst: np.ndarray, site: Site) -> str | None:
    for row in range(len(src)):
        outside = (dst[row] < -1) | (dst[row] >= site.tokens_in)
        if outside.any():
            return (
                f"merges into position {dst[row][outside][0]} in row {row}, "
                f"expected -1 to {site.tokens_in - 1}"
            )
        gone = np.isin(dst[row], src[row])
        if gone.any():
            return f"merges into position {dst[row][gone][0]} in row {row}, which is itself removed"
    return None
