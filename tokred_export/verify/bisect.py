"""Where an engine leaves eager: the first layer, by the states that every layer hands out."""

from __future__ import annotations

from collections.abc import Iterator

from tokred_export.specs import ReductionSchedule, Spec
from tokred_export.verify.judge import Tolerance, limit_of
from tokred_export.verify.margins import unexplained
from tokred_export.verify.records import Comparison, ParityCase

# ONNX Runtime was found up to 5 times as far from eager as eager's own noise floor. An error
# enters far above that, if often below its tolerance.
JUMP = 30.0


class Divergence(Spec, kw_only=True):
    """The first tensor that is wrong, or wronger than rounding makes it.

    Attributes:
        tensor: its name.
        layer: it belongs to; None for logits and kept positions.
        site: the reduction site between this layer and the one before, or whose choice no
            rounding explains: look there first. None if there is none.
        site_layer: the layer which that site follows.
        rel_l2, noise_rel_l2, limit: of the tensor; None where it was not compared.
        reason: in words.
    """

    tensor: str
    layer: int | None
    site: int | None = None
    site_layer: int | None = None
    rel_l2: float | None = None
    noise_rel_l2: float | None = None
    limit: float | None = None
    reason: str


def first_divergence(
    case: ParityCase, schedule: ReductionSchedule, tolerance: Tolerance
) -> Divergence | None:
    """The first thing in the order of the computation at which an engine leaves eager.

    Layer by layer: conv state, scan state, then the choice of the site behind the layer; last
    kept positions and logits. A tensor counts when it is above its tolerance, holds NaN, or its
    error is ``JUMP`` times its noise floor and something later is above tolerance: errors enter
    small and grow.

    Args:
        case: measured.
        schedule: of the engine, to name sites.
        tolerance: what counts as wrong.

    Returns:
        None where nothing is wrong.
    """
    if case.problems:
        return _malformed(*next(iter(case.problems.items())), schedule)
    wrong = [c for c in case.tensors if c.nonfinite or c.rel_l2 > limit_of(c, tolerance)]
    flips = {flip.site for flip in unexplained(case)}
    for comparison in _in_order(case):
        layer = _layer(comparison.name)
        early = [s for s in sorted(flips) if layer is None or schedule.sites[s].layer < layer]
        if early:
            return _at_site(early[0], schedule)
        if comparison in wrong:
            return _at(comparison, layer, schedule, tolerance, "is above its tolerance")
        if wrong and comparison.rel_l2 > JUMP * comparison.noise_rel_l2:
            return _at(
                comparison, layer, schedule, tolerance,
                f"is within its tolerance, but more than {JUMP:.0f} x its noise floor",
            )  # fmt: skip
    return _at_site(min(flips), schedule) if flips else None


def _layer(name: str) -> int | None:
    return int(name.rpartition(".")[2]) if name.startswith("present.") else None


def _in_order(case: ParityCase) -> Iterator[Comparison]:
    """Tensors in the order of the computation: states layer by layer, conv first, then the rest."""
    states = [c for c in case.tensors if c.name.startswith("present.")]
    yield from sorted(states, key=lambda c: (_layer(c.name), c.name))
    for name in ("kept_positions", "logits"):
        yield from (c for c in case.tensors if c.name == name)


def _site_before(layer: int | None, schedule: ReductionSchedule) -> int | None:
    """The number of the site between this layer and the one before."""
    for number, site in enumerate(schedule.sites):
        if layer is not None and site.layer == layer - 1:
            return number
    return None


def _at(
    comparison: Comparison,
    layer: int | None,
    schedule: ReductionSchedule,
    tolerance: Tolerance,
    what: str,
) -> Divergence:
    site = _site_before(layer, schedule)
    where = "" if site is None else f"; site {site} lies right before this layer"
    if comparison.nonfinite:
        what = f"holds {comparison.nonfinite} values that are NaN or infinite"
    return Divergence(
        tensor=comparison.name,
        layer=layer,
        site=site,
        site_layer=None if site is None else schedule.sites[site].layer,
        rel_l2=comparison.rel_l2,
        noise_rel_l2=comparison.noise_rel_l2,
        limit=limit_of(comparison, tolerance),
        reason=f"{comparison.name} {what}{where}",
    )


def _at_site(site: int, schedule: ReductionSchedule) -> Divergence:
    layer = schedule.sites[site].layer
    return Divergence(
        tensor=f"choice.src.{site}",
        layer=layer,
        site=site,
        site_layer=layer,
        reason=f"site {site}, after layer {layer}, chooses what no rounding explains",
    )


def _malformed(name: str, problem: str, schedule: ReductionSchedule) -> Divergence:
    site = int(name.rpartition(".")[2]) if name.startswith("choice.") else None
    layer = schedule.sites[site].layer if site is not None else _layer(name)
    return Divergence(
        tensor=name, layer=layer, site=site, site_layer=None if site is None else layer,
        reason=f"{name} {problem}",
    )  # fmt: skip
