"""Latency measurement, on a clock that the timed calls move themselves."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import msgspec
import pytest

from tokred_export.errors import InvalidRequest
from tokred_export.specs import ReductionSchedule, Site
from tokred_export.verify.records import Environment, SpeedRecord
from tokred_export.verify.speed import (
    Clock,
    Conditions,
    Milliseconds,
    drift,
    interleave,
    measure_speed,
    percentile,
)

CONDITIONS = Conditions(
    backend="onnxruntime",
    batch=2,
    schedule=ReductionSchedule(
        method="utrc", length=64, sites=(Site(layer=1, tokens_in=64, tokens_out=40),)
    ),
    threads=3,
    timed="one call",
    environment=Environment(
        platform="Linux", processor="a CPU", cores=2, python="3.11", packages={"torch": "2"}
    ),
    command="tokred-export bench out",
    left_out={"transformers": "gates otherwise"},
)


class Lab:
    """A clock, and calls that take known milliseconds on it and write down when they ran."""

    def __init__(self) -> None:
        self.now = 0
        self.ran: list[str] = []
        self.clock = Clock(now_ns=lambda: self.now, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)

    def call(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """Takes the given times one after the other, then the last of them for ever."""

        def run() -> None:
            seen = self.ran.count(name)
            self.ran.append(name)
            self.now += round(1e6 * milliseconds[min(seen, len(milliseconds) - 1)])

        return run

    def calls(self, **milliseconds: float) -> dict[str, Callable[[], None]]:
        return {name: self.call(name, value) for name, value in milliseconds.items()}

    def measure(self, dense, reduced, baselines, **options) -> SpeedRecord:
        return measure_speed(
            "prefill-64", dense, reduced, baselines, CONDITIONS, clock=self.clock, **options
        )


def test_what_was_timed_where_it_ran_counts():
    """An engine's own process says how long it took; the way there and back is no part of it."""
    lab = Lab()
    over_there = iter([90.0, 1.5, 2.5, 3.5])

    def remote() -> Milliseconds:
        lab.now += round(50e6)
        return Milliseconds(next(over_there))

    def says_a_number() -> float:  # a result, not a time
        lab.call("local", 7)()
        return 1234.5

    timed = {"remote": remote, "local": says_a_number}
    one, other = interleave(timed, samples=3, warmup=1, max_seconds=10, clock=lab.clock)
    assert one.samples_ms == (1.5, 2.5, 3.5) and one.median_ms == 2.5
    assert all(type(ms) is float for ms in one.samples_ms)
    assert other.samples_ms == (7, 7, 7)
    assert isinstance(msgspec.json.encode(one), bytes)


def test_time_on_the_way_counts_for_the_limit():
    """The rounds are as long as they are for whoever waits, not as the engine says."""
    lab = Lab()

    def remote() -> Milliseconds:
        lab.now += round(1e9)
        return Milliseconds(1)

    (only,) = interleave(
        {"remote": remote}, samples=50, warmup=0, max_seconds=5, clock=lab.clock, rest_seconds=0
    )
    assert only.samples_ms == (1,) * 5


def test_samples_come_in_turns_and_warm_up_is_not_kept():
    """A B A B, the first rounds dropped, samples in the order taken."""
    lab = Lab()
    timed = {"a": lab.call("a", 90, 1, 2, 3), "b": lab.call("b", 80, 10, 30, 20)}
    a, b = interleave(timed, samples=3, warmup=1, max_seconds=10, clock=lab.clock)
    assert lab.ran == ["a", "b"] * 4
    assert (a.name, a.samples_ms) == ("a", (1, 2, 3))
    assert (b.name, b.samples_ms) == ("b", (10, 30, 20))
    assert (b.median_ms, b.p95_ms) == (20, 30)
    assert b.drift == pytest.approx(1.0)  # 20 / 10 - 1


def test_the_pause_is_outside_the_timed_region():
    """Whatever the rest before a call, only the call is counted."""
    lab = Lab()
    (a,) = interleave(
        lab.calls(a=5), samples=4, warmup=0, max_seconds=100, clock=lab.clock, rest_seconds=2
    )
    assert a.samples_ms == (5, 5, 5, 5)
    assert lab.now == 4 * (5 + 2000) * 1_000_000


@pytest.mark.parametrize(
    ("max_seconds", "taken"),
    [(0, 3), (3, 3), (3.9, 3), (5, 5), (5.9, 5), (1000, 20)],
)
def test_rounds_stop_in_time_but_not_before_three(max_seconds, taken):
    """A round that would end after the time allowed is not begun; three always are."""
    lab = Lab()
    (a,) = interleave(
        lab.calls(a=1000), samples=20, warmup=0, max_seconds=max_seconds, clock=lab.clock,
        rest_seconds=0,
    )  # fmt: skip
    assert len(a.samples_ms) == taken


