"""The proof of a bundle: parity of its engine with eager, then speed, from what is on disk.

Parity is measured first; where it fails, speed is refused, since a wrong engine has no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from tokred_plugins.opset import PLAIN

from tokred_export import pipeline
from tokred_export.backends.common import list_gpus, read_engines
from tokred_export.bundle import Bundle
from tokred_export.disk import clear_disk_errors, write_atomic
from tokred_export.environment import environment, usable_cores
from tokred_export.errors import BundleError, CheckpointError, GateFailed
from tokred_export.model import Mamba2
from tokred_export.pipeline import Line
from tokred_export.runtime.ort import OrtRunner, open_session
from tokred_export.runtime.remote import RemoteRunner
from tokred_export.runtime.runner import Runner, close, open_runner
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE, open_engine, require_version
from tokred_export.runtime.trt import TrtRunner
from tokred_export.specs import Backend, Dtype, ReductionSchedule
from tokred_export.verify.baselines import (
    Baselines,
    describe_timed,
    eager_baselines,
    steady_allocator,
)
from tokred_export.verify.cases import PromptCase, prompt_cases
from tokred_export.verify.parity import measure_case, noise_of
from tokred_export.verify.records import ITSELF, ParityCase, ParityRecord, SpeedRecord
from tokred_export.verify.speed import BURST, Conditions, Milliseconds, Timed, measure_speed

# Backends whose engines can be run here and compared, the first that was built being proven.
PROVEN: tuple[Backend, ...] = ("tensorrt", "onnxruntime")


def proven_backend(backends: Sequence[Backend]) -> Backend | None:
    """Which of a bundle's backends parity and speed are about; None if none can be."""
    return next((backend for backend in PROVEN if backend in backends), None)


def measure_parity(
    line: Line, bundle: Bundle, command: str, thorough: bool = False, threads: int | None = None
) -> ParityRecord:
    """Every prefill of the bundle against eager float32, on random and text prompts.

    Eager runs on the CPU, and for TensorRT on the GPU, there made of the plain functions: the
    kernels are what is judged.

    Args:
        line: what the bundle was made from, and with which backend it is run.
        bundle: what is judged; its stored engine is opened.
        command: the command line, for the record.
        thorough: every padded length at which something new happens.
        threads: of the engine and of eager.
    """
    torch.set_num_threads(threads or usable_cores())
    backend = proven_backend(line.spec.backends)
    on_gpu = backend == "tensorrt" and torch.cuda.is_available()
    cases, itself = [], False
    for name, component in bundle.manifest.components.items():
        metadata = component.metadata
        schedule = bundle.manifest.spec.schedules[metadata.seq_len]
        with line.stage(f"parity {name}"):
            model = pipeline.eager(line, schedule, "float32", PLAIN if on_gpu else None)
            model = model.cuda() if on_gpu else model
            runner = open_runner(bundle, name, backend, line.spec.device, threads)
            itself = itself or runner.source.parent == bundle.path
            prompts = prompt_cases(
                schedule, line.checkpoint.spec.vocab_size, min(metadata.max_batch, 2), thorough,
                texts=sample_text(bundle, schedule.length),
            )
            cases += [_measure(model, runner, name, case, metadata.dtype) for case in prompts]
            if backend == "tensorrt":
                close(runner)
            elif runner.source.parent != bundle.path:
                # The file that other runtimes take is judged too, not only the engine's copy.
                del runner
                runner = open_runner(
                    bundle, name, backend, line.spec.device, threads, engine="ignore"
                )
                full = prompts[0]._replace(
                    description=f"{prompts[0].description}, {ITSELF}"
                )
                cases.append(_measure(model, runner, name, full, metadata.dtype))
    return ParityRecord(
        # No engine of the bundle fits here, or it has none: the record says what was run instead.
        backend=_describe(line, backend) + (f", {ITSELF}" if itself else ""),
        baseline="eager PyTorch, float32, " + ("GPU, plain functions" if on_gpu else "CPU"),
        noise=noise_of(metadata.dtype),
        cases=tuple(cases),
        environment=environment(),
        command=command,
    )


def _describe(line: Line, backend: Backend) -> str:
    if backend == "tensorrt":
        return f"tensorrt {require_version()} ({list_gpus()[0].name})"
    return f"{backend} ({line.spec.device.upper()})"


def _measure(
    model: Mamba2, runner: Runner, component: str, case: PromptCase, dtype: Dtype
) -> ParityCase:
    return measure_case(
        model, runner.run, component, case.input_ids, case.prompt_len, case.description, dtype
    )


def sample_text(bundle: Bundle, length: int) -> list[list[int]]:
    """Token ids of a text that every machine has: Python's own source of argparse.

    Empty where the bundle has no tokenizer, as checkpoints of random weights have none.

    Raises:
        CheckpointError: the tokenizer is damaged, or of another model.
    """
    path = bundle.path / "tokenizer.json"
    if not path.is_file():
        return []
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    try:
        ids = Tokenizer.from_file(str(path)).encode(text).ids[:length]
    except Exception as error:  # the library raises this very class
        raise CheckpointError(
            f"the checkpoint's tokenizer.json cannot be used ({error}): download it again, or "
            "remove it to be verified on random ids only"
        ) from error
    known = bundle.manifest.spec.model.vocab_size
    if max(ids, default=0) >= known:
        raise CheckpointError(
            f"the checkpoint's tokenizer.json gives a text the id {max(ids)}, expected 0 to "
            f"{known - 1}, which the model knows: it is of another model, replace or remove it"
        )
    return [ids] if ids else []


