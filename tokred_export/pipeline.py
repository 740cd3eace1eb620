"""The line walked by ``tokred-export build``: checkpoint to proven bundle.

    checkpoint -> schedule -> ONNX -> engine(s) -> parity -> speed -> report, in one bundle

Every stage that takes long keeps its result in the cache under the hash of all it depends on,
so a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import msgspec
from tokred_plugins.opset import OpSet

from tokred_export.backends.common import driver_version, read_engines, write_engine
from tokred_export.bundle import (
    Bundle,
    read_bundle,
    update_files,
    write_manifest,
    writing_bundle,
)
from tokred_export.cache import Cache, stage_key
from tokred_export.checkpoint import DEMO_SOURCE, Checkpoint, build_model, load_checkpoint
from tokred_export.errors import EnvironmentUnable, InvalidRequest
from tokred_export.export import OPSET, export_prefill
from tokred_export.manifest import (
    BundleSpec,
    Component,
    ComponentMetadata,
    Manifest,
    make_provenance,
    prefill_io,
)
from tokred_export.model import Mamba2
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.runtime.ort import Device, require_provider
from tokred_export.specs import Backend, BuildSpec, Dtype, ModelSpec, ReductionSchedule

Stage = Callable[[str], AbstractContextManager[None]]


@contextlib.contextmanager
def silent(name: str) -> Iterator[None]:
    """The stage reporter that reports nothing."""
    yield


class Line(NamedTuple):
    """What every stage needs: the request, the weights, the cache, and whom to tell."""

    spec: BuildSpec
    checkpoint: Checkpoint
    cache: Cache
    stage: Stage = silent


def start_line(spec: BuildSpec, cache: Cache | None = None, stage: Stage = silent) -> Line:
    """Check the request and load the checkpoint.

    Raises:
        InvalidRequest, CheckpointError, EnvironmentUnable: as :func:`load_checkpoint`, and for
            requests no backend can serve.
    """
    _check_request(spec)
    with stage("load checkpoint"):
        checkpoint = load_checkpoint(spec.model, spec.revision)
    return Line(spec, checkpoint, cache or Cache(), stage)


def _check_request(spec: BuildSpec) -> None:
    if not spec.seq_lens or not spec.backends:
        raise InvalidRequest("nothing to build: name at least one --seq-len and one --backend")
    if len(set(spec.seq_lens)) != len(spec.seq_lens):
        raise InvalidRequest(f"--seq-len {spec.seq_lens} names a length twice: name each once")
    if spec.max_batch < 1:
        raise InvalidRequest(f"--max-batch is {spec.max_batch}, expected at least 1")
    on_cpu = "onnxruntime" in spec.backends and spec.device == "cpu"
    if spec.tensor_dtype == "bfloat16" and on_cpu:
        raise InvalidRequest(
            "ONNX Runtime's CPU provider lacks most bfloat16 kernels: "
            "build with --dtype float32, or for another --backend"
        )
    if "onnxruntime" in spec.backends:
        require_provider(spec.device)  # before the work, not after it
    if "tensorrt" in spec.backends:
        from tokred_export.backends import tensorrt

        tensorrt.require()
    if "tensorrt-rtx" in spec.backends:
        from tokred_export.backends import tensorrt_rtx

        found = tensorrt_rtx.available()
        if not found.can_build:
            raise EnvironmentUnable(f"the backend tensorrt-rtx cannot build here: {found.reason}")


def component_name(length: int) -> str:
    """The component of a prefill graph of ``length`` tokens."""
    return f"prefill-{length}"


def schedules(line: Line) -> dict[int, ReductionSchedule]:
    """The solved schedule of each length, shortest first."""
    spec = line.spec
    return {
        length: solve_schedule(line.checkpoint.spec, spec.reduction, length)
        for length in sorted(spec.seq_lens)
    }


def eager(
    line: Line,
    schedule: ReductionSchedule | None,
    dtype: Dtype | None = None,
    ops: OpSet | None = None,
) -> Mamba2:
    """The eager model that an export traces and a proof compares with.

    Its scan runs in the chunks of the exported one.

    Args:
        line: whose checkpoint.
        schedule: of the model; None is the dense one.
        dtype: of its weights; None for the export's.
        ops: what it runs; None for the custom ops, which an export needs.
    """
    chunked = msgspec.structs.replace(line.checkpoint.spec, chunk_size=line.spec.chunk_size)
    checkpoint = msgspec.structs.replace(line.checkpoint, spec=chunked)
    return build_model(
        checkpoint, schedule, dtype=dtype or line.spec.tensor_dtype, ops=ops,
        logits=line.spec.logits,
    )


def export(line: Line, schedule: ReductionSchedule) -> Path:
    """The ONNX file of one length, in the cache."""
    spec = line.spec
    name = component_name(schedule.length)
    what = name if schedule.sites else f"{name} dense"
    key = stage_key(
        stage="export", weights=line.checkpoint.weights_sha256, model=line.checkpoint.spec,
        schedule=schedule, dtype=spec.tensor_dtype, max_batch=spec.max_batch,
        logits=spec.logits, chunk_size=spec.chunk_size, opset=OPSET,
    )  # fmt: skip

    def make(folder: Path) -> None:
        model = eager(line, schedule)
        export_prefill(model, schedule.length, spec.max_batch, folder / f"{name}.onnx")

    with line.stage(f"export {what}"):
        return line.cache.get_or_make(key, make) / f"{name}.onnx"


def engine(line: Line, backend: Backend, onnx_path: Path) -> Path:
    """The folder of one engine, in the cache; its name is the one it has in a bundle."""
    build, folder_name = _builder(line, backend)
    key = stage_key(stage="engine", backend=backend, onnx=onnx_path.parent.parent.name,
                    max_batch=line.spec.max_batch, folder=folder_name,
                    opt_level=line.spec.opt_level, **_surroundings(backend))  # fmt: skip

    def make(folder: Path) -> None:
        build(onnx_path, folder / folder_name)

    with line.stage(f"build {backend} {onnx_path.stem}"):
        return line.cache.get_or_make(key, make) / folder_name


def _surroundings(backend: Backend) -> dict[str, str | int | None]:
    """What decides an engine and is neither this package's code nor a library's: the launcher
    plugin, by its hash, the GPU whose timings chose the kernels, and the driver's CUDA version, for
    kernels are PTX, of which an older driver reads less."""
    if backend != "tensorrt":
        return {}
    from tokred_export.backends import tensorrt

    return {
        "launcher": tensorrt.launcher_digest(), "gpu": tensorrt.list_gpus()[0].name,
        "driver": driver_version(),
    }


def _builder(line: Line, backend: Backend) -> tuple[Callable[[Path, Path], object], str]:
    """(onnx, folder) -> build there, and the folder's name."""
    if backend == "onnxruntime":
        from tokred_export.backends import onnxruntime

        device = line.spec.device

        def optimise(onnx_path: Path, folder: Path) -> object:
            return onnxruntime.build(onnx_path, folder, provider=device)

        return optimise, onnxruntime.folder_name(device)
    if backend == "tensorrt":
        from tokred_export.backends import tensorrt

        spec = line.spec

        def compile_kernels(onnx_path: Path, folder: Path) -> object:
            return tensorrt.build(
                onnx_path, folder, max_batch=spec.max_batch, level=spec.opt_level
            )

        return compile_kernels, tensorrt.folder_name()
    from tokred_export.backends import tensorrt_rtx

    def build(onnx_path: Path, folder: Path) -> object:
        return tensorrt_rtx.build(onnx_path, folder, max_batch=line.spec.max_batch)

    return build, tensorrt_rtx.folder_name()


