"""An engine in another process, over stand-ins for TensorRT and the CUDA driver."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.runtime import remote
from tokred_export.runtime.remote import RemoteRunner

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(map(str, (ROOT / "tests" / "fake_gpu", ROOT, ROOT / "plugins")))
PYTHON310 = ROOT / ".venv310" / "bin" / "python"
IO = [
    [mode, f"{letter}{index}", kind, [-1 if kind == "INT32" else 2, 3]]
    for mode, letter in (("INPUT", "x"), ("OUTPUT", "y"))
    for index, kind in enumerate(("BOOL", "INT32", "HALF", "FLOAT", "BF16"))
] + [["OUTPUT", "y_count", "INT32", [1]]]


def feeds(batch=2):
    """One array of each dtype; bfloat16 as the upper halves of float32."""
    random = np.random.default_rng(batch)
    values = random.standard_normal((2, 3)).astype(np.float32)
    values[0, 0] = -0.0
    return {
        "x0": values > 0,
        "x1": random.integers(-(2**31), 2**31 - 1, (batch, 3), dtype=np.int32),
        "x2": values.astype(np.float16),
        "x3": values,
        "x4": (values.view(np.uint32) >> 16).astype(np.uint16),
    }


@pytest.fixture
def plan(tmp_path):
    """A plan that the stand-in opens."""
    path = tmp_path / "graph.plan"
    path.write_text(json.dumps({"io": IO, "layers": []}))
    return path


@pytest.fixture
def connect(plan):
    """Opens a runner with some trouble ahead; it is closed after the test."""
    opened = []

    def make(trouble="", python=sys.executable, launcher=None, fail="", version="8.6.0"):
        said = {"version": version, "trouble": trouble}
        environment = {
            "PYTHONPATH": PATH, "FAKE_TENSORRT": json.dumps(said), "FAKE_CUDA_FAIL": fail
        }
        opened.append(RemoteRunner(plan, launcher, str(python), environment))
        return opened[-1]

    yield make
    for runner in opened:
        runner.close()


def check_run(runner, batch=2):
    """All arrays come back as they went, bfloat16 widened."""
    given = feeds(batch)
    found = runner.run(given)
    for index in range(4):
        expected = given[f"x{index}"]
        assert found[f"y{index}"].dtype == expected.dtype
        np.testing.assert_array_equal(found[f"y{index}"], expected)
        assert found[f"y{index}"].tobytes() == expected.tobytes()
    wide = (given["x4"].astype(np.uint32) << 16).view(np.float32)
    assert found["y4"].dtype == np.float32 and found["y4"].tobytes() == wide.tobytes()
    return found


PYTHONS = [
    pytest.param(sys.executable, id="this Python"),
    pytest.param(
        PYTHON310, id="Python 3.10",
        marks=pytest.mark.skipif(not PYTHON310.exists(), reason="no .venv310 in the project"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_over_there(connect, python):
    """Arrays, repetitions, layers, memory, and who runs it."""
    runner = connect(python=python, version="10.9.0.34")
    assert runner.input_names == ("x0", "x1", "x2", "x3", "x4")
    assert runner.output_names == ("y0", "y1", "y2", "y3", "y4", "y_count")
    assert (runner.version, runner.gpu) == ("10.9.0.34", "Imaginary GPU 80GB")
    assert check_run(runner)["y_count"] == 1
    sizes = [a.nbytes for a in feeds().values()]
    assert runner.memory_bytes() == 2 * sum(sizes) + 4
    assert runner.profile(2) == {"copy": 0.5, "count": 0.25}
    assert check_run(runner, batch=5)["y_count"] == 4  # with a batch of another size


def test_a_graph_replays_the_run(connect):
    """Its first repetition sets it up; after that each replay runs the engine once."""
    runner = connect(version="10.9.0.34")
    given = check_run(runner)
    taken = runner.latencies(3)
    assert len(taken) == 3 and all(0 <= ms < 1000 for ms in taken)
    replayed = runner.replayed()
    assert replayed["y_count"] == 5  # the run, one to set up, three replays
    for name in given.keys() - {"y_count"}:
        np.testing.assert_array_equal(replayed[name], given[name])
    assert len(runner.latencies(2)) == 2  # the same graph: nothing to set up
    assert runner.replayed()["y_count"] == 7
    assert len(runner.latencies(2, graph=False)) == 2
    assert runner.replayed()["y_count"] == 9


def test_a_new_shape_makes_a_new_graph(connect):
    """A graph knows the addresses and shapes that it was recorded with, larger ones or smaller."""
    runner = connect(version="10.9.0.34")
    count = 0
    for batch in (2, 8, 3):
        assert check_run(runner, batch)["y_count"] == count + 1
        runner.latencies(1)
        count = runner.replayed()["y_count"][0]
        np.testing.assert_array_equal(runner.replayed()["y1"], feeds(batch)["x1"])
        assert count == 3 * (1 + (2, 8, 3).index(batch))  # each time one to set it up


def test_a_profile_does_not_stay(connect):
    """After it a graph can be recorded again, which none can with a profiler."""
    runner = connect(version="10.9.0.34")
    runner.run(feeds())
    runner.profile(1)
    assert len(runner.latencies(1)) == 1


# --- errors --------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in feeds().items() if key != name}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (without("x3"), r"graph\.plan needs the input x3"),
        ({**feeds(), "x3": np.zeros((2, 3))}, "input x3 is float64, expected float32"),
        ({**feeds(), "x3": np.zeros((3, 2), np.float32)}, r"x3 has the shape \[3, 2\]"),
        (feeds(batch=9), r"x1 has the shape \[9, 3\].*tokred-export inspect"),
    ],
)
def test_wrong_inputs(connect, given, said):
    """An error keeps its kind on the way, and the engine goes on."""
    runner = connect(version="10.9.0.34")
    with pytest.raises(InvalidRequest, match=said) as caught:
        runner.run(given)
    assert caught.value.exit_code == 2
    check_run(runner)


@pytest.mark.parametrize("ask", ["latencies", "profile", "replayed"])
def test_nothing_to_repeat(connect, ask):
    """Repetitions are of a run."""
    runner = connect(version="10.9.0.34")
    with pytest.raises(InvalidRequest, match=r"graph\.plan has no inputs yet: run it once before"):
        getattr(runner, ask)(*([] if ask == "replayed" else [1]))
    check_run(runner)


OPENING = {
    "broken library": (EnvironmentUnable, r"TensorRT cannot be used here .*libnvinfer\.so\.8"),
    "unreadable plan": (BundleError, r"cannot open graph\.plan, expected a plan made by"),
    "no memory": (EnvironmentUnable, r"no memory for the activations of graph\.plan"),
}


@pytest.mark.parametrize("trouble", OPENING)
def test_engines_that_do_not_open(connect, exchange, trouble):
    """The kind and the exit code are those of the other side, and nothing stays behind."""
    kind, said = OPENING[trouble]
    with pytest.raises(kind, match=said) as caught:
        connect(trouble)
    assert type(caught.value) is kind
    assert list(exchange.iterdir()) == []


def test_failure_while_running(connect):
    """TensorRT's refusal and the driver's are the machine's fault."""
    with pytest.raises(EnvironmentUnable, match=r"could not run graph\.plan"):
        connect("fails while running", version="10.9.0.34").run(feeds())


