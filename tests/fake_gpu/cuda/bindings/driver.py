"""The CUDA driver API of one imaginary GPU; see README.md."""

from __future__ import annotations

import ctypes
import enum
import os
import types
from collections import Counter

NAME = b"Imaginary GPU 80GB" + b"\0" * 100 + b"\x7f\0\0\0\x01\0\0\0\0\xff"
TOTAL = 80 << 30


class CUresult(enum.IntEnum):
    """Statuses."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


CUdevice_attribute = types.SimpleNamespace(
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
)
CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

memory: dict[int, ctypes.Array] = {}
calls: Counter[str] = Counter()
devices = 1
# Function -> the status it gives, and from which call on.
failing: dict[str, tuple[CUresult, int]] = {}
for _entry in os.environ.get("FAKE_CUDA_FAIL", "").split():  # cuMemAlloc:3
    _name, _, _since = _entry.partition(":")
    failing[_name] = (CUresult.CUDA_ERROR_OUT_OF_MEMORY, int(_since or 1))
recordings: list[list] = []  # the one that is being made, if any


def submit(work):
    """What an engine does with the stream: now, or at a replay where one is being captured."""
    if recordings:
        recordings[-1].append(work)
    else:
        work()


def _answer(name, *values):
    calls[name] += 1
    status, since = failing.get(name, (CUresult.CUDA_SUCCESS, 0))
    if calls[name] < since:
        status = CUresult.CUDA_SUCCESS
    return (status, *values) if status == CUresult.CUDA_SUCCESS else (status, *[None] * len(values))


def cuInit(flags):
    return _answer("cuInit")


def cuDeviceGetCount():
    return _answer("cuDeviceGetCount", devices)


def cuDeviceGet(ordinal):
    return _answer("cuDeviceGet", ordinal)


def cuDevicePrimaryCtxRetain(device):
    return _answer("cuDevicePrimaryCtxRetain", "context")


def cuCtxSetCurrent(context):
    assert context == "context"
    return _answer("cuCtxSetCurrent")


def cuStreamCreate(flags):
    return _answer("cuStreamCreate", 42)


def cuStreamDestroy(stream):
    assert stream == 42
    return _answer("cuStreamDestroy")


def cuEventCreate(flags):
    return _answer("cuEventCreate", calls["cuEventCreate"] + 1)


def cuEventRecord(event, stream):
    assert stream == 42
    return _answer("cuEventRecord")


def cuEventSynchronize(event):
    return _answer("cuEventSynchronize")


def cuEventDestroy(event):
    return _answer("cuEventDestroy")


def cuDeviceGetAttribute(kind, device):
    return _answer("cuDeviceGetAttribute", {75: 9, 76: 0, 16: 132}[kind])


def cuDeviceGetName(length, device):
    return _answer("cuDeviceGetName", NAME[:length])


def cuDeviceTotalMem(device):
    return _answer("cuDeviceTotalMem", TOTAL)


def cuDriverGetVersion():
    return _answer("cuDriverGetVersion", 12080)


def cuMemGetInfo():
    return _answer("cuMemGetInfo", TOTAL - sum(map(len, memory.values())), TOTAL)


def cuMemAlloc(size):
    assert size > 0
    found = _answer("cuMemAlloc", 0)
    if found[0]:
        return found
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    return found[0], ctypes.addressof(buffer)


def cuMemFree(address):
    del memory[address]
    return _answer("cuMemFree")


def cuMemcpyHtoDAsync(address, host, size, stream):
    assert stream == 42 and size <= len(memory[address])
    ctypes.memmove(address, host, size)
    return _answer("cuMemcpyHtoDAsync")


def cuMemsetD8Async(address, value, size, stream):
    assert stream == 42 and size <= len(memory[address])
    ctypes.memset(address, value, size)
    return _answer("cuMemsetD8Async")


def cuMemcpyDtoH(host, address, size):
    assert size <= len(memory[address])
    ctypes.memmove(host, address, size)
    return _answer("cuMemcpyDtoH")


def cuStreamSynchronize(stream):
    assert stream == 42 and not recordings
    return _answer("cuStreamSynchronize")


def cuStreamBeginCapture(stream, mode):
    assert stream == 42 and mode == 1 and not recordings
    recordings.append([])
    return _answer("cuStreamBeginCapture")


def cuStreamEndCapture(stream):
    return _answer("cuStreamEndCapture", recordings.pop())


def cuGraphInstantiate(graph, flags):
    return _answer("cuGraphInstantiate", list(graph))


def cuGraphDestroy(graph):
    graph.clear()
    return _answer("cuGraphDestroy")


def cuGraphLaunch(graph, stream):
    assert stream == 42
    for work in graph:
        work()
    return _answer("cuGraphLaunch")


def cuGraphExecDestroy(graph):
    graph.clear()
    return _answer("cuGraphExecDestroy")
