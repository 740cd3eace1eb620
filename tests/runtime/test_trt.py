"""An engine in this process, over stand-ins for TensorRT and the CUDA driver."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tokred_export.errors import EnvironmentUnable, GateFailed, InvalidRequest
from tokred_export.prove import gpu_call
from tokred_export.runtime.trt import TrtRunner

FAKE_GPU = Path(__file__).parents[1] / "fake_gpu"
IO = [
    ["INPUT", "x0", "FLOAT", [-1, 3]], ["OUTPUT", "y0", "FLOAT", [-1, 3]],
    ["OUTPUT", "y_count", "INT32", [1]],
]


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Opens a runner with some trouble ahead; ``connect.driver`` is the driver it has."""
    monkeypatch.syspath_prepend(str(FAKE_GPU))
    plan = tmp_path / "graph.plan"
    plan.write_text(json.dumps({"io": IO, "layers": []}))
    names = ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.driver")

    def make(trouble=""):
        monkeypatch.setenv("FAKE_TENSORRT", json.dumps({"version": "8.6.0", "trouble": trouble}))
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        make.driver = importlib.import_module("cuda.bindings.driver")
        return TrtRunner(plan)

    yield make
    for name in names:
        sys.modules.pop(name, None)


def feeds(value=1.0, batch=2):
    return {"x0": np.full((batch, 3), value, np.float32)}


def test_close(connect):
    """Buffers, graph and stream go back, once; a closed runner says so."""
    runner = connect()
    runner.run(feeds())
    runner.latencies(1)
    assert len(connect.driver.memory) == 3
    for _ in range(2):
        runner.close()
    calls = connect.driver.calls
    assert not connect.driver.memory
    assert calls["cuGraphExecDestroy"] == calls["cuStreamDestroy"] == 1
    with pytest.raises(InvalidRequest, match=r"graph\.plan was closed: open it again"):
        runner.run(feeds())


def test_forgotten(connect):
    """So they do with a runner that nobody closed, and at the end of a with."""
    runner = connect()
    runner.run(feeds())
    driver = connect.driver
    del runner
    gc.collect()
    assert not driver.memory and driver.calls["cuStreamDestroy"] == 1
    with connect() as other:
        other.run(feeds())
        assert connect.driver.memory
    assert not connect.driver.memory


def test_threads_take_turns(connect):
    """Each gets the outputs of its own inputs, and may use the device."""
    runner = connect()
    before = connect.driver.calls["cuCtxSetCurrent"]

    def ask(value):
        batch = 1 + value % 3
        found = [runner.run(feeds(value, batch))["y0"] for _ in range(50)]
        return all(array.shape == (batch, 3) and (array == value).all() for array in found)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(6)))
    assert connect.driver.calls["cuCtxSetCurrent"] >= before + 300


def test_a_graph_that_forgets_something(connect):
    """Its outputs would still be there from the run before: they are made something else first."""
    runner = connect("records nothing")
    for _ in range(2):  # the second time there is a graph already
        with pytest.raises(GateFailed, match=r"CUDA graph of graph\.plan gives another y0, y_cou"):
            gpu_call(runner, feeds())


def test_a_graph_that_gives_what_a_run_gives(connect):
    """But for how often the engine ran."""
    runner = connect()
    expected = runner.run(feeds(3.0))
    assert len(runner.latencies(2)) == 2
    np.testing.assert_array_equal(runner.replayed()["y0"], expected["y0"])


def test_failure_while_recording(connect):
    """The stream does not stay in its recording: the next run is as ever."""
    runner = connect("fails while recording")
    runner.run(feeds())
    with pytest.raises(EnvironmentUnable, match=r"could not run graph\.plan"):
        runner.latencies(1)
    assert not connect.driver.recordings
    assert (runner.run(feeds(5.0))["y0"] == 5.0).all()
    assert len(runner.latencies(1, graph=False)) == 1