def test_memory_that_runs_out(connect):
    """The driver's refusal comes over with its name, each time."""
    runner = connect(fail="cuMemAlloc:3", version="10.9.0.34")
    for _ in range(2):
        with pytest.raises(EnvironmentUnable, match="refuses cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"):
            runner.run(feeds())


def test_memory_that_runs_out_for_a_larger_run(connect):
    """What was freed to make room is not used again."""
    runner = connect(fail="cuMemAlloc:12", version="10.9.0.34")
    check_run(runner)  # eleven tensors
    for _ in range(2):
        with pytest.raises(EnvironmentUnable, match="refuses cuMemAlloc"):
            runner.run(feeds(batch=8))


def test_process_that_dies(connect):
    """In words, with its status, at once and later; closing it is no error."""
    runner = connect("dies while running", version="10.9.0.34")
    for _ in range(2):
        with pytest.raises(EnvironmentUnable, match=r"runs graph\.plan ended with status 9"):
            runner.run(feeds())
    runner.close()


def test_python_that_is_not_there(connect, exchange):
    """The variable that names it is named."""
    with pytest.raises(EnvironmentUnable, match=r"/no/python cannot be started.*TOKRED_TENSORRT"):
        connect(python="/no/python")
    assert list(exchange.iterdir()) == []


