"""What every backend says about itself and about the engines it makes.

Free of torch and onnx, for the runtime reads `engine.json` on machines that have neither.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from tokred_export.disk import write_atomic
from tokred_export.errors import BundleError
from tokred_export.specs import Spec

ENGINE_FILE = "engine.json"


class Availability(Spec, kw_only=True):
    """Whether a backend can build and run engines here, and in plain words why or why not."""

    can_build: bool
    can_run: bool
    reason: str
    version: str | None = None


class EngineInfo(Spec, kw_only=True):
    """One engine: what it was made from, by what, where, and what it fits."""

    backend: str
    version: str  # of the backend; an engine runs on exactly this one
    component: str  # stem of the ONNX file, the component's name in the bundle
    file: str  # what to load, relative to the engine's folder
    files: tuple[str, ...]  # everything that belongs to it, `file` included
    target: str  # "cpu", "cuda", or the compute capabilities, such as "sm86+sm89"
    machine: str  # of the builder, such as "x86_64"
    processor: str
    onnx_files: dict[str, str]  # name -> sha256 of the graph and its external data
    seconds: float  # that the build took
    bytes: int  # of all files
    layers: int
    layers_from: Literal["engine", "network", "graph"]  # where the layers were counted
    options: dict[str, bool | int | float | str | None]
    can_run_here: bool  # on the machine that built it
    reason: str


class Gpu(NamedTuple):
    """A CUDA device: its name and its compute capability, 86 for 8.6."""

    name: str
    sm: int


def engine_folder(backend: str, target: str, version: str) -> str:
    """The folder below ``engines/`` where a bundle keeps engines of one kind."""
    return f"{backend}-{target}-{version}"


def write_engine(folder: Path, info: EngineInfo) -> None:
    """Add ``info`` to the folder's ``engine.json``; another engine of its component is replaced.

    Raises:
        BundleError: the file that is there cannot be read.
    """
    engines = read_engines(folder) | {info.component: info}
    write_atomic(folder / ENGINE_FILE, msgspec.json.format(msgspec.json.encode(engines), indent=2))


def read_engines(folder: Path) -> dict[str, EngineInfo]:
    """The engines of a folder by component; empty if it holds none.

    Raises:
        BundleError: ``engine.json`` is damaged or of another version of this tool.
    """
    path = folder / ENGINE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, EngineInfo])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise BundleError(
            f"{path} is damaged ({error}), expected the description that a build writes: "
            "build the engine again"
        ) from error


def processor_name() -> str:
    """The CPU's name as its maker writes it, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda() -> ctypes.CDLL | None:
    """The driver's library; None where there is none."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def driver_version() -> int | None:
    """The CUDA version of the driver, 12040 for 12.4; None where there is no driver."""
    cuda, version = _cuda(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value


def list_gpus() -> list[Gpu]:
    """The CUDA devices that the driver shows; empty where there is no driver or no device."""
    cuda = _cuda()
    if cuda is None:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_describe(cuda, index) for index in range(count.value)]


def _describe(cuda: ctypes.CDLL, index: int) -> Gpu:
    """Name and compute capability of one device (attributes 75 and 76 of the driver API)."""
    device, text, value = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(text, len(text), device)
    sm = 0
    for attribute in (75, 76):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        sm = sm * 10 + value.value
    return Gpu(text.value.decode(errors="replace"), sm)