def test_warm_up_counts_towards_the_time_allowed():
    """Ten seconds of warm-up leave no time for more than the three samples."""
    lab = Lab()
    (a,) = interleave(
        lab.calls(a=1000), samples=20, warmup=10, max_seconds=5, clock=lab.clock, rest_seconds=0
    )
    assert len(a.samples_ms) == 3


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_collection_while_timing(on):
    """Collection is off within and as it was afterwards, also when a call fails."""
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise OSError("broken")

    (gc.enable if on else gc.disable)()
    try:
        interleave({"a": lambda: seen.append(gc.isenabled())}, 3, 0, 1, rest_seconds=0)
        assert gc.isenabled() is on
        with pytest.raises(OSError, match="broken"):
            interleave({"a": fail}, 3, 0, 1, rest_seconds=0)
        assert gc.isenabled() is on
    finally:
        gc.enable()
    assert seen == [False] * 4


@pytest.mark.parametrize(("timed", "samples"), [({}, 5), ({"a": lambda: None}, 2)])
def test_refuses_nothing_and_too_few(timed, samples):
    """Nothing to time and fewer than three samples are errors of the request."""
    with pytest.raises(InvalidRequest, match="expected at least one"):
        interleave(timed, samples, 0, 1)


def test_the_real_clock_sees_a_sleep():
    """Without an injected clock, a sleep lasts at least as long as it was asked to."""
    slow, quick = interleave(
        {"slow": lambda: time.sleep(0.01), "quick": lambda: None}, 3, 1, 10, rest_seconds=0
    )
    assert min(slow.samples_ms) >= 9.5
    assert quick.median_ms < slow.median_ms


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([7], 0.0),
        ([10, 11], 0.1),
        ([11, 10], 1 / 11),
        ([10, 99, 12], 0.2),  # the middle one belongs to no half
        ([10, 10, 50, 10, 10, 10], 0.0),  # one outlier is not a drift
        ([1, 2, 3, 4, 5, 6], 1.5),
    ],
)
def test_drift(samples, expected):
    """Worked by hand: medians of the halves."""
    assert drift(samples) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.95, 1), (3, 0.95, 3), (19, 0.95, 19), (20, 0.95, 19), (100, 0.95, 95), (4, 0.5, 2)],
)
def test_percentile_is_a_sample(count, share, expected):
    """Nearest rank over 1..count, whatever their order."""
    assert percentile(list(range(count, 0, -1)), share) == expected


def test_the_fastest_baseline_is_the_one_compared_with():
    """Gains multiply to the speed-up, over the fastest of the baselines."""
    lab = Lab()
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25),
        lab.calls(q32=130, q64=100, q128=180, q256=900), samples=6, warmup=1,
    )  # fmt: skip
    assert record.baseline == "q64"
    assert record.engine_gain == pytest.approx(2.5)
    assert record.reduction_gain == pytest.approx(1.6)
    assert record.speedup == pytest.approx(4.0)
    assert record.engine_dense.name == "engine dense"
    assert record.engine_reduced.samples_ms == (25,) * 6
    assert not record.inconclusive
    assert not record.remeasured
    assert record.samples_asked == 6
    assert (record.component, record.backend, record.batch) == ("prefill-64", "onnxruntime", 2)
    assert (record.threads, record.left_out) == (3, {"transformers": "gates otherwise"})
    assert record.schedule == CONDITIONS.schedule
    assert msgspec.json.decode(msgspec.json.encode(record), type=SpeedRecord) == record


def test_every_baseline_is_listed_with_the_samples_it_got():
    """The winner in full, losers from the elimination, one twice as slow with a single sample."""
    lab = Lab()
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25), lab.calls(q32=130, q64=100, q256=201),
        samples=6, warmup=2,
    )  # fmt: skip
    counts = {latency.name: len(latency.samples_ms) for latency in record.baselines}
    assert counts == {"q32": 3, "q64": 6, "q256": 1}
    assert lab.ran.count("q256") == 2  # one warm-up, one sample
    assert lab.ran[-3 * 8:] == ["q64", "dense", "reduced"] * 8


def test_a_close_second_runs_in_the_final_and_may_win():
    """Within 5 % in the elimination both run in full, and the lower median there counts."""
    lab = Lab()
    warm, heats = 1, 3
    baselines = {
        "a": lab.call("a", *[100] * (warm + heats), 110),  # slower from the final on
        "b": lab.call("b", 104),
        "c": lab.call("c", 106),
    }
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25), baselines, samples=4, warmup=0
    )
    assert record.baseline == "b"
    assert record.speedup == pytest.approx(104 / 25)
    counts = {latency.name: len(latency.samples_ms) for latency in record.baselines}
    assert counts == {"a": 4, "b": 4, "c": 3}


