"""The CUDA driver through a stand-in: what comes out, and that every refusal is said in words."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tokred_export.errors import EnvironmentUnable
from tokred_export.runtime.device import Device, Gpu

DRIVER = Path(__file__).parents[1] / "fake_gpu" / "cuda" / "bindings" / "driver.py"


@pytest.fixture
def driver(monkeypatch):
    """A fresh stand-in for the driver, which Device finds."""
    spec = importlib.util.spec_from_file_location("cuda.bindings.driver", DRIVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
    return module


def test_gpu_without_padding(driver):
    """The name ends at its first NUL, whatever the other bytes of the buffer are."""
    assert len(driver.NAME) > 40 and not driver.NAME.endswith(b"\0")
    assert Device().gpu == Gpu("Imaginary GPU 80GB", 90, 80 << 30)
    assert Device().multiprocessors == 132


@pytest.mark.parametrize("kind", [bool, np.int32, np.float16, np.float32, np.uint16])
def test_memory(driver, kind):
    """What is uploaded comes back, nothing takes no copy, and memory is counted and given back."""
    device = Device()
    values = np.arange(24).reshape(2, 12).astype(kind)
    address = device.allocate(values.nbytes)
    assert device.used_bytes() == values.nbytes
    device.upload(values, address)
    found = np.empty_like(values)
    device.download(address, found)
    np.testing.assert_array_equal(found, values)
    empty = np.empty((0, 3), kind)
    place = device.allocate(0)
    device.upload(empty, place)
    device.download(place, empty)
    assert driver.calls["cuMemcpyHtoDAsync"] == driver.calls["cuMemcpyDtoH"] == 1
    device.fill(address, 0xFF, 2)
    device.download(address, found)
    assert (found.view(np.uint8).reshape(-1)[:2] == 0xFF).all()
    device.free(address)
    device.free(place)
    assert device.used_bytes() == 0


def test_recorded_work_runs_at_each_replay(driver):
    """And not while it is recorded."""
    device, done = Device(), []
    device.begin_capture()
    driver.submit(lambda: done.append(1))
    graph = device.end_capture()
    assert done == [] and driver.calls["cuGraphDestroy"] == 1
    device.replay(graph)
    device.replay(graph)
    device.synchronize()
    assert done == [1, 1]
    device.destroy_graph(graph)
    assert driver.calls["cuGraphExecDestroy"] == 1


def everything():
    """Calls each driver function that Device knows."""
    device = Device()
    assert device.gpu and device.used_bytes() == 0 and device.cuda_version == 12080
    values = np.zeros(4, np.float32)
    address = device.allocate(16)
    device.upload(values, address)
    device.fill(address, 0, 16)
    device.download(address, values)
    device.begin_capture()
    graph = device.end_capture()
    device.replay(graph)
    device.synchronize()
    device.destroy_graph(graph)
    device.begin_capture()
    device.abandon_capture()
    device.free(address)
    device.destroy_stream()


FUNCTIONS = [
    "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuStreamCreate", "cuDeviceGetAttribute", "cuDeviceGetName", "cuDeviceTotalMem",
    "cuDriverGetVersion", "cuMemGetInfo", "cuMemAlloc", "cuMemsetD8Async",
    "cuMemcpyHtoDAsync", "cuMemcpyDtoH", "cuStreamBeginCapture",
    "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy", "cuGraphLaunch",
    "cuStreamSynchronize", "cuGraphExecDestroy", "cuMemFree", "cuStreamDestroy",
]


def test_the_list_of_functions_is_whole(driver):
    """So none is missing below."""
    everything()
    assert set(driver.calls) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_refusal_names_the_call(driver, name):
    """With the driver's own word for it."""
    driver.failing[name] = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, 1
    with pytest.raises(EnvironmentUnable, match=rf"refuses {name}: CUDA_ERROR_ILLEGAL_ADDRESS"):
        everything()


@pytest.mark.parametrize("name", ["cuEventElapsedTime", "cuEventElapsedTime_v2"])
def test_time_between_events(driver, monkeypatch, name):
    """By the form of the function that the driver has: cuda-bindings ask for the newer one."""
    asked = []

    def elapsed(self, taken, first, second):
        taken._obj.value = 1.5
        asked.append((first.value, second.value))
        return 700 if len(asked) > 1 else 0

    Library = type("Library", (), {name: elapsed})
    monkeypatch.setattr("tokred_export.runtime.device.ctypes.CDLL", lambda name: Library())
    device, done = Device(), []
    assert device.elapsed_ms(lambda: done.append(1)) == 1.5
    assert asked == [(1, 2)] and done == [1]
    assert driver.calls["cuEventRecord"] == driver.calls["cuEventDestroy"] == 2
    with pytest.raises(EnvironmentUnable, match="refuses cuEventElapsedTime: error 700"):
        device.elapsed_ms(lambda: None)


def test_a_recording_that_failed(driver):
    """There is nothing to give back then, and nothing to say a second time."""
    device = Device()
    device.begin_capture()
    driver.failing["cuStreamEndCapture"] = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, 1
    device.abandon_capture()
    assert driver.calls["cuGraphDestroy"] == 0 and not driver.recordings


def test_no_device(driver):
    """A driver without a device is no error of the driver's."""
    driver.devices = 0
    with pytest.raises(EnvironmentUnable, match="no CUDA device here"):
        Device()


def test_no_driver(driver):
    """cuda-bindings looks for the driver's library at the first call."""

    def missing(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    driver.cuInit = missing
    with pytest.raises(EnvironmentUnable, match=r"for cuInit \(Failed .*\): .*cuda-bindings<13"):
        Device()


def test_no_bindings(monkeypatch):
    """Without the package it says what to install."""
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver", raising=False)
    with pytest.raises(EnvironmentUnable, match="pip install cuda-bindings"):
        Device()
