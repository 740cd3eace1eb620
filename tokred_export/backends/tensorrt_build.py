"""The process that builds a TensorRT engine: ``python -m ... JOB.json``.

It runs in the Python that has TensorRT, which need not be the one that exports: TensorRT 8.6 on
a JetPack machine lives in that system's Python 3.10. It needs numpy and msgspec besides, and
for a "quick" build Triton; neither torch nor onnx.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from tokred_export.backends import job
from tokred_export.backends.job import Outcome, answer, outcome_of
from tokred_export.disk import clear_disk_errors, write_atomic
from tokred_export.errors import BuildFailed, EnvironmentUnable, TokredError
from tokred_export.runtime.trt import load_launcher, load_tensorrt, release

if TYPE_CHECKING:
    import tensorrt

PLUGIN_LAYERS = ("PluginV2", "PluginV3")


class Job(job.Job, kw_only=True):
    """What the build process is asked for.

    Attributes:
        onnx: a kernel-level file, see :mod:`tokred_export.export.lower`.
        plan: the file to write.
        form: "quick" or "launcher".
        sm: compute capability of the GPU, times ten.
        launcher: the launcher plugin, for that form.
        half: weights are 16 bit: TensorRT 8.6 needs to be told that it may use them.
        wide: nodes of a 16-bit file that compute in float32, which it must be told too.
        expected: kernel -> nodes of the file; each must become a plugin layer.
        calls: one call of each plugin that the file needs, as text, for "quick".
        batches: least and most, for a graph whose batch is open.
        timing_cache: read if it is there, written at the end.
        level: builder optimisation level, 0 to 5; None for TensorRT's default.
        describe: the file to write what the inspector says to.
    """

    onnx: str
    plan: str
    form: str
    sm: int
    launcher: str | None = None
    half: bool = True
    wide: tuple[str, ...] = ()
    expected: dict[str, int]
    calls: tuple[str, ...] = ()
    batches: tuple[int, int] | None = None
    timing_cache: str | None = None
    level: int | None = None
    describe: str | None = None


def build_here(asked: Job) -> Outcome:
    """Build and check one engine in this process.

    Raises:
        BuildFailed: the file cannot be parsed or built, or a custom op became no plugin.
        EnvironmentUnable: TensorRT or the launcher plugin cannot be used.
    """
    trt = load_tensorrt()
    _register_plugins(trt, asked)
    logger = trt.Logger(trt.Logger.WARNING)
    begun = time.perf_counter()
    plan, network = _build(trt, logger, asked)
    seconds = time.perf_counter() - begun
    with clear_disk_errors(Path(asked.plan)):
        Path(asked.plan).write_bytes(plan)
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    layers = _layers(trt, logger, plan, asked)
    return Outcome(
        version=trt.__version__, layers=len(layers), layers_from="engine",
        outputs={value.name: tuple(value.shape) for value in outputs},
        plugins=check_plugins(layers, asked.expected), seconds=round(seconds, 3),
    )


def _build(
    trt: ModuleType, logger: tensorrt.ILogger, asked: Job
) -> tuple[tensorrt.IHostMemory, tensorrt.INetworkDefinition]:
    """A plan; the timing cache is read before and written after."""
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(asked.onnx):
        raise BuildFailed(_parse_error(parser.get_error(0)))
    config = _config(trt, builder, network, asked)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"TensorRT parsed {Path(asked.onnx).name} but built no engine from it")
    if asked.timing_cache is not None:
        file = Path(asked.timing_cache)
        with clear_disk_errors(file, writable=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, bytes(config.get_timing_cache().serialize()))
    return plan, network


def _register_plugins(trt: ModuleType, asked: Job) -> None:
    if asked.form == "launcher":
        load_launcher(trt, Path(asked.launcher or ""))
        return
    try:
        from tokred_plugins.quick import register
        from tokred_plugins.registry import call_from_json

        register(map(call_from_json, asked.calls), asked.sm)
    except ImportError as error:
        raise EnvironmentUnable(
            f"the quick plugins cannot be made in the Python that has TensorRT ({error}): "
            f"install {error.name or 'triton'} there"
        ) from error
    except ValueError as error:
        raise BuildFailed(f"the quick plugins cannot be registered: {error}") from error


def _layers(
    trt: ModuleType, logger: tensorrt.ILogger, plan: tensorrt.IHostMemory, asked: Job
) -> list[dict]:
    """The layers of a plan, opened here."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailed("TensorRT cannot open the plan that it has just built")
    layers = inspect(trt, engine)
    if asked.describe is not None:
        Path(asked.describe).write_text(json.dumps(layers, indent=1))
    return layers


