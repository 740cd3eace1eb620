"""What a report page shows: measured records, their verdicts, and where all of it comes from."""

from __future__ import annotations

from tokred_export.backends.common import EngineInfo
from tokred_export.manifest import Provenance
from tokred_export.reduction.flops import PlanRow
from tokred_export.specs import ModelSpec, ReductionSchedule, Spec
from tokred_export.verify.judge import Tolerance, Verdict
from tokred_export.verify.records import ParityRecord, SpeedRecord


class Bucket(Spec, kw_only=True):
    """One prefill graph's schedule, and the same as the table that ``plan_rows`` makes."""

    component: str  # "prefill-2048"
    schedule: ReductionSchedule
    rows: tuple[PlanRow, ...]


class JudgedParity(Spec, kw_only=True):
    """A parity record, the tolerance it was judged by and the outcome."""

    record: ParityRecord
    tolerance: Tolerance
    verdict: Verdict


class JudgedSpeed(Spec, kw_only=True):
    """A speed record and the outcome."""

    record: SpeedRecord
    verdict: Verdict


class Missing(Spec, kw_only=True):
    """Something a reader would look for, and why it is not there."""

    what: str  # "Speed of prefill-2048 on onnxruntime"
    why: str  # "refused, since parity failed"


class Report(Spec, kw_only=True):
    """Everything on the page. Empty tuples are shown as "not measured", in words."""

    title: str
    verdict: Verdict  # of all gates together; its reasons stand right below it
    model: ModelSpec
    buckets: tuple[Bucket, ...]
    engines: tuple[EngineInfo, ...] = ()
    parity: tuple[JudgedParity, ...] = ()
    speed: tuple[JudgedSpeed, ...] = ()
    missing: tuple[Missing, ...] = ()
    provenance: Provenance
    command: str  # makes this report again
