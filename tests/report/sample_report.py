"""A report as a build of a 24-layer model might end with, and simple changes to it.

    from sample_report import make_report

Its numbers are made up, but consistent, and all different.
"""

from __future__ import annotations

import statistics

import msgspec

from tokred_export.backends.common import EngineInfo
from tokred_export.manifest import Provenance
from tokred_export.reduction.flops import plan_rows
from tokred_export.report.model import Bucket, JudgedParity, JudgedSpeed, Missing, Report
from tokred_export.specs import ModelSpec, ReductionSchedule, Site
from tokred_export.verify.judge import FLOAT32, judge_parity, judge_speed
from tokred_export.verify.records import (
    Comparison,
    Environment,
    Flip,
    Latency,
    LogitsComparison,
    ParityCase,
    ParityRecord,
    SiteAgreement,
    SpeedRecord,
)
from tokred_export.verify.speed import drift, percentile

MODEL = ModelSpec(
    layout="mamba_ssm", vocab_size=50288, d_model=768, n_layer=24, d_inner=1536, n_heads=24,
    head_dim=64, d_state=128, norm_group_size=1536,
)  # fmt: skip
ENVIRONMENT = Environment(
    platform="Linux-6.1-x86_64", processor="Example CPU 3000", cores=2, python="3.11.9",
    packages={"torch": "2.13.0", "onnxruntime": "1.31.1"},
)  # fmt: skip


