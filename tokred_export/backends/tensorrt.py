"""TensorRT 8.6 to 11 with our kernels as plugins: builds on the GPU that will run the engine.

    ONNX -> kernel-level ONNX (lower) -> build process -> plan, checked by the engine inspector

From 10.15 on the kernels are quick plugins inside the plan; before, the launcher plugin carries
them (its library is put beside the plan). The build runs in a process of its own, in the Python
that ``TOKRED_TENSORRT_PYTHON`` names, or else in this one.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from tokred_plugins.aot import DESCRIPTORS_DRIVER, PTX_VERSIONS

from tokred_export.backends.common import (
    Availability,
    EngineInfo,
    Gpu,
    driver_version,
    engine_folder,
    list_gpus,
    processor_name,
    write_engine,
)
from tokred_export.backends.graph import compare_shapes, declared_shapes, hash_sources, load_graph
from tokred_export.backends.job import Outcome, run_job
from tokred_export.backends.tensorrt_build import Job
from tokred_export.cache import default_root
from tokred_export.disk import clear_disk_errors, hash_file
from tokred_export.errors import EnvironmentUnable, InvalidRequest
from tokred_export.runtime import tensorrt_python as python
from tokred_export.runtime.device import Device
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE
from tokred_export.runtime.trt import launcher_misfit, release

NAME = "tensorrt"
_log = logging.getLogger(__name__)
QUICK_SINCE = (10, 15)
OLDEST = (8, 6)
_MODULE = "tokred_export.backends.tensorrt_build"


def form_of(version: str) -> str:
    """How plugins reach this TensorRT: "quick" or "launcher"."""
    return "quick" if release(version) >= QUICK_SINCE else "launcher"


def launcher_path() -> Path:
    """Where the launcher plugin is: ``TOKRED_LAUNCHER``, or what CMake makes in the source."""
    named = os.environ.get("TOKRED_LAUNCHER")
    if named:
        return Path(named)
    return Path(__file__).parents[2] / "plugins" / "launcher" / "build" / LAUNCHER_FILE


def available() -> Availability:
    """Whether TensorRT is installed and can build here, and in plain words why or why not."""
    version, gpus = python.installed_version(), list_gpus()
    reason = _obstacle(version, gpus)
    usable = reason is None
    if usable:
        how = "quick plugins" if form_of(version) == "quick" else "the launcher plugin"
        reason = f"{gpus[0].name} ({gpus[0].sm / 10:.1f}), kernels as {how}"
    return Availability(can_build=usable, can_run=usable, reason=reason, version=version)


def _obstacle(version: str | None, gpus: Sequence[Gpu]) -> str | None:
    """Why nothing can be built here, if so."""
    if version is None:
        return python.missing()
    if release(version) < OLDEST:
        return f"TensorRT {version} is too old, expected 8.6 or newer"
    if not gpus:
        return "there is no NVIDIA GPU here, and TensorRT builds on the GPU that runs the engine"
    if gpus[0].sm not in PTX_VERSIONS:
        known = ", ".join(str(sm / 10) for sm in PTX_VERSIONS)
        return (
            f"there are no kernels for {gpus[0].name}, which has compute capability "
            f"{gpus[0].sm / 10}, expected one of {known}"
        )
    if form_of(version) == "quick":
        return None
    if not launcher_path().is_file():
        return (
            f"TensorRT {version} takes the kernels through the launcher plugin, and there is none "
            f"at {launcher_path()}: build plugins/launcher with CMake, or name it in "
            "TOKRED_LAUNCHER"
        )
    return launcher_misfit(launcher_path(), version)


def require() -> str:
    """TensorRT's version, where it can build here.

    Raises:
        EnvironmentUnable: it cannot, and why.
    """
    found = available()
    if not found.can_build:
        raise EnvironmentUnable(f"the backend {NAME} cannot build here: {found.reason}")
    return found.version


def launcher_digest() -> str | None:
    """Hex sha256 of the launcher plugin that goes into engines built here, if one does."""
    if form_of(require()) == "quick":
        return None
    return hash_file(launcher_path()).sha256


def folder_name() -> str:
    """The folder below ``engines/`` for engines that are built here."""
    version = require()
    return engine_folder(NAME, f"sm{list_gpus()[0].sm}", version)


def timing_cache_path() -> Path:
    """Where timings of this TensorRT on this kind of GPU are kept between builds."""
    version = require()
    name = "".join(c if c.isalnum() else "-" for c in list_gpus()[0].name.lower())
    return default_root() / "timing" / f"tensorrt-{version}-{name}.cache"


def build(
    onnx_path: Path,
    out_dir: Path,
    *,
    max_batch: int = 1,
    level: int | None = None,
    timing_cache: Path | None = None,
) -> EngineInfo:
    """Build ``<component>.plan`` in ``out_dir`` and describe it in ``engine.json``.

    Args:
        onnx_path: an exported file; its name without suffix becomes the engine's component.
        out_dir: gets the plan, the launcher plugin where it is needed, and ``engine.json``.
        max_batch: the largest batch of an open one; block sizes and timings are for it.
        level: builder optimisation level, 0 to 5; None for TensorRT's default.
        timing_cache: file to keep timings in, tactics of our products beside it; None for the
            one of this machine.

    Raises:
        InvalidRequest: no such file, or a bfloat16 file for a TensorRT without bfloat16.
        EnvironmentUnable: TensorRT, a GPU, Triton or the launcher plugin is missing.
        BuildFailed: the graph cannot be lowered, parsed or built, or lost a plugin.
    """
    version = require()
    graph = load_graph(onnx_path)
    half = _check_dtype(graph, version)
    sources = hash_sources(onnx_path, graph)
    sm = list_gpus()[0].sm
    form = form_of(version)
    started = time.perf_counter()
    plan = out_dir / f"{onnx_path.stem}.plan"
    with clear_disk_errors(out_dir, writable=True):
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=out_dir) as name:
            folder = Path(name)
            lowered = folder / "kernels.onnx"
            timings = timing_cache or timing_cache_path()
            expected = _lower(onnx_path, lowered, form, sm, max_batch, timings)
            outcome = _run(Job(
                onnx=str(lowered), plan=str(folder / plan.name),
                outcome=str(folder / "outcome.json"), form=form, sm=sm,
                launcher=str(launcher_path()) if form == "launcher" else None,
                half=half, wide=wide_nodes(lowered) if half else (), expected=dict(expected),
                calls=_calls(lowered) if form == "quick" else (),
                batches=(1, max_batch) if _is_open(graph) else None,
                timing_cache=str(timings), level=level,
                describe=str(folder / "layers.json"),
            ))
            compare_shapes(
                "TensorRT", _open(outcome), "the file", declared_shapes(graph)
            )
            os.replace(folder / plan.name, plan)
            os.replace(folder / "layers.json", out_dir / f"{onnx_path.stem}.layers.json")
        files = [plan.name, f"{onnx_path.stem}.layers.json"]
        if form == "launcher":
            shutil.copyfile(launcher_path(), out_dir / LAUNCHER_FILE)
            files.append(LAUNCHER_FILE)
        info = EngineInfo(
            backend=NAME, version=version, component=onnx_path.stem, file=plan.name,
            files=tuple(files), target=f"sm{sm}", machine=platform.machine(),
            processor=processor_name(), onnx_files=sources,
            seconds=round(time.perf_counter() - started, 3),
            bytes=sum((out_dir / file).stat().st_size for file in files),
            layers=outcome.layers, layers_from=outcome.layers_from,
            options={
                "form": form, "max_batch": max_batch, "level": level,
                "builder_seconds": outcome.seconds, "gpu": list_gpus()[0].name,
                "plugins": sum(outcome.plugins.values()),
                **{f"plugins.{kernel}": n for kernel, n in sorted(outcome.plugins.items())},
            },
            can_run_here=True, reason="it was built and opened here",
        )
        write_engine(out_dir, info)
    return info


def _lower(
    source: Path, target: Path, form: str, sm: int, batch: int, timings: Path
) -> Counter[str]:
    """Write the kernel-level file; the launcher form's products are tuned on this GPU.

    What is found is kept beside TensorRT's own timings.
    """
    from tokred_export.export.lower import lower

    processors, driver = _multiprocessors(), driver_version()
    if form == "quick":  # TensorRT tunes these itself
        return lower(source, target, form, sm, batch, multiprocessors=processors)
    from tokred_export.backends.tune import Tuner

    tuner = Tuner(sm, timings.with_suffix(".tactics.json"), processors, driver)
    descriptors = driver is not None and driver >= DESCRIPTORS_DRIVER
    try:
        return lower(source, target, form, sm, batch, tuner.best, processors, descriptors)
    finally:
        tuner.close()


def _multiprocessors() -> int | None:
    """Of the GPU; None, said in the log, where this Python cannot ask it."""
    try:
        device = Device()
    except EnvironmentUnable as error:  # TensorRT's own Python may be the only one that can
        _log.warning("work is split as for a large GPU, for this one cannot be asked: %s", error)
        return None
    try:
        return device.multiprocessors
    finally:
        device.destroy_stream()


def _calls(lowered: Path) -> tuple[str, ...]:
    """One call of each plugin, so that who registers them need not read the file."""
    from tokred_plugins.quick_file import read_calls
    from tokred_plugins.registry import call_to_json

    return tuple(call_to_json(calls[0]) for calls in read_calls(lowered).values())


def _run(asked: Job) -> Outcome:
    return run_job(
        asked, (python.interpreter(), "-m", _MODULE), "TensorRT", NAME, python.environment()
    )


def _check_dtype(graph: onnx.ModelProto, version: str) -> bool:
    """Whether the graph's weights are 16 bit."""
    kinds = Counter(tensor.data_type for tensor in graph.graph.initializer)
    if kinds[onnx.TensorProto.BFLOAT16] and release(version) < (9, 0):
        raise InvalidRequest(
            f"TensorRT {version} has no bfloat16: build with --dtype float16"
        )
    return kinds[onnx.TensorProto.FLOAT16] > 0


def wide_nodes(lowered: Path) -> tuple[str, ...]:
    """Names of the standard-op nodes whose results are all float32."""
    model = ir.load(lowered)
    return tuple(
        node.name for node in model.graph
        if not node.domain and {value.dtype for value in node.outputs} == {ir.DataType.FLOAT}
    )


def _is_open(graph: onnx.ModelProto) -> bool:
    dims = [dim for value in graph.graph.input for dim in value.type.tensor_type.shape.dim]
    return not all(dim.HasField("dim_value") for dim in dims)


def _open(outcome: Outcome) -> dict[str, tuple[int | None, ...]]:
    """Output shapes with None for an open size."""
    return {
        name: tuple(n if n >= 0 else None for n in shape)
        for name, shape in outcome.outputs.items()
    }
