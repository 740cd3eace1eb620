"""What the verbs do: build, verify, bench, report. Each returns a result that says its exit code.

    build    the whole line; the proof is part of the bundle
    verify   parity of a bundle anew, or its stored record judged again
    bench    speed of a bundle anew, refused unless parity holds
    report   the pages, from the stored records
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from tokred_export import pipeline, prove
from tokred_export.backends.common import EngineInfo, read_engines
from tokred_export.bundle import (
    Bundle,
    read_bundle,
    require_writable,
    update_files,
    verify_files,
)
from tokred_export.disk import clear_disk_errors
from tokred_export.errors import BundleError, GateFailed, InvalidRequest
from tokred_export.manifest import describe_reduction
from tokred_export.pipeline import Stage, silent
from tokred_export.reduction.schedule import plan_rows
from tokred_export.report.model import Bucket, JudgedParity, JudgedSpeed, Missing, Report
from tokred_export.report.render import render
from tokred_export.runtime.ort import Device
from tokred_export.runtime.runner import engine_folders
from tokred_export.specs import Backend, BuildSpec, Spec
from tokred_export.verify.bisect import first_divergence
from tokred_export.verify.judge import Verdict, judge_parity, judge_speed, tolerance_for
from tokred_export.verify.junit import write_junit
from tokred_export.verify.records import ParityRecord, SpeedRecord

_EXIT = {"PASS": 0, "FAIL": GateFailed.exit_code, "INCONCLUSIVE": 5}


class Result(Spec, kw_only=True):
    """What a verb has to say.

    ``speed_refused`` is why no speed was measured, where it was asked for.
    """

    bundle: str
    exit_code: int
    parity: ParityRecord | None = None
    parity_verdict: Verdict | None = None
    speed: tuple[SpeedRecord, ...] = ()
    speed_verdicts: tuple[Verdict, ...] = ()
    speed_refused: str | None = None
    divergence: tuple[str, ...] = ()
    engines: tuple[EngineInfo, ...] = ()
    pages: tuple[str, ...] = ()


def build(
    spec: BuildSpec,
    out: Path,
    *,
    command: str,
    force: bool = False,
    threads: int | None = None,
    parity: bool = True,
    speed: bool = True,
    bench_seconds: float = 90.0,
    min_speedup: float | None = None,
    stage: Stage = silent,
) -> Result:
    """Walk the line and leave a bundle at ``out``.

    A bundle whose parity failed is written too, with its records, so that one can look into it;
    the exit code is then 1 and its pages say so.

    Raises:
        InvalidRequest: ``min_speedup`` where no speed will be measured.
        TokredError: as :func:`pipeline.start_line` and :func:`pipeline.assembling`.
    """
    backend = prove.proven_backend(spec.backends)
    prove_parity = parity and backend is not None
    if min_speedup is not None:
        _require_speed(speed and prove_parity and _can_time(backend, spec.device))
    line = pipeline.start_line(spec, stage=stage)
    with pipeline.assembling(line, out, command, force) as bundle:
        verdict, refused = None, None
        if prove_parity:
            record = prove.measure_parity(line, bundle, command, threads=threads)
            prove.store(bundle.path, "parity", [record])
            verdict = judge_parity(record, tolerance_for(spec.tensor_dtype))
        if speed:
            refused = _refusal(verdict, backend, spec.device)
        if speed and refused is None:
            speeds = prove.measure_bundle_speed(
                line, bundle, command, threads=threads, max_seconds=bench_seconds
            )
            prove.store(bundle.path, "speed", speeds)
        _write_pages(bundle, refused, min_speedup)
    return _result(read_bundle(out), min_speedup, refused)


def verify(
    path: Path,
    *,
    command: str,
    model: str | None = None,
    thorough: bool = False,
    stored: bool = False,
    threads: int | None = None,
    junit: Path | None = None,
    bisect: bool = False,
    device: Device = "cpu",
    backend: Backend | None = None,
    stage: Stage = silent,
) -> Result:
    """Measure parity anew (or take the stored record), judge it, and store it.

    Raises:
        InvalidRequest: ``stored``, but no record is stored, or with flags for measuring; or no
            folder for ``junit``.
        TokredError: as :func:`read_bundle`, :func:`verify_files`, :func:`pipeline.start_line`.
    """
    if junit is not None and not junit.absolute().parent.is_dir():
        raise InvalidRequest(
            f"there is no folder {junit.absolute().parent} for the JUnit file: make it first"
        )
    if junit is not None and junit.is_dir():
        raise InvalidRequest(f"--junit {junit} is a folder, expected the name of a file")
    if stored and (thorough or model is not None or backend is not None or device != "cpu"):
        raise InvalidRequest(
            "--stored judges what was measured before, so that --thorough, --model, --backend and "
            "--device mean nothing beside it: leave them out, or leave out --stored"
        )
    bundle = read_bundle(path)
    require_writable(bundle)
    # What is about to be measured and written anew need not be whole: a run killed between the
    # record and the manifest is repaired by the next one.
    verify_files(bundle, skip=() if stored else ("reports/",))
    if stored:
        record = _stored_parity(bundle)
        if record is None:
            raise InvalidRequest(
                f"{path} holds no parity record to judge: run `tokred-export verify {path}`"
            )
    else:
        line = pipeline.line_of_bundle(
            bundle, model, stage=stage, device=device, backend=backend or _engine_backend(bundle)
        )
        record = prove.measure_parity(line, bundle, command, thorough, threads)
        prove.store(path, "parity", [record])
        _write_pages(bundle, None, None)
        bundle = update_files(path)
    tolerance = tolerance_for(_dtype(bundle))
    if junit is not None:
        with clear_disk_errors(junit, writable=True):
            write_junit(junit, record, tolerance)
    result = _result(bundle, None, None, with_speed=False)
    return msgspec.structs.replace(
        result, divergence=tuple(_divergences(bundle, record)) if bisect else ()
    )


def bench(
    path: Path,
    *,
    command: str,
    model: str | None = None,
    batch: int = 1,
    samples: int = 20,
    max_seconds: float = 120.0,
    threads: int | None = None,
    min_speedup: float | None = None,
    stage: Stage = silent,
) -> Result:
    """Measure speed anew and store it.

    Raises:
        GateFailed: parity failed or was never measured.
        InvalidRequest: a batch that the bundle does not take.
        TokredError: as :func:`verify`.
    """
    bundle = read_bundle(path)
    require_writable(bundle)
    verify_files(bundle)
    record = _stored_parity(bundle)
    verdict = judge_parity(record, tolerance_for(_dtype(bundle))) if record else None
    backend = _engine_backend(bundle)
    if (refused := _refusal(verdict, backend, "cpu")) is not None:
        raise GateFailed(f"{refused}; run `tokred-export verify {path}` first")
    metadata = next(iter(bundle.manifest.components.values())).metadata
    if batch > metadata.max_batch:
        raise InvalidRequest(
            f"--batch is {batch}, but the bundle takes at most {metadata.max_batch}: "
            f"build it with --max-batch {batch}"
        )
    line = pipeline.line_of_bundle(bundle, model, stage=stage, backend=backend)
    speeds = prove.measure_bundle_speed(
        line, bundle, command, threads, samples, max_seconds, batch
    )
    prove.store(path, "speed", speeds)
    _write_pages(bundle, None, min_speedup)
    return _result(update_files(path), min_speedup, None)


def write_report(path: Path) -> list[Path]:
    """Render a bundle's pages again.

    Raises:
        BundleError: the bundle holds no records, or they are damaged.
    """
    bundle = read_bundle(path)
    verify_files(bundle)
    if _stored_parity(bundle) is None and not _stored_speed(bundle):
        raise BundleError(
            f"{path} holds no records to report: run `tokred-export verify {path}` first"
        )
    pages = _write_pages(bundle, None, None)
    update_files(path)
    return pages


def _require_speed(measured: bool) -> None:
    """A gate that nothing goes through would look like one that held."""
    if not measured:
        raise InvalidRequest(
            "--min-speedup was given, but no speed will be measured: it needs the backend "
            "tensorrt, or onnxruntime on the device cpu, and neither --no-verify nor --no-bench"
        )


def _can_time(backend: Backend | None, device: str) -> bool:
    """Whether there is a baseline to compare with."""
    return backend == "tensorrt" or (backend == "onnxruntime" and device == "cpu")


def _engine_backend(bundle: Bundle) -> Backend:
    """What runs a bundle where nobody says: its TensorRT engine, or ONNX Runtime."""
    return "tensorrt" if engine_folders(bundle, "tensorrt") else "onnxruntime"


def _refusal(verdict: Verdict | None, backend: Backend | None, device: str) -> str | None:
    """Why speed is not measured, if so."""
    if backend is not None and not _can_time(backend, device):
        return f"speed is refused: {backend} on {device} has no baseline yet to compare with"
    if verdict is None:
        return "speed is refused: parity was not measured"
    if verdict.outcome != "PASS":
        return f"speed is refused: parity is {verdict.outcome}"
    return None


def _dtype(bundle: Bundle) -> str:
    return next(iter(bundle.manifest.components.values())).metadata.dtype


def _stored_parity(bundle: Bundle) -> ParityRecord | None:
    records = prove.load(bundle, "parity", list[ParityRecord])
    return records[0] if records else None


def _stored_speed(bundle: Bundle) -> tuple[SpeedRecord, ...]:
    return tuple(prove.load(bundle, "speed", list[SpeedRecord]) or ())


def _engines(bundle: Bundle) -> tuple[EngineInfo, ...]:
    folders = sorted((bundle.path / "engines").glob("*"))
    return tuple(info for folder in folders for info in read_engines(folder).values())


def _result(
    bundle: Bundle, min_speedup: float | None, refused: str | None, with_speed: bool = True
) -> Result:
    """Judge what is stored."""
    parity = _stored_parity(bundle)
    verdict = judge_parity(parity, tolerance_for(_dtype(bundle))) if parity else None
    speed = _stored_speed(bundle) if with_speed else ()
    speeds = tuple(judge_speed(record, min_speedup) for record in speed)
    codes = [_EXIT[v.outcome] for v in (*((verdict,) if verdict else ()), *speeds)]
    if min_speedup is None:  # speed is then a result, not a gate
        codes = codes[:1] if verdict else []
    pages = (bundle.path / "reports" / name for name in ("report.html", "report.md"))
    return Result(
        bundle=str(bundle.path),
        exit_code=1 if 1 in codes else max(codes, default=0),
        parity=parity, parity_verdict=verdict, speed=speed, speed_verdicts=speeds,
        speed_refused=refused, engines=_engines(bundle),
        pages=tuple(str(page) for page in pages if page.is_file()),
    )  # fmt: skip


def _write_pages(bundle: Bundle, refused: str | None, min_speedup: float | None) -> list[Path]:
    """Judge the stored records and render them; without any there is no page."""
    parity, speed = _stored_parity(bundle), _stored_speed(bundle)
    tolerance = tolerance_for(_dtype(bundle))
    judged = (
        (JudgedParity(record=parity, tolerance=tolerance, verdict=judge_parity(parity, tolerance)),)
        if parity
        else ()
    )
    # A speed from before, when parity held, is not shown beside a parity that fails.
    verdict = judged[0].verdict if judged else None
    refused = refused or _refusal(verdict, _engine_backend(bundle), "cpu")
    timed = tuple(
        JudgedSpeed(record=r, verdict=judge_speed(r, min_speedup)) for r in speed if not refused
    )
    manifest = bundle.manifest
    missing = []
    if not judged:
        missing.append(Missing(what="Parity", why="not measured"))
    if not timed:
        why = (refused or "not measured").removeprefix("speed is ")
        missing.append(Missing(what="Speed", why=why))
    report = Report(
        title=f"{Path(manifest.provenance.model_source).name}, "
        f"{describe_reduction(manifest.spec.reduction)}",
        verdict=_overall(judged, timed),
        model=manifest.spec.model,
        buckets=tuple(
            Bucket(
                component=pipeline.component_name(length), schedule=schedule,
                rows=tuple(plan_rows(manifest.spec.model, schedule)),
            )
            for length, schedule in manifest.spec.schedules.items()
        ),
        engines=_engines(bundle), parity=judged, speed=timed, missing=tuple(missing),
        provenance=manifest.provenance, command=manifest.provenance.command,
    )  # fmt: skip
    return render(report, bundle.path / "reports")


def _overall(
    parity: tuple[JudgedParity, ...], speed: tuple[JudgedSpeed, ...]
) -> Verdict:
    """The worst of all verdicts, with every reason; nothing measured is inconclusive."""
    verdicts = [judged.verdict for judged in (*parity, *speed)]
    if not parity:
        return Verdict(outcome="INCONCLUSIVE", reasons=("parity was not measured",))
    outcomes = {verdict.outcome for verdict in verdicts}
    worst = next(o for o in ("FAIL", "INCONCLUSIVE", "PASS") if o in outcomes)
    return Verdict(outcome=worst, reasons=tuple(r for v in verdicts for r in v.reasons))


def _divergences(bundle: Bundle, record: ParityRecord) -> Iterator[str]:
    """The first divergence of each case, in words."""
    tolerance = tolerance_for(_dtype(bundle))
    for case in record.cases:
        metadata = bundle.manifest.components[case.component].metadata
        schedule = bundle.manifest.spec.schedules[metadata.seq_len]
        found = first_divergence(case, schedule, tolerance)
        where = "nowhere above tolerance" if found is None else found.reason
        yield f"{case.component}, {case.description} {list(case.prompt_lengths)}: {where}"


def parity_summary(result: Result) -> Iterator[str]:
    """Lines for a person: the verdict, the worst error of each kind, and the choices."""
    if result.parity is None or result.parity_verdict is None:
        yield "parity: not measured"
        return
    cases = result.parity.cases
    outcome, baseline = result.parity_verdict.outcome, result.parity.baseline
    yield f"parity: {outcome}, {len(cases)} cases of {result.parity.backend} against {baseline}"
    for kind in ("logits", "conv_state", "ssm_state"):
        errors = [
            (t.nonfinite > 0, t.rel_l2, t.noise_rel_l2)
            for case in cases for t in case.tensors
            if t.name == kind or f".{kind}." in t.name
        ]
        if errors:
            broken, worst, noise = max(errors)
            said = f"worst relative L2 {worst:.1e}, noise floor there {noise:.1e}"
            yield f"  {kind:<11} {'holds values that are NaN or infinite' if broken else said}"
    flips = sum(len(site.flips) for case in cases for site in case.sites)
    removed = sum(site.real_removed for case in cases for site in case.sites)
    yield f"  choices     {removed} prompt tokens removed, {flips} free choices differ by rounding"
    yield from (f"  {reason}" for reason in result.parity_verdict.reasons)
    yield from (f"  bisect: {line}" for line in result.divergence)


def speed_summary(result: Result) -> Iterator[str]:
    """Lines for a person: the speed-up as the product it is."""
    if result.speed_refused:
        yield result.speed_refused
    for record, verdict in zip(result.speed, result.speed_verdicts, strict=True):
        yield (
            f"speed {record.component}: {record.speedup:.2f}x = engine {record.engine_gain:.2f}x "
            f"* reduction {record.reduction_gain:.2f}x; {record.engine_reduced.median_ms:.1f} ms "
            f"against {record.baseline} "
            f"{record.engine_reduced.median_ms * record.speedup:.1f} ms"
            + (" (inconclusive: drifted)" if record.inconclusive else "")
        )
        if verdict.outcome != "PASS":
            yield from (f"  {verdict.outcome}: {reason}" for reason in verdict.reasons)


def summary(result: Result) -> Iterator[str]:
    """Lines for a person at the end of a build."""
    yield from parity_summary(result)
    yield from speed_summary(result)
    for info in result.engines:
        here = "runs here" if info.can_run_here else f"does not run here: {info.reason}"
        yield (
            f"engine {info.backend} {info.component}: {info.layers} layers, "
            f"{info.bytes / 1e6:.1f} MB, {here}"
        )
    yield f"bundle: {result.bundle}"
    yield from (f"report: {page}" for page in result.pages if page.endswith(".html"))
