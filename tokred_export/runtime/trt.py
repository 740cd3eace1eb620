"""TensorRT as a runner: numpy in, numpy out, for every release from 8.6 on, by tensor names.

After a run the same inputs can be run again many times in a CUDA graph, which is how a server
would run it, and timed.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import wraps
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


# No output of a graph may be left of an earlier run: this is no value that one would have.
_MARK = 0xA5
_MADE_FOR = re.compile(rb"tokred launcher for TensorRT (\d+)\.(\d+)")


def launcher_release(path: Path) -> tuple[int, int] | None:
    """The TensorRT release that a launcher library was compiled for; None if it does not say."""
    found = _MADE_FOR.search(path.read_bytes())
    return None if found is None else (int(found[1]), int(found[2]))


def launcher_misfit(path: Path, version: str) -> str | None:
    """Why the launcher library cannot go into this TensorRT, if so: plugin classes of another major
    release are laid out differently, and TensorRT would crash."""
    made_for = launcher_release(path)
    if made_for is not None and made_for[0] == release(version)[0]:
        return None
    whose = "for no TensorRT that it names" if made_for is None else (
        f"for TensorRT {made_for[0]}.{made_for[1]}"
    )
    return (
        f"the launcher plugin {path} was compiled {whose}, and this is {version}: build "
        "plugins/launcher again against this TensorRT's headers"
    )


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
    misfit = launcher_misfit(path, trt.__version__)
    if misfit is not None:
        raise EnvironmentUnable(misfit)
    if registry.load_library(str(path)) is None:
        raise EnvironmentUnable(
            f"TensorRT {trt.__version__} does not load the launcher plugin {path}: build it again "
            "against the headers of this release"
        )


def _one_at_a_time(method: Callable) -> Callable:
    """Threads share one stream and one set of buffers, and take turns."""

    @wraps(method)
    def taking_turns(self: TrtRunner, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        with self._turn:
            if not self._end.alive:
                raise InvalidRequest(f"{self.source.name} was closed: open it again")
            self.device.make_current()
            return method(self, *args, **options)

    return taking_turns


class TrtRunner:
    """An engine with its memory on the device, for any thread; close it after use."""

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
        self._graphs: list[object] = []  # the one of the last run, if there is one
        self._ran = False  # outputs are those of a run, not of a replay
        self._turn = threading.RLock()
        # Nobody need call close: it also happens when this object goes.
        self._end = weakref.finalize(self, _give_back, self.device, self._memory, self._graphs)
        self._end.atexit = False  # the process gives everything back

    def close(self) -> None:
        """Give the device's memory back; again changes nothing."""
        with self._turn:
            self.context = self.engine = self._runtime = None
            self._end()

    def __enter__(self) -> TrtRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make_context(self) -> None:
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EnvironmentUnable(
                f"no memory for the activations of {self.source.name} on the GPU"
            )

    @_one_at_a_time
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
        self._ran = True
        self._enqueue()
        self.device.synchronize()
        for name, array in arrays.items():
            self.device.download(self._memory[name][0], array)
        return {name: self._as_float(name, array) for name, array in arrays.items()}

    @_one_at_a_time
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
        if graph and not self._graphs:
            self._record()
        if graph and self._ran:
            self._spoil_outputs()
        taken = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            if graph:
                self.device.replay(self._graphs[0])
            else:
                self._enqueue()
            self.device.synchronize()
            taken.append((time.perf_counter_ns() - begun) / 1e6)
        return taken

    def _record(self) -> None:
        """Make a graph of the last run."""
        self._enqueue()  # what an engine sets up at its first run must not be captured
        self.device.synchronize()
        self.device.begin_capture()
        try:
            self._enqueue()
        except BaseException:
            self.device.abandon_capture()  # or the stream would record for ever
            raise
        self._graphs.append(self.device.end_capture())

    def _spoil_outputs(self) -> None:
        """Make the outputs of a run something that only a replay mends."""
        self._ran = False
        for name in self.output_names:
            self.device.fill(self._memory[name][0], _MARK, self._memory[name][1])
        self.device.synchronize()

    @_one_at_a_time
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

    @_one_at_a_time
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
        if self._graphs:
            self.device.destroy_graph(self._graphs.pop())

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


def _give_back(
    device: Device, memory: dict[str, tuple[int, int]], graphs: list[object]
) -> None:
    """What a runner took of the device, but for TensorRT's own."""
    device.make_current()
    while graphs:
        device.destroy_graph(graphs.pop())
    while memory:
        device.free(memory.popitem()[1][0])
    device.destroy_stream()
