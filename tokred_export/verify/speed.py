"""Latency, measured so that both sides get the same weather.

    samples = interleave({"eager": eager, "engine": engine}, samples=20, warmup=2, max_seconds=60)
    record = measure_speed("prefill-2048", dense, reduced, baselines, conditions)

What is timed are callables that return when their work is done, so a GPU's must synchronise;
one that was timed where it ran returns its :class:`Milliseconds`.
Nothing here imports a framework.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tokred_export.errors import InvalidRequest
from tokred_export.specs import ReductionSchedule
from tokred_export.verify.records import Environment, Latency, SpeedRecord

Timed = Callable[[], object]


class Milliseconds(float):
    """What a timed call returns where the time was taken elsewhere, in an engine's own process."""


FEWEST_SAMPLES = 3
# Calls in a row for one sample on a GPU; the last counts, so that none pays for the pause before.
BURST = 3
MAX_DRIFT = 0.05
# Baselines that come this close to the fastest in a few samples may yet be the fastest.
NEAR = 0.05
# Thread pools of torch and ONNX Runtime spin for some milliseconds after their work, which the
# next one timed would pay for.
REST_SECONDS = 0.02

ENGINE_DENSE, ENGINE_REDUCED = "engine dense", "engine reduced"


class Clock(NamedTuple):
    """Where time comes from; a test brings its own."""

    now_ns: Callable[[], int] = time.perf_counter_ns
    sleep: Callable[[float], None] = time.sleep


REAL_CLOCK = Clock()


class Conditions(NamedTuple):
    """What a speed record says beside the latencies, by the names of :class:`SpeedRecord`."""

    backend: str
    batch: int
    schedule: ReductionSchedule
    threads: int
    timed: str  # what is inside the timed region
    environment: Environment
    command: str
    left_out: Mapping[str, str] = {}


class _Final(NamedTuple):
    """A full run: latencies of finalists and engines, the baseline, and whether to believe it."""

    latencies: dict[str, Latency]
    fastest: Latency
    steady: bool


def interleave(
    timed: Mapping[str, Timed],
    samples: int,
    warmup: int,
    max_seconds: float,
    clock: Clock = REAL_CLOCK,
    rest_seconds: float = REST_SECONDS,
) -> list[Latency]:
    """Time several things in turns, A B C A B C, so that a drift of the machine hits all alike.

    Args:
        timed: what to call, by name.
        samples: rounds to take, at least 3.
        warmup: rounds before these that are not kept.
        max_seconds: no new round is begun that would end later, but 3 are taken in any case.
        clock: for tests.
        rest_seconds: pause before each call, outside the timed region.

    Returns:
        One record a name, in the order given, with equally many samples each.

    Raises:
        InvalidRequest: nothing to time, or fewer than 3 samples asked for.
    """
    if not timed or samples < FEWEST_SAMPLES:
        raise InvalidRequest(
            f"{len(timed)} things were to be timed with {samples} samples, expected at least one "
            f"and {FEWEST_SAMPLES}: name something, and raise --samples"
        )
    begun = clock.now_ns()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    with _no_collection():
        for _ in range(warmup):
            _round(timed, clock, rest_seconds)
        for done in range(samples):
            round_begun = clock.now_ns()
            for name, milliseconds in _round(timed, clock, rest_seconds).items():
                taken[name].append(milliseconds)
            now = clock.now_ns()
            after_next = (2 * now - round_begun - begun) / 1e9
            if done + 1 >= FEWEST_SAMPLES and after_next > max_seconds:
                break
    return [_latency(name, values) for name, values in taken.items()]