def test_one_disturbance_does_not_eliminate_the_fastest():
    """The best sample of the elimination counts, as a disturbance can only add."""
    lab = Lab()
    baselines = {"a": lab.call("a", 100, 150, 150, 100), "b": lab.call("b", 120)}
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25), baselines, samples=4, warmup=0
    )
    assert record.baseline == "a"


def drifting(lab: Lab, *, bad_runs: int, samples: int = 4) -> Callable[[], None]:
    """An engine call whose later samples are 10 % slower in the first ``bad_runs`` runs."""
    half = samples // 2
    return lab.call("reduced", *([50] * half + [55] * half) * bad_runs, 50)


def test_a_drift_is_measured_once_more():
    """Drift in the first run only: its samples are dropped and the second run stands."""
    lab = Lab()
    record = lab.measure(
        lab.call("dense", 80), drifting(lab, bad_runs=1), lab.calls(eager=100), samples=4, warmup=0
    )
    assert record.remeasured
    assert not record.inconclusive
    assert record.engine_reduced.samples_ms == (50,) * 4
    assert lab.ran.count("dense") == 8


def test_a_drift_that_stays_is_inconclusive():
    """Drift in both runs: said so, with the second run's samples, and no third run."""
    lab = Lab()
    record = lab.measure(
        lab.call("dense", 80), drifting(lab, bad_runs=2), lab.calls(eager=100), samples=4, warmup=0
    )
    assert record.remeasured
    assert record.inconclusive
    assert record.engine_reduced.drift == pytest.approx(0.1)
    assert lab.ran.count("dense") == 8


def test_a_baseline_that_was_overtaken_is_measured_again_with_the_other():
    """The winner of the elimination got slower than a loser had been: both run again."""
    lab = Lab()
    baselines = {"a": lab.call("a", *[100] * 4, 150), "b": lab.call("b", 120)}
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25), baselines, samples=4, warmup=0
    )
    assert record.remeasured
    assert not record.inconclusive
    assert record.baseline == "b"
    assert record.engine_gain == pytest.approx(120 / 40)


def test_a_machine_that_was_quicker_before_is_inconclusive():
    """All baselines slowed down after the elimination: steady, but not to be believed."""
    lab = Lab()
    baselines = {
        name: lab.call(name, *[quick] * 4, 300)
        for name, quick in {"a": 100, "b": 120, "c": 140, "d": 160}.items()
    }
    record = lab.measure(
        lab.call("dense", 40), lab.call("reduced", 25), baselines, samples=4, warmup=0
    )
    assert record.remeasured
    assert record.inconclusive


@pytest.mark.parametrize(("late", "remeasured"), [(104.9, False), (105.1, True)])
def test_five_percent_is_the_limit_for_baselines_too(late, remeasured):
    """A baseline that drifts by more than 5 % spoils the run as an engine does."""
    lab = Lab()
    eager = lab.call("eager", *[100] * 4, 100, 100, late, late, 100)
    record = lab.measure(
        lab.call("dense", 80), lab.call("reduced", 50), {"eager": eager}, samples=4, warmup=0
    )
    assert record.remeasured is remeasured


def test_little_time_still_gives_three_samples_of_each():
    """Out of time from the start: one sample in the elimination, three in the final."""
    lab = Lab()
    record = lab.measure(
        lab.call("dense", 8000), lab.call("reduced", 5000), lab.calls(a=10_000, b=15_000),
        samples=20, warmup=0, max_seconds=1,
    )  # fmt: skip
    counts = {latency.name: len(latency.samples_ms) for latency in record.baselines}
    assert counts == {"a": 3, "b": 1}
    assert len(record.engine_dense.samples_ms) == len(record.engine_reduced.samples_ms) == 3
    assert record.samples_asked == 20


def test_all_runs_together_keep_to_the_time_allowed():
    """Elimination and, with a drift, two runs end within max_seconds."""
    lab = Lab()
    slope = lab.call("reduced", *[500 + 10 * i for i in range(500)])
    record = lab.measure(
        lab.call("dense", 800), slope, lab.calls(a=1000, b=1500), samples=1000, warmup=2,
        max_seconds=100,
    )  # fmt: skip
    assert record.inconclusive
    assert 80 < lab.now / 1e9 <= 100


def test_refuses_to_compare_with_nothing():
    """A speed-up needs a baseline."""
    with pytest.raises(InvalidRequest, match="no baseline"):
        measure_speed("prefill-64", lambda: None, lambda: None, {}, CONDITIONS)