@contextlib.contextmanager
def assembling(line: Line, out: Path, command: str, force: bool = False) -> Iterator[Bundle]:
    """Export and build everything, and give the bundle while it still has a temporary name.

    What the block adds below ``reports/`` becomes part of it; all else must stay as it is, and
    keeps its hash. It appears at ``out`` when the block ends without an error.

    Raises:
        TokredError: of every kind; ``out`` then stays as it was.
    """
    spec, plan = line.spec, schedules(line)
    with writing_bundle(out, force) as folder:
        exported = [export(line, schedule) for schedule in plan.values()]
        engines = [engine(line, b, path) for path in exported for b in spec.backends]
        with line.stage("copy and hash files"):
            for name, source in line.checkpoint.files.items():
                shutil.copyfile(source, folder / name)
            for file in (f for path in exported for f in sorted(path.parent.iterdir())):
                shutil.copyfile(file, folder / file.name)
            for source in engines:
                _add_engine(source, folder / "engines")
            write_manifest(folder, _manifest(line, plan, command))
        yield read_bundle(folder)
        with line.stage("write bundle"):
            update_files(folder)


def line_of_bundle(
    bundle: Bundle,
    model: str | None = None,
    cache: Cache | None = None,
    stage: Stage = silent,
    device: Device = "cpu",
    backend: Backend = "onnxruntime",
) -> Line:
    """The line that made a bundle, to compare the bundle with what it was made from.

    Args:
        bundle: read from disk.
        model: where the checkpoint is now, if not where the bundle says.
        device: that ONNX Runtime runs the bundle on.
        backend: that runs it.

    Raises:
        InvalidRequest: the checkpoint is gone, or has other weights or another config than the
            bundle's.
        TokredError: as :func:`start_line`.
    """
    manifest = bundle.manifest
    first = next(iter(manifest.components.values())).metadata
    made_from = manifest.provenance
    source = None if made_from.model_source == DEMO_SOURCE else made_from.model_source
    spec = BuildSpec(
        model=model or source,
        revision=None if model else made_from.revision,
        seq_lens=tuple(manifest.spec.schedules),
        reduction=manifest.spec.reduction,
        max_batch=first.max_batch,
        dtype=first.dtype,
        logits=first.logits,
        chunk_size=first.chunk_size,
        backends=(backend,),
        device=device,
    )
    if model is None and Path(source or "").is_absolute() and not Path(source).is_dir():
        raise InvalidRequest(
            f"the bundle was built from {source}, which is not there any more: name the folder "
            "where the checkpoint is now with --model"
        )
    line = start_line(spec, cache, stage)
    if line.checkpoint.weights_sha256 != made_from.weights_sha256:
        raise InvalidRequest(
            f"{spec.model or 'the demo model'} has other weights than the bundle was built from "
            f"({line.checkpoint.weights_sha256[:12]}, expected {made_from.weights_sha256[:12]}): "
            "name the right checkpoint with --model"
        )
    if line.checkpoint.spec != manifest.spec.model:
        raise InvalidRequest(
            f"{spec.model or 'the demo model'} has the bundle's weights, but its config.json says "
            f"{_differences(line.checkpoint.spec, manifest.spec.model)}: restore it, or build the "
            "bundle again"
        )
    return line


