"""Verdicts over records made by hand."""

import msgspec
import pytest
from tiny_engines import comparison, record_of, stored_case

from tokred_export.environment import environment
from tokred_export.specs import ReductionSchedule
from tokred_export.verify.judge import (
    FLOAT32,
    SIXTEEN_BIT,
    Limit,
    Tolerance,
    Verdict,
    judge_parity,
    judge_speed,
    missing_tensors,
    tolerance_for,
)
from tokred_export.verify.margins import EXPLAINED
from tokred_export.verify.records import Flip, Latency, SiteAgreement, SpeedRecord


def verdict(*changed, tolerance=FLOAT32, **fields):
    """Of a record with one case by hand."""
    return judge_parity(record_of(stored_case(*changed, **fields)), tolerance)


def site_with(*margins):
    """A site where tokens flipped by these margins."""
    flips = tuple(
        Flip(site=1, row=0, position=30 + i, what="kept", margin=margin)
        for i, margin in enumerate(margins)
    )
    return SiteAgreement(
        site=1, layer=4, tokens_in=40, removed=9, real_removed=9, same_source=0.8, same_target=1,
        same_merge=1, flips=flips,
    )  # fmt: skip


def test_nothing_wrong():
    """A record without a fault passes without remarks."""
    assert verdict() == Verdict(outcome="PASS")


def test_nothing_run():
    """No case proves nothing."""
    found = judge_parity(record_of(), FLOAT32)
    assert found.outcome == "FAIL" and "no prompt was run" in found.reasons[0]


@pytest.mark.parametrize("name", ["logits", "present.conv_state.0", "present.ssm_state.2"])
def test_the_float32_limit(name):
    """1e-4 passes, anything above does not, whatever the noise floor."""
    assert verdict(comparison(name, 1e-4, 1e-9)).outcome == "PASS"
    found = verdict(comparison(name, 1.001e-4, 1.0))
    assert found.outcome == "FAIL"
    assert found.reasons == (
        f"prefill-37, by hand: {name} is off by 1.00e-04 (relative L2), allowed 1.00e-04; "
        "rounding alone makes 1.00e+00",
    )


@pytest.mark.parametrize("name", ["logits", "present.conv_state.0", "present.ssm_state.2"])
def test_the_16_bit_limit(name):
    """Three times the tensor's own noise floor passes; without noise nothing does."""
    changed = [comparison(name, 0.03, 0.01)]
    assert verdict(*changed, tolerance=SIXTEEN_BIT).outcome == "PASS"
    changed = [comparison(name, 0.0301, 0.01)]
    assert verdict(*changed, tolerance=SIXTEEN_BIT).outcome == "FAIL"
    changed = [comparison(name, 1e-9, 0.0)]
    assert verdict(*changed, tolerance=SIXTEEN_BIT).outcome == "FAIL"
    changed = [comparison(name, 1.0, 0.5)]  # zeros, where eager 16 bit is half noise
    assert verdict(*changed, tolerance=SIXTEEN_BIT).outcome == "FAIL"


@pytest.mark.parametrize("tolerance", [FLOAT32, SIXTEEN_BIT], ids=["float32", "16 bit"])
def test_kept_positions_are_exact(tolerance):
    """Integers are equal or wrong."""
    assert verdict(comparison("kept_positions", 1e-9, 1e-3), tolerance=tolerance).outcome == "FAIL"


def test_not_finite():
    """One NaN fails a tensor whose other values are right."""
    found = verdict(comparison("present.ssm_state.1", nonfinite=1))
    assert found.reasons == (
        "prefill-37, by hand: present.ssm_state.1 holds 1 values that are NaN or infinite",
    )


def test_not_a_number_is_no_small_error():
    """An error that is itself no number is not within any tolerance."""
    assert verdict(comparison("logits", float("nan"))).outcome == "FAIL"


def test_an_unknown_tensor_fails():
    """A tensor without a tolerance is not waved through."""
    found = verdict(comparison("present.cache.0"))
    assert "no tolerance is known for" in found.reasons[0]


def test_tensors_that_were_not_compared():
    """Every layer has two states, and a prefill has logits and kept positions."""
    case = stored_case()
    kept = [t for t in case.tensors if t.name not in ("logits", "present.conv_state.1")]
    case = msgspec.structs.replace(case, tensors=tuple(kept))
    assert missing_tensors(case) == ["logits", "present.conv_state.1"]
    assert judge_parity(record_of(case), FLOAT32).reasons == (
        "prefill-37, by hand: logits was not compared",
        "prefill-37, by hand: present.conv_state.1 was not compared",
    )
    empty = msgspec.structs.replace(case, tensors=())
    wanted = ["logits", "kept_positions", "present.conv_state.0", "present.ssm_state.0"]
    assert missing_tensors(empty) == wanted


