"""Launching a kernel that is PTX alone, on torch tensors, through the CUDA driver.

TensorRT's plugins do the same without torch; see ``plugins/launcher``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tokred_plugins.aot import DESCRIPTORS_DRIVER, Compiled, compile_call, compile_key
from tokred_plugins.kernels import Call

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_loaded: dict[tuple[str, torch.device], tuple[Compiled, ctypes.c_void_p]] = {}


def launch_ptx(call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Put one launch on torch's current stream; after the first, which loads the code, it may be
    captured into a graph.

    Args:
        call: of a kernel whose tactic is PTX.
        inputs: those that are there, in the kernel's order, contiguous on one CUDA device.
        outputs: in the kernel's order.

    Raises:
        ValueError: tensors that are not all on one GPU, or outputs that begin at no multiple of 16
            bytes.
        DoesNotFit: code for another GPU.
        RuntimeError: the driver refuses the code or the launch.
    """
    device = inputs[0].device
    if device.type != "cuda":
        raise ValueError(
            f"{call.kernel.name} with {call.tactic} is PTX and runs on a GPU alone; the tensors "
            f"are on {device}"
        )
    # A slice of a tensor may begin anywhere; the code may not.
    inputs = [x.clone() if x.data_ptr() % 16 else x for x in inputs]
    for x in (*inputs, *outputs):
        if x.device != device or x.data_ptr() % 16:
            raise ValueError(
                f"{call.kernel.name} takes tensors on {device} that begin at a multiple of 16 "
                f"bytes, found one on {x.device} at {x.data_ptr():#x}"
            )
    _bind(device)
    compiled, function = _load(call, device)
    batch = inputs[0].shape[0]
    grid = (*call.grid, batch)
    size = compiled.scratch * grid[0] * grid[1] * batch
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    extras = [ctypes.c_int32(call.extras[name]) for name in call.kernel.extras]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *outputs, scratch)]
    values = [*pointers[: len(inputs)], *extras, *pointers[len(inputs) :]]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _checked(
        "cuLaunchKernel", function, *grid, compiled.block, 1, 1, compiled.shared, stream,
        arguments, None,
    )


def _load(call: Call, device: torch.device) -> tuple[Compiled, ctypes.c_void_p]:
    """The code on the device; calls that differ in lengths alone share it."""
    key = compile_key(call), device
    if key not in _loaded:
        major, minor = torch.cuda.get_device_capability(device)
        compiled = compile_call(call, 10 * major + minor)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _checked("cuModuleLoadData", ctypes.byref(module), compiled.ptx.encode())
        _checked(
            "cuModuleGetFunction", ctypes.byref(function), module, compiled.entry.encode()
        )
        _checked("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, compiled.shared)
        _loaded[key] = compiled, function
    return _loaded[key]


@cache
def reads_descriptors() -> bool:
    """Whether the driver reads the PTX of kernels that make tensor descriptors.

    Raises:
        OSError: there is no driver.
    """
    version = ctypes.c_int()
    _checked("cuDriverGetVersion", ctypes.byref(version))
    return version.value >= DESCRIPTORS_DRIVER


def _bind(device: torch.device) -> None:
    """Make the device's primary context, which is torch's, this thread's."""
    _checked("cuCtxSetCurrent", _context(device.index))


@cache
def _context(index: int) -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _checked("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
    return context


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(text))
        said = (text.value or b"an unknown error").decode()
        raise RuntimeError(f"the CUDA driver refuses {name}: {said} ({status})")