def _differences(found: ModelSpec, expected: ModelSpec) -> str:
    """The fields in which two specs differ, in words."""
    fields = ((f, getattr(found, f), getattr(expected, f)) for f in ModelSpec.__struct_fields__)
    return ", ".join(f"{name} {now}, expected {then}" for name, now, then in fields if now != then)


def _add_engine(source: Path, engines: Path) -> None:
    """Copy one component's engine into the bundle's folder of its backend."""
    target = engines / source.name
    target.mkdir(parents=True, exist_ok=True)
    for info in read_engines(source).values():
        for name in info.files:
            shutil.copyfile(source / name, target / name)
        write_engine(target, info)


def _manifest(line: Line, plan: dict[int, ReductionSchedule], command: str) -> Manifest:
    spec, checkpoint = line.spec, line.checkpoint
    components, io = {}, {}
    for length, schedule in plan.items():
        name = component_name(length)
        components[name] = Component(
            file=f"{name}.onnx",
            metadata=ComponentMetadata(
                phase="prefill", seq_len=length, length_out=schedule.length_out,
                max_batch=spec.max_batch, dynamic_batch=spec.max_batch > 1,
                dtype=spec.tensor_dtype, logits=spec.logits, opset=OPSET,
                chunk_size=spec.chunk_size,
                sites=tuple(site.layer for site in schedule.sites),
            ),
        )  # fmt: skip
        io[name] = prefill_io(checkpoint.spec.n_layer, len(schedule.sites))
    return Manifest(
        components=components,
        spec=BundleSpec(model=checkpoint.spec, reduction=spec.reduction, schedules=plan),
        io=io,
        provenance=make_provenance(
            checkpoint.source, checkpoint.weights_sha256, command, checkpoint.revision
        ),
    )