def test_problems_are_said_once():
    """A malformed output is one reason; after a malformed choice nothing else is missing."""
    case = stored_case()
    kept = tuple(t for t in case.tensors if t.name != "logits")
    found = verdict(tensors=kept, problems={"logits": "is missing"})
    assert found.reasons == ("prefill-37, by hand: logits is missing",)
    found = verdict(tensors=(), logits=None, problems={"choice.src.0": "is missing"})
    assert found.reasons == ("prefill-37, by hand: choice.src.0 is missing",)


def test_flips():
    """Explained flips pass however many there are; one unexplained flip fails and is described."""
    assert verdict(sites=(site_with(*[EXPLAINED] * 9),), kept_exact=False).outcome == "PASS"
    found = verdict(sites=(site_with(0.0, EXPLAINED + 0.2, None),))
    assert found.reasons == (
        "prefill-37, by hand: site 1, row 0: token 31 differs (kept); scores would have to move by "
        "4.2 x their rounding noise, believable is up to 4 x",
        "prefill-37, by hand: site 1, row 0: token 32 differs (kept); no rounding of scores leads "
        "there",
    )


def test_one_bad_case_among_good_ones():
    """Every case counts."""
    bad = stored_case(comparison("logits", 1.0), description="padded")
    record = record_of(stored_case(), bad, stored_case())
    found = judge_parity(record, FLOAT32)
    assert found.outcome == "FAIL" and len(found.reasons) == 1
    assert found.reasons[0].startswith("prefill-37, padded: logits is off")


def test_judging_again_with_another_tolerance():
    """The record stays what it is; the tolerance decides, and survives JSON as a config would."""
    strict = Limit(rel_l2=1e-8, reason="a wish")
    tolerance = Tolerance(logits=strict, conv_state=strict, ssm_state=strict)
    again = msgspec.json.decode(msgspec.json.encode(tolerance), type=Tolerance)
    record = record_of(stored_case())
    assert judge_parity(record, FLOAT32).outcome == "PASS"
    assert judge_parity(record, again).outcome == "FAIL"
    assert len(judge_parity(record, again).reasons) == 7  # all but kept positions


def test_tolerance_by_dtype():
    """Float32 engines have a fixed limit, 16-bit ones their noise floor; every limit has a why."""
    assert tolerance_for("float32") is FLOAT32
    assert tolerance_for("float16") is tolerance_for("bfloat16") is SIXTEEN_BIT
    for tolerance in (FLOAT32, SIXTEEN_BIT):
        assert all(limit.reason for limit in msgspec.structs.astuple(tolerance))


def speed(speedup=1.5, inconclusive=False):
    """A stored speed record."""
    latency = Latency(name="x", samples_ms=(1.0,), median_ms=1.0, p95_ms=1.0, drift=0.0)
    return SpeedRecord(
        component="prefill-37", backend="onnxruntime", batch=1, threads=1, timed="one run",
        schedule=ReductionSchedule(method="none", length=37), baselines=(latency,),
        baseline="eager chunk 64", engine_dense=latency, engine_reduced=latency, engine_gain=1.0,
        reduction_gain=1.0, speedup=speedup, inconclusive=inconclusive, environment=environment(),
        command="tokred-export bench out",
    )  # fmt: skip


def test_speed_is_a_gate_only_when_asked():
    """Without a wanted speed-up nothing fails; drift is then a remark."""
    assert judge_speed(speed(0.5)) == Verdict(outcome="PASS")
    found = judge_speed(speed(0.5, inconclusive=True))
    assert found.outcome == "PASS" and "drifted" in found.reasons[0]


def test_speed_gate():
    """Reached passes, missed fails, drifted is inconclusive whatever the number."""
    assert judge_speed(speed(1.5), 1.5).outcome == "PASS"
    found = judge_speed(speed(1.49), 1.5)
    assert found.outcome == "FAIL"
    assert found.reasons == ("prefill-37: 1.49 x of eager chunk 64, wanted 1.50 x",)
    assert judge_speed(speed(9.0, inconclusive=True), 1.5).outcome == "INCONCLUSIVE"
    assert judge_speed(speed(float("nan")), 1.5).outcome == "FAIL"