def measure_bundle_speed(
    line: Line,
    bundle: Bundle,
    command: str,
    threads: int | None = None,
    samples: int = 20,
    max_seconds: float = 120.0,
    batch: int = 1,
) -> list[SpeedRecord]:
    """Latency of every prefill against the fastest dense eager, and of the dense engine.

    Args:
        line: what the bundle was made from; the dense graph is exported and built from it, for
            the backend that is proven.
        bundle: what is measured; its stored engine is opened.
        command: the command line, for the record.
        threads: of engines and eager alike; None for all usable cores.
        samples: rounds of a full run.
        max_seconds: for each component.
        batch: prompts at a time.
    """
    threads = threads or usable_cores()
    backend = proven_backend(line.spec.backends)
    steady = steady_allocator() if backend == "onnxruntime" else False
    records = []
    for name, component in bundle.manifest.components.items():
        schedule = bundle.manifest.spec.schedules[component.metadata.seq_len]
        dense = ReductionSchedule(method="none", length=schedule.length)
        dense_onnx = pipeline.export(line, dense)
        dense_folder = pipeline.engine(line, backend, dense_onnx)
        ids = _full_prompts(line, batch, schedule.length)
        feeds = {
            "input_ids": ids, "prompt_len": np.full(batch, schedule.length, np.int32)
        }
        with line.stage(f"speed {name}"):
            if backend == "tensorrt":
                baselines, timed = _gpu_baselines(line, ids)
                dense_runner = _open_dense(dense_folder, name)
                runner = open_runner(bundle, name, backend)
                calls = [gpu_call(dense_runner, feeds), gpu_call(runner, feeds)]
            else:
                baselines = eager_baselines(line.checkpoint, torch.from_numpy(ids), threads)
                timed = describe_timed(steady)
                path = dense_folder / dense_onnx.name
                dense_runner = OrtRunner(open_session(path, "cpu", threads), path)
                runner = open_runner(bundle, name, backend, "cpu", threads)
                calls = [_call(dense_runner, feeds), _call(runner, feeds)]
            records.append(
                measure_speed(
                    name, *calls, baselines.timed,
                    Conditions(
                        backend, batch, schedule, threads, timed, environment(), command,
                        baselines.left_out,
                    ),
                    samples=samples,
                    max_seconds=max_seconds,
                )
            )
            close(dense_runner)
            close(runner)
    return records


def _call(runner: Runner, feeds: dict[str, np.ndarray]) -> Timed:
    return lambda: runner.run(feeds)


def gpu_call(runner: TrtRunner | RemoteRunner, feeds: dict[str, np.ndarray]) -> Timed:
    """Replays of a CUDA graph; inputs are uploaded once, here.

    Raises:
        GateFailed: a replay gives other outputs than the run, to the last bit: parity was measured
            on runs, and would say nothing about what is timed.
    """
    expected = runner.run(feeds)
    runner.latencies(1)
    found = runner.replayed()
    other = sorted(n for n, array in expected.items() if array.tobytes() != found[n].tobytes())
    if other:
        raise GateFailed(
            f"a CUDA graph of {runner.source.name} gives another {', '.join(other)} than a run: "
            "its speed is refused"
        )
    return lambda: Milliseconds(runner.latencies(BURST)[-1])


def _gpu_baselines(line: Line, ids: np.ndarray) -> tuple[Baselines, str]:
    from tokred_export.verify.cuda_baselines import TIMED_ON_GPU, cuda_baselines

    return cuda_baselines(line.checkpoint, torch.from_numpy(ids)), TIMED_ON_GPU


def _open_dense(folder: Path, component: str) -> TrtRunner | RemoteRunner:
    """The dense engine, which no bundle holds."""
    info = read_engines(folder)[component]
    launcher = folder / LAUNCHER_FILE
    return open_engine(folder / info.file, launcher if LAUNCHER_FILE in info.files else None)


def _full_prompts(line: Line, batch: int, length: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, line.checkpoint.spec.vocab_size, (batch, length), dtype=np.int32)


def store(folder: Path, name: str, records: object) -> None:
    """Write records as ``reports/<name>.json``, and where they were taken beside them.

    Raises:
        EnvironmentUnable: the folder cannot be written, or the disk is full.
    """
    found = msgspec.json.format(msgspec.json.encode(environment()), indent=1)
    data = msgspec.json.format(msgspec.json.encode(records), indent=1)
    with clear_disk_errors(folder, writable=True):
        (folder / "reports").mkdir(exist_ok=True)
        write_atomic(folder / "reports" / "environment.json", found)
        write_atomic(folder / "reports" / f"{name}.json", data)


def load(bundle: Bundle, name: str, kind: type) -> Sequence | None:
    """Records of ``reports/<name>.json``, or None if there are none.

    Raises:
        BundleError: the file holds something else, such as records of another version.
    """
    path = bundle.path / "reports" / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        verb = "bench" if name == "speed" else "verify"
        raise BundleError(
            f"{path} cannot be read ({error}), expected records of this version of the tool: "
            f"remove it, then measure again with `tokred-export {verb} {bundle.path}`"
        ) from error