def test_launcher_plugin(connect, tmp_path):
    """It is loaded before the plan, and one of another release is refused."""
    good, bad = tmp_path / "good.so", tmp_path / "bad.so"
    good.write_text("tokred launcher for TensorRT 10.9\0")
    bad.write_text("tokred launcher for TensorRT 8.6\0")
    check_run(connect(launcher=good, version="10.9.0.34"))
    with pytest.raises(EnvironmentUnable, match=r"bad\.so was compiled for TensorRT 8\.6, and th"):
        connect(launcher=bad, version="10.9.0.34")
    bad.write_text("tokred launcher for TensorRT 10.3\0")
    with pytest.raises(EnvironmentUnable, match=r"does not load the launcher plugin .*bad\.so"):
        connect(launcher=bad, version="10.9.0.34")
    bad.write_text("a library of somebody else")
    with pytest.raises(EnvironmentUnable, match=r"bad\.so was compiled for no TensorRT that it na"):
        connect(launcher=bad, version="10.9.0.34")
    with pytest.raises(EnvironmentUnable, match=r"no launcher plugin at .*none\.so"):
        connect(launcher=tmp_path / "none.so")


def test_threads_take_turns(connect):
    """Each gets the outputs of its own inputs."""
    runner = connect(version="10.9.0.34")

    def ask(batch):
        given = feeds(batch)
        return all(np.array_equal(runner.run(given)["y1"], given["x1"]) for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, (1, 2, 3, 4)))


def test_an_answer_that_nobody_waited_for(connect, monkeypatch):
    """An interrupted request ends the process: its answer would be taken for the next one's."""
    runner = connect(version="10.9.0.34")
    check_run(runner)

    def interrupt():
        time.sleep(0.2)  # its answer is in the pipe by now
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_answer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.latencies(1)
    for ask in (runner.memory_bytes, lambda: runner.run(feeds())):
        with pytest.raises(EnvironmentUnable, match="ended with status -9"):
            ask()


@pytest.mark.parametrize("full", ["here", "there"])
def test_arrays_that_find_no_room(connect, exchange, full, monkeypatch):
    """The folder is named, and the process lives on."""
    runner = connect(version="10.9.0.34")
    check_run(runner)
    name = {"here": "in-1.npy", "there": "out-1.npy"}[full]
    (runner._folder / name).unlink()
    (runner._folder / name).mkdir()
    said = rf"cannot be exchanged in {runner._folder} .*TMPDIR"
    with pytest.raises(EnvironmentUnable, match=said):
        runner.run(feeds())
    (runner._folder / name).rmdir()
    check_run(runner)


def test_shared_memory_that_is_small(monkeypatch):
    """64 MB, as a container has, would not hold the outputs of a batch."""
    sizes = {"free": 64 << 20}
    monkeypatch.setattr(remote.os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(
        remote.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=sizes["free"])
    )
    assert remote._exchange() is None
    sizes["free"] = 8 << 30
    assert remote._exchange() == "/dev/shm"


# --- the end -------------------------------------------------------------------------------------


@pytest.fixture
def exchange(tmp_path, monkeypatch):
    """Where runners of this test keep their exchange folders."""
    folder = tmp_path / "exchange"
    folder.mkdir()
    monkeypatch.setattr("tokred_export.runtime.remote.tempfile.tempdir", str(folder))
    monkeypatch.setattr("tokred_export.runtime.remote.os.path.isdir", lambda path: False)
    return folder


def test_close(connect, exchange):
    """The process has ended and its folder is gone; a second time changes nothing."""
    runner = connect(version="10.9.0.34")
    check_run(runner)
    assert len(list(exchange.iterdir())) == 1
    runner.close()
    assert runner._process.poll() == 0 and list(exchange.iterdir()) == []
    runner.close()


def test_with(connect, exchange):
    """As a context it closes itself."""
    with connect() as runner:
        process = runner._process
    assert process.poll() == 0 and list(exchange.iterdir()) == []


def test_forgotten(plan, exchange):
    """A runner that nobody closed takes its process and its folder with it."""
    said = json.dumps({"version": "10.9.0.34"})
    runner = RemoteRunner(plan, None, sys.executable, {"PYTHONPATH": PATH, "FAKE_TENSORRT": said})
    process = runner._process
    del runner
    gc.collect()
    assert process.poll() == 0 and list(exchange.iterdir()) == []


def test_forgotten_at_exit(plan, tmp_path):
    """So does one that is open when its owner's process ends."""
    code = (
        "import sys, tempfile; from pathlib import Path\n"
        "from tokred_export.runtime import remote\n"
        "remote.os.path.isdir = lambda path: False\n"
        f"runner = remote.RemoteRunner(Path({str(plan)!r}), None, sys.executable)\n"
        "print(runner._folder, runner._folder.is_dir())"
    )
    environment = {**os.environ, "PYTHONPATH": PATH, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    folder, was_there = done.stdout.split()
    assert was_there == "True" and Path(folder).parent == tmp_path and not Path(folder).exists()
