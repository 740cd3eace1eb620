"""From a component of a bundle to something that runs it, checked before use."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from tokred_export.backends.common import ENGINE_FILE, EngineInfo, list_gpus, read_engines
from tokred_export.bundle import Bundle, rebuild_hint
from tokred_export.errors import BundleError, InvalidRequest
from tokred_export.runtime import tensorrt_python
from tokred_export.runtime.ort import Device, OrtRunner, load_onnxruntime, open_session
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE
from tokred_export.specs import Backend

if TYPE_CHECKING:
    import numpy as np

EngineUse = Literal["auto", "require", "ignore"]

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs one graph. What implements it knows nothing of prompts, buckets or states."""

    source: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once on inputs by name; return every output by name."""
        ...


def open_runner(
    bundle: Bundle,
    component: str,
    backend: str = "onnxruntime",
    device: Device = "cpu",
    threads: int | None = None,
    engine: EngineUse = "auto",
) -> Runner:
    """Open one component with one backend. Files are not hashed here.

    ONNX Runtime can run a component's ONNX file itself. With ``engine="auto"`` it takes the
    bundle's optimised copy where there is one that fits, and says in the log if one does not;
    "require" makes that an error, "ignore" never looks.

    Raises:
        InvalidRequest: no such component or backend.
        BundleError: no engine fits (``require``), or the graph lacks a name of the I/O map.
        EnvironmentUnable: the backend or device is missing here.
        BuildFailed: the backend does not accept the file.
    """
    if component not in bundle.manifest.components:
        known = ", ".join(sorted(bundle.manifest.components))
        raise InvalidRequest(f"the bundle has no component {component!r}: name one of {known}")
    if backend == "tensorrt":
        runner = _open_tensorrt(bundle, component)
        _check_names(bundle, component, runner)
        return runner
    if backend != "onnxruntime":
        raise InvalidRequest(
            f"no runner for the backend {backend!r}, expected onnxruntime or tensorrt: run its "
            "engines with that backend's own tools"
        )
    if engine not in get_args(EngineUse):
        raise InvalidRequest(f"engine={engine!r}, expected one of {', '.join(get_args(EngineUse))}")
    if threads is not None and threads < 1:
        raise InvalidRequest(f"threads={threads}, expected at least 1, or None for all")
    path = bundle.path / bundle.manifest.components[component].file
    if engine != "ignore":
        path = _find_engine(bundle, component, device, engine) or path
    runner = OrtRunner(open_session(path, device, threads), path)
    _check_names(bundle, component, runner)
    return runner


def close(runner: Runner) -> None:
    """Give a runner's memory and process back where it holds any."""
    if hasattr(runner, "close"):
        runner.close()


def engine_folders(bundle: Bundle, backend: str) -> list[str]:
    """Folders of the bundle that hold engines of ``backend``, as the manifest lists them."""
    names = (name.rpartition("/") for name in bundle.manifest.files)
    folders = sorted(folder for folder, _, file in names if file == ENGINE_FILE)
    return [folder for folder in folders if _backend_of(folder) == backend]


def _backend_of(folder: str) -> str | None:
    """The backend that a folder below ``engines/`` is named for; one name begins with another."""
    known = sorted(get_args(Backend), key=len, reverse=True)
    return next((name for name in known if folder.startswith(f"engines/{name}-")), None)


def engine_misfit(info: EngineInfo, bundle: Bundle, version: str, device: str) -> str | None:
    """Why an engine must not be used here, as a clause, or None if it fits."""
    hashes = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    if info.version != version:
        return f"was made by {info.backend} {info.version}, and this is {version}"
    if info.target != device:
        return f"was made for {info.target}, and this is {device}"
    if info.machine != platform.machine():
        return f"was made for {info.machine}, and this is {platform.machine()}"
    if any(hashes.get(name) != digest for name, digest in info.onnx_files.items()):
        return "was made from another version of the ONNX file"
    return None


def _engine_file(bundle: Bundle, folder: str, info: EngineInfo) -> Path:
    """The file to load, which like all of the engine must be one that the manifest vouches for."""
    for name in (info.file, *info.files):
        if f"{folder}/{name}" not in bundle.manifest.files:
            raise BundleError(
                f"{folder}/{ENGINE_FILE} names the file {name!r}, which the bundle does not list: "
                f"do not use it; {rebuild_hint(bundle.manifest)}"
            )
    return bundle.path / folder / info.file


def _find_engine(
    bundle: Bundle, component: str, device: Device, engine: EngineUse
) -> Path | None:
    """The file of a fitting engine; None, said in the log, or an error if there is none."""
    version = load_onnxruntime().__version__
    misfits = []
    for folder in engine_folders(bundle, "onnxruntime"):
        info = read_engines(bundle.path / folder).get(component)
        if info is None:
            continue
        misfit = engine_misfit(info, bundle, version, device)
        if misfit is None:
            return _engine_file(bundle, folder, info)
        misfits.append(f"{folder} {misfit}")
    found = "; ".join(misfits) or f"the bundle has none for {component}"
    if engine == "require":
        raise BundleError(
            f"no onnxruntime engine fits here: {found}; expected one for onnxruntime {version} "
            f"on {device}: on this machine, {rebuild_hint(bundle.manifest)}"
        )
    if misfits:
        _log.warning(
            "no onnxruntime engine fits here, so the ONNX file itself is run and optimised at "
            "every start: %s; to avoid that, on this machine, %s",
            found, rebuild_hint(bundle.manifest),
        )  # fmt: skip
    return None


def _open_tensorrt(bundle: Bundle, component: str) -> Runner:
    """The TensorRT engine of a component: here, or in the Python that has TensorRT.

    Raises:
        BundleError: the bundle has no engine that fits this machine.
        EnvironmentUnable: TensorRT or a GPU is missing.
    """
    version = tensorrt_python.require_version()
    gpu = next(iter(list_gpus()), None)
    target = f"sm{gpu.sm}" if gpu else "no GPU"
    misfits = []
    for folder in engine_folders(bundle, "tensorrt"):
        info = read_engines(bundle.path / folder).get(component)
        if info is None:
            continue
        misfit = engine_misfit(info, bundle, version, target)
        if misfit is None:
            tuned_on = info.options.get("gpu")
            if gpu is not None and tuned_on not in (None, gpu.name):
                _log.warning(
                    "%s was tuned on an %s, and this is an %s: it runs, and may be slower than "
                    "one made here; for that, %s",
                    folder, tuned_on, gpu.name, rebuild_hint(bundle.manifest),
                )  # fmt: skip
            plan = _engine_file(bundle, folder, info)
            launcher = plan.with_name(LAUNCHER_FILE)
            return tensorrt_python.open_engine(
                plan, launcher if LAUNCHER_FILE in info.files else None
            )
        misfits.append(f"{folder} {misfit}")
    found = "; ".join(misfits) or f"the bundle has none for {component}"
    raise BundleError(
        f"no TensorRT engine fits here: {found}; expected one for TensorRT {version} on {target}: "
        f"on this machine, {rebuild_hint(bundle.manifest)}"
    )


def _check_names(bundle: Bundle, component: str, runner: Runner) -> None:
    """Raise unless the graph has every name that the I/O map promises."""
    io = bundle.manifest.io[component]
    for kind, promised, found in (
        ("input", io.inputs, runner.input_names),
        ("output", io.outputs, runner.output_names),
    ):
        if missing := sorted(set(promised) - set(found)):
            raise BundleError(
                f"{runner.source.name} has no {kind} {', '.join(missing)}, which the bundle's "
                f"I/O map names: {rebuild_hint(bundle.manifest)}"
            )