def measure_speed(
    component: str,
    engine_dense: Timed,
    engine_reduced: Timed,
    baselines: Mapping[str, Timed],
    conditions: Conditions,
    samples: int = 20,
    warmup: int = 2,
    max_seconds: float = 300.0,
    clock: Clock = REAL_CLOCK,
    rest_seconds: float = REST_SECONDS,
) -> SpeedRecord:
    """Find the fastest baseline, then time it, the dense and the reduced engine in turns.

    The baselines first meet in a short elimination. The fastest of it, and a second one that
    came within 5 %, run with the engines in full; the lower median of those two is the baseline.
    If the first and last samples of anything in that run drift apart by more than 5 %, or a
    baseline that was eliminated had been faster than that by more than 5 %, the run is repeated
    once, with finalists chosen anew; if it is no better, the record is inconclusive.

    Args:
        component: "prefill-2048".
        engine_dense, engine_reduced: one call of each engine on the same prompts.
        baselines: one call of each candidate for the fastest dense eager, on the same prompts.
        conditions: what else the record says.
        samples, warmup: rounds of a full run, and unkept rounds before it.
        max_seconds: for everything: the elimination stops after a third of it, each of the two
            runs may use half of what is left then, but takes 3 samples in any case.
        clock, rest_seconds: see :func:`interleave`.

    Raises:
        InvalidRequest: no baselines, or fewer than 3 samples asked for.
    """
    if not baselines:
        raise InvalidRequest(
            "no baseline was given, expected at least one dense eager to compare with: "
            "a speed-up over nothing means nothing"
        )
    begun = clock.now_ns()
    heats = _eliminate(baselines, max_seconds / 3, clock, rest_seconds)
    left = max_seconds - (clock.now_ns() - begun) / 1e9
    engines = {ENGINE_DENSE: engine_dense, ENGINE_REDUCED: engine_reduced}

    def run(warmup: int) -> _Final:
        timed = {name: baselines[name] for name in _finalists(heats)} | engines
        latencies = interleave(timed, samples, warmup, left / 2, clock, rest_seconds)
        return _final({latency.name: latency for latency in latencies}, heats)

    final = run(warmup)
    remeasured = not final.steady
    if remeasured:
        # What was seen of the finalists counts when they are chosen anew.
        heats |= {name: final.latencies[name] for name in heats if name in final.latencies}
        final = run(warmup=0)  # all is warm by now

    fastest, found = final.fastest, final.latencies
    dense, reduced = found[ENGINE_DENSE], found[ENGINE_REDUCED]
    return SpeedRecord(
        **conditions._asdict(),
        component=component,
        baselines=tuple(found.get(name, heat) for name, heat in heats.items()),
        baseline=fastest.name,
        engine_dense=dense,
        engine_reduced=reduced,
        engine_gain=fastest.median_ms / dense.median_ms,
        reduction_gain=dense.median_ms / reduced.median_ms,
        speedup=fastest.median_ms / reduced.median_ms,
        samples_asked=samples,
        remeasured=remeasured,
        inconclusive=not final.steady,
    )


def drift(samples: Sequence[float]) -> float:
    """|median of the last half / median of the first half - 1|; 0 for a single sample."""
    half = len(samples) // 2
    if half == 0:
        return 0.0
    return abs(statistics.median(samples[-half:]) / statistics.median(samples[:half]) - 1)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` of the samples do not exceed (nearest rank)."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def _eliminate(
    baselines: Mapping[str, Timed], max_seconds: float, clock: Clock, rest_seconds: float
) -> dict[str, Latency]:
    """A warm-up and up to 3 samples each, in turns.

    Whoever is twice as slow as another gets just one, and so do all when time is up.
    """
    begun = clock.now_ns()
    taken: dict[str, list[float]] = {name: [] for name in baselines}
    left = dict(baselines)
    with _no_collection():
        _round(left, clock, rest_seconds)
        for _ in range(FEWEST_SAMPLES):
            for name, milliseconds in _round(left, clock, rest_seconds).items():
                taken[name].append(milliseconds)
            limit = 2 * min(map(min, taken.values()))
            left = {name: call for name, call in left.items() if min(taken[name]) <= limit}
            if (clock.now_ns() - begun) / 1e9 > max_seconds:
                break
    return {name: _latency(name, values) for name, values in taken.items()}


def _finalists(heats: Mapping[str, Latency]) -> list[str]:
    """The fastest of the elimination, and the second if it is as good as even.

    By the best sample: so few of them are spoilt by one disturbance, and that only ever adds.
    """
    best = {name: min(latency.samples_ms) for name, latency in heats.items()}
    ranked = sorted(best, key=lambda name: best[name])[:2]
    return [name for name in ranked if best[name] <= (1 + NEAR) * best[ranked[0]]]


def _final(latencies: dict[str, Latency], heats: Mapping[str, Latency]) -> _Final:
    """The outcome of a full run, given what the elimination saw.

    It is not steady if anything drifted, and neither if a baseline outside of the run had been
    faster than the one that won it: then the machine was quicker at that time than now, or the
    wrong ones were eliminated.
    """
    finalists = [latency for name, latency in latencies.items() if name in heats]
    fastest = min(finalists, key=lambda latency: latency.median_ms)
    others = [heat.median_ms for name, heat in heats.items() if name not in latencies]
    overtaken = any((1 + NEAR) * other < fastest.median_ms for other in others)
    steady = all(latency.drift <= MAX_DRIFT for latency in latencies.values())
    return _Final(latencies, fastest, steady and not overtaken)


def _round(timed: Mapping[str, Timed], clock: Clock, rest_seconds: float) -> dict[str, float]:
    """One sample of each, in milliseconds."""
    taken = {}
    for name, call in timed.items():
        if rest_seconds:
            clock.sleep(rest_seconds)
        start = clock.now_ns()
        result = call()
        own = isinstance(result, Milliseconds)
        taken[name] = float(result) if own else (clock.now_ns() - start) / 1e6
    return taken


def _latency(name: str, samples: Sequence[float]) -> Latency:
    return Latency(
        name=name,
        samples_ms=tuple(samples),
        median_ms=statistics.median(samples),
        p95_ms=percentile(samples, 0.95),
        drift=drift(samples),
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection within: it would fall on whoever happens to be timed."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