def _network_flags(trt: ModuleType) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if release(trt.__version__) >= (10, 0):  # types are those of the file; 11 knows nothing else
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH)


def _config(
    trt: ModuleType, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, asked: Job
) -> tensorrt.IBuilderConfig:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for the inspector
    if asked.level is not None:
        config.builder_optimization_level = asked.level
    # On by default in every release, and three digits are no float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if release(trt.__version__) < (10, 0):
        # Nothing here needs cuBLAS or cuDNN, which a deployment may not have.
        config.set_tactic_sources(0)
        _weak_types(trt, network, config, asked)
    if asked.timing_cache is not None:
        file = Path(asked.timing_cache)
        known = file.read_bytes() if file.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            raise BuildFailed(f"the timing cache {file} is of another GPU or TensorRT: remove it")
    if asked.batches is not None:
        config.add_optimization_profile(job.batch_profile(builder, network, *asked.batches))
    if hasattr(trt, "IProgressMonitor"):  # 8.6 has none
        config.progress_monitor = _progress(trt)
    return config


def _weak_types(
    trt: ModuleType, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig,
    asked: Job,
) -> None:
    """TensorRT 8 picks precisions itself; hold it to those of the file.

    Types of the network's own tensors are no help: those behind a plugin count as float32 there.
    """
    if not asked.half:
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    wide = set(asked.wide)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name in wide and layer.type != trt.LayerType.CAST:
            layer.precision = trt.float32
            for i in range(layer.num_outputs):
                layer.set_output_type(i, trt.float32)


def _parse_error(error: tensorrt.ParserError) -> str:
    said = "; ".join(line for line in error.desc().splitlines() if line)
    return f"TensorRT cannot parse node {error.node()}: {said}"


def inspect(trt: ModuleType, engine: tensorrt.ICudaEngine) -> list[dict]:
    """Every layer of an engine as its inspector describes it."""
    text = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    # Names of fused layers can hold control characters.
    return json.loads(text, strict=False)["Layers"]


def check_plugins(layers: list[dict], expected: dict[str, int]) -> dict[str, int]:
    """Plugin layers by kernel; equal to what the file holds, or the build is no good.

    Raises:
        BuildFailed: a kernel's node became something else than a plugin.
    """
    # A node is called ".../<index>/<kernel>"; a layer that stands for several repeats their names.
    found = Counter(
        layer["Name"].rpartition("/")[2]
        for layer in layers if layer.get("LayerType") in PLUGIN_LAYERS
    )
    if dict(found) != expected:
        raise BuildFailed(
            f"the engine runs the plugins {dict(sorted(found.items()))}, expected "
            f"{dict(sorted(expected.items()))}: a custom op fell back to something else"
        )
    return dict(found)


def _progress(trt: ModuleType) -> tensorrt.IProgressMonitor:
    class Monitor(trt.IProgressMonitor):
        """Says which phase the builder is in."""

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            print(f"{name}: {steps} steps", flush=True)

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _main(path: str) -> int:
    """Entry of the build process: read the job, leave the outcome, return the exit status."""
    asked = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    try:
        outcome = build_here(asked)
    except TokredError as error:
        outcome = outcome_of(error)
        outcome = msgspec.structs.replace(outcome, show_log=isinstance(error, BuildFailed))
    return answer(asked, outcome)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
