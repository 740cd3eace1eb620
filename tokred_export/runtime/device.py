"""The few things of the CUDA driver that running an engine takes: memory, a stream, a graph.

Free of torch. Source: the CUDA driver API, through NVIDIA's cuda-bindings.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from tokred_export.errors import EnvironmentUnable

if TYPE_CHECKING:
    import numpy as np


LIBRARY = "libcuda.so.1"


class Gpu(NamedTuple):
    """The device in use: name, compute capability times ten, and bytes of its memory."""

    name: str
    sm: int
    bytes: int


def load_driver() -> ModuleType:
    """The driver API.

    Raises:
        EnvironmentUnable: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EnvironmentUnable(
            f"cuda-bindings cannot be imported ({error}): pip install cuda-bindings"
        ) from error


class Device:
    """The first CUDA device, its primary context made current in this thread.

    In others :meth:`make_current` comes first.
    """

    def __init__(self) -> None:
        self.driver = load_driver()
        self._call("cuInit", 0)
        if self._call("cuDeviceGetCount") == 0:
            raise EnvironmentUnable("there is no CUDA device here, expected an NVIDIA GPU")
        self._device = self._call("cuDeviceGet", 0)
        # TensorRT runs in the primary context too.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()
        # Non-blocking: nothing waits for the legacy stream, and it can be captured.
        self.stream = self._call("cuStreamCreate", 1)

    def make_current(self) -> None:
        """Let this thread use the device."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def gpu(self) -> Gpu:
        """What the device is."""
        attribute = self.driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", kind, self._device)
            for kind in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self._call("cuDeviceGetName", 128, self._device)
        total = self._call("cuDeviceTotalMem", self._device)
        # All 128 bytes come back, and what follows the first NUL means nothing.
        text = name.partition(b"\0")[0].decode(errors="replace")
        return Gpu(text, 10 * major + minor, total)

    @property
    def multiprocessors(self) -> int:
        """How many the device has."""
        kind = self.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        return self._call("cuDeviceGetAttribute", kind, self._device)

    @property
    def cuda_version(self) -> int:
        """What the driver supports: 12070 for CUDA 12.7."""
        return self._call("cuDriverGetVersion")

    def used_bytes(self) -> int:
        """Device memory that is taken, by this process and all others."""
        free, total = self._call("cuMemGetInfo")
        return total - free

    def allocate(self, size: int) -> int:
        """The address of ``size`` new bytes (at least one), aligned to 256."""
        return int(self._call("cuMemAlloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree", address)

    def upload(self, array: np.ndarray, address: int) -> None:
        """Copy a contiguous array to the device; what is put on the stream later sees it."""
        if array.nbytes:  # a copy on no stream may still be under way when it returns
            self._call(
                "cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self.stream
            )
            self.synchronize()

    def download(self, address: int, array: np.ndarray) -> None:
        """Fill a contiguous array from the device."""
        if array.nbytes:
            self._call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)

    def fill(self, address: int, value: int, size: int) -> None:
        """Set so many bytes, in the stream's order."""
        self._call("cuMemsetD8Async", address, value, size, self.stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self.stream)

    def destroy_stream(self) -> None:
        """Give the stream back; the device is of no use then."""
        self._call("cuStreamDestroy", self.stream)

    def begin_capture(self) -> None:
        """From here on the stream's work is recorded, not done."""
        # Thread-local: what other threads of the process do meanwhile is their own affair.
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self.stream, mode)

    def abandon_capture(self) -> None:
        """Record no more, and forget what was recorded."""
        # Whatever made the recording useless was said before.
        status, graph = self.driver.cuStreamEndCapture(self.stream)
        if status == self.driver.CUresult.CUDA_SUCCESS:
            self._call("cuGraphDestroy", graph)

    def end_capture(self) -> object:
        """The recorded work, ready to be launched."""
        graph = self._call("cuStreamEndCapture", self.stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def replay(self, graph: object) -> None:
        """Put a recorded graph on the stream."""
        self._call("cuGraphLaunch", graph, self.stream)

    def destroy_graph(self, graph: object) -> None:
        """Give a recorded graph back."""
        self._call("cuGraphExecDestroy", graph)

    def load_kernel(self, ptx: str, entry: str, shared: int) -> tuple[object, object]:
        """A module and its function, allowed so many bytes of dynamic shared memory."""
        module = self._call("cuModuleLoadData", ptx.encode())
        function = self._call("cuModuleGetFunction", module, entry.encode())
        limit = self.driver.CUfunction_attribute
        self._call(
            "cuFuncSetAttribute", function,
            limit.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared,
        )
        return module, function

    def unload_kernel(self, kernel: tuple[object, object]) -> None:
        """Give back what :meth:`load_kernel` returned."""
        self._call("cuModuleUnload", kernel[0])

    def launch(
        self, kernel: tuple[object, object], grid: tuple[int, int, int], block: int, shared: int,
        arguments: Sequence[int | np.int32],
    ) -> None:
        """Put one launch on the stream; ints are addresses, numpy int32 are themselves."""
        values = tuple(int(value) for value in arguments)
        kinds = tuple(
            ctypes.c_void_p if isinstance(value, int) else ctypes.c_int for value in arguments
        )
        self._call(
            "cuLaunchKernel", kernel[1], *grid, block, 1, 1, shared, self.stream,
            (values, kinds), 0,
        )

    def elapsed_ms(self, work: Callable[[], object]) -> float:
        """Milliseconds between two events around what ``work`` puts on the stream."""
        events = [self._call("cuEventCreate", 0) for _ in range(2)]
        self._call("cuEventRecord", events[0], self.stream)
        work()
        self._call("cuEventRecord", events[1], self.stream)
        self._call("cuEventSynchronize", events[1])
        taken = self._between(*events)
        for event in events:
            self._call("cuEventDestroy", event)
        return taken

    def _between(self, first: object, second: object) -> float:
        """Milliseconds between two events that have passed."""
        # cuda-bindings 12.8 and later ask for a second form of this function, which older drivers
        # (all of JetPack 6) do not have; the first may go some day.
        library = ctypes.CDLL(LIBRARY)
        name = "cuEventElapsedTime"
        ask = getattr(library, name if hasattr(library, name) else f"{name}_v2")
        taken = ctypes.c_float()
        status = ask(ctypes.byref(taken), ctypes.c_void_p(int(first)), ctypes.c_void_p(int(second)))
        if status:
            raise EnvironmentUnable(f"the CUDA driver refuses cuEventElapsedTime: error {status}")
        return taken.value

    def _call(self, name: str, *arguments: object) -> object:
        """A driver function's result; its status is checked.

        Raises:
            EnvironmentUnable: there is no driver, or it refuses; memory is the usual cause.
        """
        try:
            status, *values = getattr(self.driver, name)(*arguments)
        except RuntimeError as error:  # cuda-bindings looks for the driver's library only now
            raise EnvironmentUnable(
                f"the CUDA driver cannot be called for {name} ({error}): install NVIDIA's driver, "
                "or a cuda-bindings that is not newer than it (for CUDA 12 drivers: "
                "pip install 'cuda-bindings<13')"
            ) from error
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise EnvironmentUnable(
                f"the CUDA driver refuses {name}: {status.name}; check that a GPU is free and has "
                "enough memory"
            )
        return values[0] if len(values) == 1 else tuple(values) or None
