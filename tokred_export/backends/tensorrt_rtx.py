"""TensorRT for RTX: builds a plan anywhere, GPU or not, from an inlined ONNX file.

The build runs in a process of its own (`python -m tokred_export.backends.tensorrt_rtx JOB.json`),
for the parser ends its process on some graphs instead of reporting an error. Nothing is timed
while building: kernels are chosen on the user's GPU at the first start.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from tokred_export.backends import job
from tokred_export.backends.common import (
    Availability,
    EngineInfo,
    engine_folder,
    list_gpus,
    processor_name,
    write_engine,
)
from tokred_export.backends.graph import (
    Shapes,
    compare_shapes,
    declared_shapes,
    fill_open_sizes,
    hash_sources,
    infer_shapes,
    inline_functions,
    load_graph,
    ort_shapes,
    save_with_data,
    without_shapes,
)
from tokred_export.backends.job import Outcome, answer, outcome_of
from tokred_export.disk import clear_disk_errors
from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest, TokredError

if TYPE_CHECKING:
    import onnx
    import tensorrt_rtx

NAME = "tensorrt-rtx"
SUPPORTED = (75, 80, 86, 89, 120, 121)  # compute capabilities the library builds for
DEFAULT_TARGETS = (80, 86, 89, 120)
_MODULE = "tokred_export.backends.tensorrt_rtx"


class Job(job.Job, kw_only=True):
    """What the build process is asked for."""

    onnx: str
    plan: str
    targets: tuple[int, ...]
    batches: tuple[int, int] | None  # least and most, for a graph whose batch is open
    inspect: bool  # a supported GPU is here, so the plan can be opened


def available() -> Availability:
    """Whether TensorRT-RTX is installed, and whether a GPU that it supports is here."""
    try:
        version = _load().__version__
    except EnvironmentUnable as error:
        return Availability(can_build=False, can_run=False, reason=str(error))
    can_run, reason = _can_run_here()
    return Availability(can_build=True, can_run=can_run, reason=reason, version=version)


def folder_name(targets: Sequence[int] = DEFAULT_TARGETS) -> str:
    """The folder below ``engines/`` for engines that are built here."""
    return engine_folder(NAME, _target(targets), _load().__version__)


def build(
    onnx_path: Path,
    out_dir: Path,
    *,
    targets: Sequence[int] = DEFAULT_TARGETS,
    max_batch: int | None = None,
) -> EngineInfo:
    """Build ``<component>.plan`` in ``out_dir`` and describe it in ``engine.json``.

    The file's functions are inlined first. The outputs' shapes must be the same to onnx (inlined),
    to TensorRT-RTX (inlined) and to ONNX Runtime (the file as it is).

    Args:
        onnx_path: the graph; its name without suffix becomes the engine's component.
        out_dir: gets the plan and ``engine.json``.
        targets: compute capabilities, 86 for 8.6.
        max_batch: for a graph whose batch is open, the largest batch of the plan's profile.

    Raises:
        InvalidRequest: no such file, an unknown target, or an open batch without ``max_batch``.
        EnvironmentUnable: TensorRT-RTX or onnxruntime is not installed, or the disk is full.
        BuildFailed: the graph cannot be inlined, parsed or built, or shapes disagree.
    """
    _check_targets(targets)
    if util.find_spec("tensorrt_rtx") is None:
        raise EnvironmentUnable(_NOT_INSTALLED)
    graph = load_graph(onnx_path)
    sources = hash_sources(onnx_path, graph)
    batches = _batches(graph, max_batch)
    can_run, reason = _can_run_here()
    started = time.perf_counter()
    plan = out_dir / f"{onnx_path.stem}.plan"
    with clear_disk_errors(out_dir, writable=True):
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".inline-", dir=out_dir) as folder:
            plain, inlined = Path(folder, "plain.onnx"), Path(folder, "inlined.onnx")
            save_with_data(without_shapes(graph), onnx_path, plain)
            save_with_data(without_shapes(inline_functions(graph)), onnx_path, inlined)
            expected = _agreed_shapes(graph, plain, inlined)
            asked = Job(
                onnx=str(inlined),
                plan=str(Path(folder, plan.name)),
                outcome=str(Path(folder, "outcome.json")),
                targets=tuple(targets),
                batches=batches,
                inspect=can_run,
            )
            outcome = run_job(asked)
            compare_shapes("TensorRT-RTX", outcome.outputs, "ONNX Runtime", expected)
            os.replace(asked.plan, plan)
        info = EngineInfo(
            backend=NAME,
            version=outcome.version,
            component=onnx_path.stem,
            file=plan.name,
            files=(plan.name,),
            target=_target(targets),
            machine=platform.machine(),
            processor=processor_name(),
            onnx_files=sources,
            seconds=round(time.perf_counter() - started, 3),
            bytes=plan.stat().st_size,
            layers=outcome.layers,
            layers_from=outcome.layers_from,
            options={"dynamic_batch": batches is not None, "max_batch": max_batch},
            can_run_here=can_run,
            reason=reason,
        )
        write_engine(out_dir, info)
    return info


def _agreed_shapes(graph: onnx.ModelProto, plain: Path, inlined: Path) -> Shapes:
    """Output shapes that ONNX Runtime, onnx (functions inlined) and the file agree on."""
    expected, declared = ort_shapes(plain), declared_shapes(graph)
    compare_shapes("the file", declared, "ONNX Runtime", expected)
    expected = fill_open_sizes(expected, declared)
    compare_shapes("the inlined file", infer_shapes(inlined), "ONNX Runtime", expected)
    return expected


def run_job(asked: Job, command: Sequence[str] = (sys.executable, "-m", _MODULE)) -> Outcome:
    """Run one build in a process of its own, see :func:`tokred_export.backends.job.run_job`."""
    return job.run_job(asked, command, "TensorRT-RTX", NAME)


_NOT_INSTALLED = (
    "TensorRT-RTX is not installed, expected the package tensorrt_rtx: "
    "`pip install tensorrt-rtx-cu13` (x86-64 Linux or Windows)"
)


def _load() -> ModuleType:
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        raise EnvironmentUnable(_NOT_INSTALLED) from error
    except (ImportError, OSError) as error:
        raise EnvironmentUnable(
            f"TensorRT-RTX is installed but does not load ({error}): install it again"
        ) from error


def _can_run_here() -> tuple[bool, str]:
    """Whether a GPU is here that runs such engines, and the sentence that says so."""
    known = ", ".join(f"{sm / 10:.1f}" for sm in SUPPORTED)
    gpus = list_gpus()
    seen = ", ".join(f"{gpu.name} ({gpu.sm / 10:.1f})" for gpu in gpus) or "no GPU"
    if any(gpu.sm in SUPPORTED for gpu in gpus):
        return True, f"this machine can run it: it has {seen}"
    return False, (
        f"this machine can build engines but cannot run them: it has {seen}, and TensorRT-RTX "
        f"needs compute capability {known}"
    )


def _check_targets(targets: Sequence[int]) -> None:
    if not targets or not set(targets) <= set(SUPPORTED):
        raise InvalidRequest(
            f"TensorRT-RTX cannot build for {list(targets)}, expected some of {list(SUPPORTED)}: "
            "for other GPUs, such as H100 and H200 (90), use the backend tensorrt"
        )


def _target(targets: Sequence[int]) -> str:
    return "+".join(f"sm{sm}" for sm in targets)


def _build_here(asked: Job) -> Outcome:
    """The build itself, in the process of its own."""
    trt = _load()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(asked.onnx):
        raise BuildFailed(_parse_error(parser.get_error(0)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for the inspector
    config.num_compute_capabilities = len(asked.targets)
    for index, sm in enumerate(asked.targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    if asked.batches is not None:
        config.add_optimization_profile(job.batch_profile(builder, network, *asked.batches))
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    outcome = Outcome(
        version=trt.__version__,
        layers=network.num_layers,
        outputs={value.name: tuple(value.shape) for value in outputs},
    )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return _no_engine("TensorRT-RTX parsed the graph but built no engine from it")
    with clear_disk_errors(Path(asked.plan)):
        Path(asked.plan).write_bytes(plan)
    return _count_engine_layers(trt, logger, plan, outcome) if asked.inspect else outcome


def _parse_error(error: tensorrt_rtx.ParserError) -> str:
    lines = [line for line in error.desc().splitlines() if line and not line.startswith("[")]
    code = str(error.code()).rpartition(".")[2]
    return (
        f"TensorRT-RTX cannot parse node {error.node_name() or error.node()!r} "
        f"({error.node_operator()}): {code}, {'; '.join(lines)}: export with ops that it supports"
    )


def _batches(graph: onnx.ModelProto, max_batch: int | None) -> tuple[int, int] | None:
    """The least and the largest batch of a graph whose batch is open, else None."""
    is_open = False
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims[1:]):
            raise BuildFailed(
                f"input {value.name} has an open size besides its batch, expected fixed ones: "
                "export with a fixed length"
            )
        is_open = is_open or not all(dim.HasField("dim_value") for dim in dims[:1])
    if is_open and (max_batch is None or max_batch < 1):
        raise InvalidRequest(
            f"the graph's batch is open and the largest one is {max_batch}, expected 1 or more: "
            "give --max-batch"
        )
    return (1, max_batch) if is_open else None


def _no_engine(what: str) -> Outcome:
    return Outcome(error=what, exit_code=BuildFailed.exit_code, show_log=True)


def _count_engine_layers(
    trt: ModuleType,
    logger: tensorrt_rtx.ILogger,
    plan: tensorrt_rtx.IHostMemory,
    outcome: Outcome,
) -> Outcome:
    """Open the plan on this machine's GPU and count the layers that it really has."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return _no_engine("TensorRT-RTX cannot open the plan that it has just built")
    text = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    layers = json.loads(text)["Layers"]
    return msgspec.structs.replace(outcome, layers=len(layers), layers_from="engine")


def _main(path: str) -> int:
    """Entry of the build process: read the job, leave the outcome, return the exit status."""
    asked = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    try:
        outcome = _build_here(asked)
    except TokredError as error:
        outcome = outcome_of(error)
    return answer(asked, outcome)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