def make_schedule(length: int) -> ReductionSchedule:
    kept = [length, length * 7 // 8, length * 3 // 4, length * 5 // 8]
    sites = [
        Site(layer=layer, tokens_in=before, tokens_out=after)
        for layer, before, after in zip((5, 9, 13), kept, kept[1:], strict=False)
    ]
    return ReductionSchedule(method="utrc", length=length, sites=tuple(sites))


def make_tensor(name: str, rel_l2: float, **changes) -> Comparison:
    values = {
        "name": name, "shape": (2, 24, 64, 128), "max_abs": rel_l2 * 31, "mean_abs": rel_l2 / 7,
        "rel_l2": rel_l2, "cosine": 1 - rel_l2, "nonfinite": 0, "noise_rel_l2": 3.4e-7,
    }  # fmt: skip
    return Comparison(**(values | changes))


def make_case(length: int, number: int, **changes) -> ParityCase:
    tensors = [make_tensor("logits", 1.9e-6 * number, shape=(2, 50288))]
    tensors.append(make_tensor("kept_positions", 0.0, shape=(2, length * 5 // 8), noise_rel_l2=0.0))
    for kind, base in (("conv_state", 2.3e-7), ("ssm_state", 4.1e-7)):
        tensors += [
            make_tensor(f"present.{kind}.{i}", base * (1 + i) ** 0.5 * number) for i in range(24)
        ]
    schedule = make_schedule(length)
    sites = [
        SiteAgreement(
            site=s, layer=site.layer, tokens_in=site.tokens_in, removed=site.removed,
            real_removed=site.removed - 3, same_source=1.0 if s else 0.99876, same_target=1.0,
            same_merge=1.0,
            flips=() if s else (Flip(site=0, row=1, position=417, what="removed", margin=0.73),),
        )
        for s, site in enumerate(schedule.sites)
    ]  # fmt: skip
    values = {
        "component": f"prefill-{length}", "description": ("text", "noise")[number - 1],
        "prompt_lengths": (length, length - 11 * number), "tensors": tuple(tensors),
        "logits": LogitsComparison(kl=3.7e-9 * number, top1_agreement=1.0, top5_agreement=0.98),
        "kept_exact": number == 2, "kept_jaccard": 0.99913, "sites": tuple(sites),
    }  # fmt: skip
    return ParityCase(**(values | changes))


def make_parity(**changes) -> ParityRecord:
    values = {
        "backend": "onnxruntime", "baseline": "eager float32 CPU",
        "noise": "eager float64 against eager float32, same choices",
        "cases": tuple(make_case(length, n) for length in (512, 2048) for n in (1, 2)),
        "environment": ENVIRONMENT, "command": "tokred-export verify out/demo",
    }  # fmt: skip
    return ParityRecord(**(values | changes))


def judged_parity(**changes) -> JudgedParity:
    record = make_parity(**changes)
    return JudgedParity(record=record, tolerance=FLOAT32, verdict=judge_parity(record, FLOAT32))


def make_latency(name: str, median: float, count: int) -> Latency:
    samples = [median * (1 + 0.012 * ((7 * i) % 5 - 2)) for i in range(count)]
    return Latency(
        name=name, samples_ms=tuple(samples), median_ms=statistics.median(samples),
        p95_ms=percentile(samples, 0.95), drift=drift(samples),
    )  # fmt: skip


def make_speed(length: int, factor: float = 1.0, **changes) -> SpeedRecord:
    medians = {
        "eager chunk 32": 957.3, "eager chunk 64": 831.7, "eager chunk 128": 1049.2,
        "eager chunk 256": 1732.5, "transformers chunk 64": 2931.4,
        "transformers chunk 128": 3544.1, "transformers chunk 256": 4822.8,
    }  # fmt: skip
    counts = (3, 20, 3, 1, 1, 1, 1)
    baselines = [
        make_latency(name, median * factor, count)
        for (name, median), count in zip(medians.items(), counts, strict=True)
    ]
    dense = make_latency("engine dense", 547.6 * factor, 20)
    reduced = make_latency("engine reduced", 451.9 * factor, 20)
    eager = baselines[1].median_ms
    values = {
        "component": f"prefill-{length}", "backend": "onnxruntime", "batch": 1,
        "schedule": make_schedule(length), "threads": 2,
        "timed": "One prefill call, from token ids in memory to logits and states in memory.",
        "baselines": tuple(baselines), "baseline": "eager chunk 64",
        "engine_dense": dense, "engine_reduced": reduced,
        "engine_gain": eager / dense.median_ms,
        "reduction_gain": dense.median_ms / reduced.median_ms,
        "speedup": eager / reduced.median_ms, "samples_asked": 20, "inconclusive": False,
        "environment": ENVIRONMENT, "command": "tokred-export bench out/demo --threads 2",
    }  # fmt: skip
    return SpeedRecord(**(values | changes))


def judged_speed(length: int = 2048, factor: float = 1.0, **changes) -> JudgedSpeed:
    record = make_speed(length, factor, **changes)
    return JudgedSpeed(record=record, verdict=judge_speed(record))


def make_engine(**changes) -> EngineInfo:
    values = {
        "backend": "onnxruntime", "version": "1.31.1", "component": "prefill-2048",
        "file": "prefill-2048.onnx", "files": ("prefill-2048.onnx", "prefill-2048.onnx.data"),
        "target": "cpu", "machine": "x86_64", "processor": "Example CPU 3000",
        "onnx_files": {"prefill-2048.onnx": "ab" * 32}, "seconds": 12.34, "bytes": 541_065_216,
        "layers": 1777, "layers_from": "graph", "options": {"level": "extended"},
        "can_run_here": True, "reason": "onnxruntime offers CPUExecutionProvider",
    }  # fmt: skip
    return EngineInfo(**(values | changes))


def make_rtx_engine() -> EngineInfo:
    return make_engine(
        backend="tensorrt-rtx", version="1.7.1", file="prefill-2048.plan",
        files=("prefill-2048.plan",), target="sm80+sm86+sm89+sm120", bytes=270_532_608, layers=913,
        layers_from="network", can_run_here=False, options={"max_batch": 1},
        reason="TensorRT-RTX needs an RTX GPU, and no GPU was found",
    )  # fmt: skip


def make_report(**changes) -> Report:
    schedules = [make_schedule(512), make_schedule(2048)]
    values = {
        "title": "mamba2-130m, 20 % fewer FLOPs",
        "verdict": {"outcome": "PASS"},
        "model": MODEL,
        "buckets": tuple(
            Bucket(
                component=f"prefill-{s.length}", schedule=s, rows=tuple(plan_rows(MODEL, s))
            )
            for s in schedules
        ),
        "engines": (make_engine(), make_rtx_engine()),
        "parity": (judged_parity(),),
        "speed": (judged_speed(512, 0.21), judged_speed(2048)),
        "missing": (
            Missing(
                what="Speed of prefill-2048 on tensorrt-rtx", why="this machine cannot run it"
            ),
        ),
        "provenance": Provenance(
            model_source="state-spaces/mamba2-130m", revision="0f1e2d3c",
            weights_sha256="c0ffee" * 10 + "beef", tool_version="0.1.0",
            libraries={"torch": "2.13.0", "onnxscript": "0.7.2"},
            command="tokred-export build state-spaces/mamba2-130m -o out/demo --reduce 20%",
            created="2026-11-23T12:00:00+00:00",
        ),
        "command": "tokred-export report out/demo",
    }  # fmt: skip
    return msgspec.convert(values | changes, Report)
