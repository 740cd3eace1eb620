"""Verdicts over stored records: pure functions, so that a report can be judged again.

Nothing is measured here. A tolerance is a value; pass another one and judge the same record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tokred_export.specs import Dtype, Spec
from tokred_export.verify.margins import EXPLAINED, unexplained
from tokred_export.verify.records import Comparison, Flip, ParityCase, ParityRecord, SpeedRecord


class Limit(Spec, kw_only=True):
    """The largest relative L2 error of one kind of tensor, and why that much."""

    reason: str
    rel_l2: float = 0.0
    noise_multiple: float = 0.0  # of the tensor's own noise floor; the larger of both counts
    # Never more than this: zeros in place of a tensor are off by 1, however large the noise.
    most: float = 0.3

    def of(self, comparison: Comparison) -> float:
        """The limit for one tensor."""
        return min(max(self.rel_l2, self.noise_multiple * comparison.noise_rel_l2), self.most)


class Tolerance(Spec, kw_only=True):
    """One limit for each kind of tensor, by the name of the output up to its layer."""

    logits: Limit
    kept_positions: Limit = Limit(
        reason="integers that follow from the engine's own choices: equal or wrong"
    )
    conv_state: Limit
    ssm_state: Limit


_SUMS = (
    "float32 rounds at 6e-8; a hundred layers of sums in another order leave 1e-6 to 1e-5, a "
    "wrong weight or a missing term far more than 1e-4"
)
_ROUNDED = (
    "an engine rounds where eager 16 bit does and in a few places more (fused and unfused layers, "
    "other accumulation): like independent errors, that stays below three times its noise"
)

FLOAT32 = Tolerance(
    logits=Limit(rel_l2=1e-4, reason=_SUMS),
    conv_state=Limit(rel_l2=1e-4, reason=_SUMS),
    ssm_state=Limit(rel_l2=1e-4, reason=_SUMS + "; states decay, so that errors do not pile up"),
)
SIXTEEN_BIT = Tolerance(
    logits=Limit(noise_multiple=3.0, reason=_ROUNDED),
    conv_state=Limit(noise_multiple=3.0, reason=_ROUNDED),
    ssm_state=Limit(noise_multiple=3.0, reason=_ROUNDED),
)


class Verdict(Spec, kw_only=True):
    """PASS, or what speaks against it; a PASS may carry remarks."""

    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reasons: tuple[str, ...] = ()


def tolerance_for(dtype: Dtype) -> Tolerance:
    """The tolerance for engines of a dtype."""
    return FLOAT32 if dtype == "float32" else SIXTEEN_BIT


def limit_of(comparison: Comparison, tolerance: Tolerance) -> float:
    """The largest relative L2 error of one tensor; below 0 where no tensor has such a name."""
    for kind in Tolerance.__struct_fields__:
        if comparison.name == kind or comparison.name.startswith(f"present.{kind}."):
            return getattr(tolerance, kind).of(comparison)
    return -1.0


def judge_tensor(comparison: Comparison, tolerance: Tolerance) -> str | None:
    """What is wrong with one tensor, in words; None if it is within tolerance."""
    if comparison.nonfinite:
        return f"{comparison.name} holds {comparison.nonfinite} values that are NaN or infinite"
    limit = limit_of(comparison, tolerance)
    if limit < 0:
        return f"{comparison.name} is a tensor that no tolerance is known for"
    if not comparison.rel_l2 <= limit:
        return (
            f"{comparison.name} is off by {comparison.rel_l2:.2e} (relative L2), allowed "
            f"{limit:.2e}; rounding alone makes {comparison.noise_rel_l2:.2e}"
        )
    return None


def judge_flip(flip: Flip) -> str:
    """An unexplained flip in words."""
    how = "no rounding of scores leads there"
    if flip.margin is not None:
        how = (
            f"scores would have to move by {flip.margin:.1f} x their rounding noise, "
            f"believable is up to {EXPLAINED:.0f} x"
        )
    return f"site {flip.site}, row {flip.row}: token {flip.position} differs ({flip.what}); {how}"


def missing_tensors(case: ParityCase) -> list[str]:
    """Tensors that a prefill must have and of which this case says nothing."""
    if any(name.startswith("choice.") for name in case.problems):
        return []  # what was not replayed cannot be compared
    names = {tensor.name for tensor in case.tensors} | case.problems.keys()
    layers = [int(name.rpartition(".")[2]) for name in names if name.startswith("present.")]
    wanted = ["logits", "kept_positions"]
    for i in range(max(layers, default=0) + 1):
        wanted += [f"present.conv_state.{i}", f"present.ssm_state.{i}"]
    return [name for name in wanted if name not in names]


def judge_case(case: ParityCase, tolerance: Tolerance) -> Iterator[str]:
    """Everything that speaks against one case."""
    yield from (f"{name} {problem}" for name, problem in case.problems.items())
    yield from (f"{name} was not compared" for name in missing_tensors(case))
    for comparison in case.tensors:
        if wrong := judge_tensor(comparison, tolerance):
            yield wrong
    yield from map(judge_flip, unexplained(case))


def judge_parity(record: ParityRecord, tolerance: Tolerance) -> Verdict:
    """FAIL when an output is missing, misshapen, not finite or above its tolerance, when a free
    choice differs by more than rounding explains, or when there is no case at all.

    Free choices that differ by less are no failure: eager, replaying them, gives the same numbers.
    """
    if not record.cases:
        return Verdict(outcome="FAIL", reasons=("no prompt was run, so nothing is proven",))
    reasons = tuple(
        f"{case.component}, {case.description}: {wrong}"
        for case in record.cases
        for wrong in judge_case(case, tolerance)
    )
    return Verdict(outcome="FAIL" if reasons else "PASS", reasons=reasons)


def judge_speed(record: SpeedRecord, min_speedup: float | None = None) -> Verdict:
    """A speed-up below ``min_speedup`` fails, a measurement that drifted twice is inconclusive.

    Without ``min_speedup`` speed is reported, not gated. That a speed is refused where parity
    failed is the caller's to see to.
    """
    said = f"{record.component}: {record.speedup:.2f} x of {record.baseline}"
    drifted = f"{record.component}: latencies drifted by more than 5 %, twice"
    if min_speedup is None:
        return Verdict(outcome="PASS", reasons=(drifted,) if record.inconclusive else ())
    if record.inconclusive:
        return Verdict(outcome="INCONCLUSIVE", reasons=(drifted,))
    if not record.speedup >= min_speedup:
        return Verdict(outcome="FAIL", reasons=(f"{said}, wanted {min_speedup:.2f} x",))
    return Verdict(outcome="PASS")
