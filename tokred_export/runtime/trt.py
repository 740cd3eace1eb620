"""TensorRT as a runner: numpy in, numpy out, for every release from 8.6 on, by tensor names.

After a run the same inputs can be run again many times in a CUDA graph, which is how a server
would run it, and timed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.runtime.device import Device


def load_tensorrt() -> ModuleType:
    """Import tensorrt.

    Raises:
        EnvironmentUnable: it is not installed, or its libraries do not load.
    """
    try:
        trt = importlib.import_module("tensorrt")
        trt.Logger(trt.Logger.ERROR)
    except (ImportError, OSError, AttributeError) as error:
        raise EnvironmentUnable(
            f"TensorRT cannot be used here ({type(error).__name__}: {error}): install the package "
            "tensorrt (8.6 to 11) for this Python, or name a Python that has it in "
            "TOKRED_TENSORRT_PYTHON"
        ) from error
    return trt


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def load_launcher(trt: ModuleType, path: Path) -> None:
    """Register the launcher plugin of ``path`` with TensorRT, once a process.

    Raises:
        EnvironmentUnable: the library does not load into this TensorRT.
    """
    registry = trt.get_plugin_registry()
    if any(c.name == "KernelLaunch" for c in registry.plugin_creator_list):
        return
    if not path.is_file():
        raise EnvironmentUnable(
            f"there is no launcher plugin at {path}: build plugins/launcher with CMake against "
            "this TensorRT's headers (its README.md says how), and name the library in "
            "TOKRED_LAUNCHER"
        )
    if registry.load_library(str(path)) is None:
        raise EnvironmentUnable(
            f"TensorRT {trt.__version__} does not load the launcher plugin {path}: build it again "
            "against the headers of this release"
        )


class TrtRunner:
    """An engine with its memory on the device."""

    def __init__(self, plan: Path, launcher: Path | None = None) -> None:
        self.trt = load_tensorrt()
        self.device = Device()
        self.source = plan
        before = self.device.used_bytes()
        if launcher is not None:
            load_launcher(self.trt, launcher)
        logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(logger)
        self.engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise BundleError(
                f"TensorRT {self.trt.__version__} cannot open {plan.name}, expected a plan made by "
                "this release on this kind of GPU: build the engine again here"
            )
        self._make_context()
        # Memory is counted for the whole device: only here is nobody else expected to take any.
        self._engine_bytes = self.device.used_bytes() - before
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = self.trt.TensorIOMode.INPUT
        self.input_names = tuple(n for n in names if self.engine.get_tensor_mode(n) == inputs)
        self.output_names = tuple(n for n in names if n not in self.input_names)
        self._memory: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._graph: object | None = None

    def _make_context(self) -> None:
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EnvironmentUnable(
                f"no memory for the activations of {self.source.name} on the GPU"
            )

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine once.

        Raises:
            InvalidRequest: an input is missing, or has another type or an unfit shape.
            EnvironmentUnable: the GPU cannot.
        """
        self._set_inputs(feeds)
        shapes = {n: tuple(self.context.get_tensor_shape(n)) for n in self.output_names}
        arrays = {n: np.empty(shapes[n], self._dtype(n)) for n in self.output_names}
        for name, array in arrays.items():
            self.context.set_tensor_address(name, self._room(name, array.nbytes))
        self._enqueue()
        self.device.synchronize()
        for name, array in arrays.items():
            self.device.download(self._memory[name][0], array)
        return {name: self._as_float(name, array) for name, array in arrays.items()}

    def latencies(self, count: int, graph: bool = True) -> list[float]:
        """Milliseconds of ``count`` repetitions of the last run, each waited for.

        Inputs and outputs stay on the device.

        Args:
            count: repetitions.
            graph: replay a CUDA graph of the run, or enqueue it anew each time.

        Raises:
            InvalidRequest: nothing was run before.
            EnvironmentUnable: the GPU cannot.
        """
        self._require_run()
        if graph and self._graph is None:
            self._enqueue()  # what an engine sets up at its first run must not be captured
            self.device.synchronize()
            self.device.begin_capture()
            self._enqueue()
            self._graph = self.device.end_capture()
        taken = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            if graph:
                self.device.replay(self._graph)
            else:
                self._enqueue()
            self.device.synchronize()
            taken.append((time.perf_counter_ns() - begun) / 1e6)
        return taken

    def replayed(self) -> dict[str, np.ndarray]:
        """What the outputs hold now: to check that a graph gives what a run gives."""
        self._require_run()
        arrays = {
            n: np.empty(tuple(self.context.get_tensor_shape(n)), self._dtype(n))
            for n in self.output_names
        }
        for name, array in arrays.items():
            self.device.download(self._memory[name][0], array)
        return {name: self._as_float(name, array) for name, array in arrays.items()}

    def profile(self, count: int) -> dict[str, float]:
        """Mean milliseconds of each layer over ``count`` runs, one after another."""
        times: dict[str, float] = {}

        class Profiler(self.trt.IProfiler):
            def __init__(self) -> None:
                super().__init__()

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                times[name] = times.get(name, 0.0) + milliseconds / count

        self._require_run()
        self.context.profiler = Profiler()
        try:
            for _ in range(count):
                self._enqueue()
                self.device.synchronize()
        finally:
            self._renew_context()  # a profiler slows runs down, and none can be captured with it
        return times

    def _renew_context(self) -> None:
        """A new execution context as the last run left the old: TensorRT 8.6 gives no profiler
        back."""
        shapes = {name: self.context.get_tensor_shape(name) for name in self.input_names}
        self._forget_graph()
        self.context = None  # its activations go before the new one takes its own
        self._make_context()
        for name, shape in shapes.items():
            self.context.set_input_shape(name, shape)
        for name, (address, _) in self._memory.items():
            self.context.set_tensor_address(name, address)

    def memory_bytes(self) -> int:
        """Device memory that this engine takes: weights, activations, inputs and outputs."""
        return self._engine_bytes + sum(size for _, size in self._memory.values())

    def _require_run(self) -> None:
        if not self._memory:
            raise InvalidRequest(f"{self.source.name} has no inputs yet: run it once before")

    def _set_inputs(self, feeds: Mapping[str, np.ndarray]) -> None:
        missing = sorted(set(self.input_names) - set(feeds))
        if missing:
            raise InvalidRequest(f"{self.source.name} needs the input {', '.join(missing)}")
        for name in self.input_names:
            array = np.ascontiguousarray(feeds[name])
            if array.dtype != self._dtype(name):
                raise InvalidRequest(
                    f"input {name} is {array.dtype}, expected {self._dtype(name)}"
                )
            changed = tuple(self.context.get_tensor_shape(name)) != array.shape
            if not self.context.set_input_shape(name, array.shape):
                raise InvalidRequest(
                    f"input {name} has the shape {list(array.shape)}, which {self.source.name} "
                    "does not take: see `tokred-export inspect`"
                )
            if changed:
                self._forget_graph()
            self.context.set_tensor_address(name, self._room(name, array.nbytes))
            self.device.upload(array, self._memory[name][0])

    def _room(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes for a tensor."""
        address, held = self._memory.get(name, (0, -1))
        if held < size:
            if address:
                del self._memory[name]
                self.device.free(address)
            address = self.device.allocate(size)
            self._memory[name] = (address, size)
            self._forget_graph()  # it holds the old addresses
        return address

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self.device.destroy_graph(self._graph)
            self._graph = None

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.device.stream)):
            raise EnvironmentUnable(
                f"TensorRT could not run {self.source.name}; its own message stands above"
            )

    def _dtype(self, name: str) -> np.dtype:
        kind = self.engine.get_tensor_dtype(name)
        if self._is_bfloat16(kind):
            return np.dtype(np.uint16)
        return np.dtype(self.trt.nptype(kind))

    def _as_float(self, name: str, array: np.ndarray) -> np.ndarray:
        """bfloat16, which numpy lacks, as float32: the same upper half of the bits."""
        if not self._is_bfloat16(self.engine.get_tensor_dtype(name)):
            return array
        return (array.astype(np.uint32) << 16).view(np.float32)

    def _is_bfloat16(self, kind: Any) -> bool:  # noqa: ANN401  an enum of another package
        return kind == getattr(self.trt, "bfloat16", None)
