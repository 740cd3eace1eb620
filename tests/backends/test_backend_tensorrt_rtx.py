"""The TensorRT-RTX backend: real plans without a GPU, and no crash that goes unexplained."""

import importlib.util
import re
import sys

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_onnx import save_tiny

from tokred_export.backends import tensorrt_rtx as backend
from tokred_export.backends.common import Gpu, list_gpus, read_engines
from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest

INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
SUPPORTED_GPU = any(gpu.sm in backend.SUPPORTED for gpu in list_gpus())
needs_rtx = pytest.mark.skipif(not INSTALLED, reason="tensorrt_rtx is not installed")


def save_det(path):
    """A valid graph with an op that TensorRT-RTX does not know."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"], name="layers.0.relu"),
            helper.make_node("Det", ["r"], ["y"], name="layers.0.det"),
        ],
        "g",
        [info("x", TensorProto.FLOAT, [3, 3])],
        [info("y", TensorProto.FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def job(folder, **changes):
    """A build job whose files lie in ``folder``."""
    fields = {
        "onnx": str(folder / "tiny.onnx"), "plan": str(folder / "tiny.plan"),
        "outcome": str(folder / "outcome.json"), "targets": (86,), "batches": None,
        "inspect": False,
    }  # fmt: skip
    return backend.Job(**fields | changes)


def python(code):
    """A command that runs ``code`` in place of the build process."""
    return (sys.executable, "-c", code)


@pytest.mark.rtx
@needs_rtx
@pytest.mark.parametrize(
    "options",
    [{}, {"external": True}, {"batch": "B"}, {"kind": np.float16}],
    ids=["static", "external", "dynamic", "half"],
)
def test_build(tmp_path, options):
    """A graph with a custom op becomes a plan of real size, described in full."""
    import tensorrt_rtx

    source, out = save_tiny(tmp_path / "tiny.onnx", **options), tmp_path / "engines"
    info = backend.build(source, out, max_batch=2, targets=(86, 89))
    assert sorted(path.name for path in out.iterdir()) == ["engine.json", "tiny.plan"]
    assert read_engines(out) == {"tiny": info}
    assert info.bytes == (out / "tiny.plan").stat().st_size > 1000
    assert info.version == tensorrt_rtx.__version__
    assert (info.target, info.component) == ("sm86+sm89", "tiny")
    assert info.options == {"dynamic_batch": "batch" in options, "max_batch": 2}
    assert set(info.onnx_files) == {
        "tiny.onnx", *(["tiny.onnx.data"] if "external" in options else [])
    }  # fmt: skip
    assert info.layers >= 5 and info.seconds > 0
    if not SUPPORTED_GPU:
        assert info.layers_from == "network" and not info.can_run_here
        assert "cannot run them" in info.reason and "7.5" in info.reason


@pytest.mark.rtx
@needs_rtx
def test_more_targets_make_a_larger_plan(tmp_path):
    """The targets reach the builder: each adds its own code to the plan."""
    source = save_tiny(tmp_path / "tiny.onnx")
    one = backend.build(source, tmp_path / "one", targets=(86,))
    four = backend.build(source, tmp_path / "four")
    assert four.bytes > one.bytes
    assert four.target == "sm80+sm86+sm89+sm120"


@pytest.mark.rtx
@needs_rtx
def test_parse_error_names_the_node(tmp_path):
    """An op that the parser does not know is named, and no plan is left."""
    with pytest.raises(BuildFailed, match=r"cannot parse node 'layers\.0\.det' \(Det\)"):
        backend.build(save_det(tmp_path / "det.onnx"), tmp_path / "engines")
    assert list((tmp_path / "engines").iterdir()) == []


@pytest.mark.rtx
@needs_rtx
def test_disagreeing_shapes_fail(tmp_path, monkeypatch):
    """If ONNX Runtime sees other shapes than TensorRT-RTX, there is no plan."""
    monkeypatch.setattr(backend, "_agreed_shapes", lambda *paths: {"logits": (2, 4, 17)})
    with pytest.raises(BuildFailed, match=r"TensorRT-RTX gives output logits .*\[2, 4, 16\]"):
        backend.build(save_tiny(tmp_path / "tiny.onnx"), tmp_path / "engines", targets=(86,))
    assert list((tmp_path / "engines").iterdir()) == []


@pytest.mark.rtx
@needs_rtx
def test_wrong_declaration_fails(tmp_path):
    """A file that declares another shape than its ops give is refused before the build."""
    path = save_tiny(tmp_path / "tiny.onnx")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 17
    onnx.save(model, path)
    with pytest.raises(BuildFailed, match=r"the file gives output logits .*\[2, 4, 17\]"):
        backend.build(path, tmp_path / "engines", targets=(86,))


@needs_rtx
@pytest.mark.parametrize(
    ("options", "asked", "error", "said"),
    [
        ({"body": False}, {}, BuildFailed, r"layers\.0\.scaled.*no function body"),
        ({}, {"targets": (90,)}, InvalidRequest, r"cannot build for \[90\].*backend tensorrt"),
        ({}, {"targets": ()}, InvalidRequest, r"cannot build for \[\]"),
        ({"batch": "B"}, {}, InvalidRequest, "batch is open.*--max-batch"),
        ({"batch": "B"}, {"max_batch": 0}, InvalidRequest, "largest one is 0"),
        ({"length": "L"}, {}, BuildFailed, "open size besides its batch"),
    ],
)
def test_graphs_and_requests_that_are_refused(tmp_path, options, asked, error, said):
    """What cannot be built is refused before the build process starts."""
    source = save_tiny(tmp_path / "tiny.onnx", **options)
    with pytest.raises(error, match=said):
        backend.build(source, tmp_path / "engines", **asked)


def test_crash_becomes_a_build_failure(tmp_path):
    """A build process that aborts is reported with its signal and the end of its log."""
    code = "import os; print('x\\n' * 50 + 'terminate called', flush=True); os.abort()"
    with pytest.raises(BuildFailed) as caught:
        backend.run_job(job(tmp_path), command=python(code))
    text = str(caught.value)
    assert "ended with SIGABRT" in text and text.endswith("terminate called")
    assert len(text.splitlines()) < 25
    assert caught.value.exit_code == 4


def test_silent_exit_becomes_a_build_failure(tmp_path):
    """A build process that stops without an answer is no success."""
    with pytest.raises(BuildFailed, match="ended with exit status 7"):
        backend.run_job(job(tmp_path), command=python("raise SystemExit(7)"))


@pytest.mark.parametrize(
    ("outcome", "error", "said"),
    [
        (backend.Outcome(error="no", exit_code=4), BuildFailed, r"no$"),
        (backend.Outcome(error="no", exit_code=4, show_log=True), BuildFailed, "no; the log.*why"),
        (backend.Outcome(error="disk", exit_code=3), EnvironmentUnable, r"disk$"),
    ],
)
def test_answers_of_the_build_process(tmp_path, outcome, error, said):
    """An error that the process reports keeps its kind, and its log where that says more."""
    code = (
        "import json, pathlib, sys; print('why')\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        f"pathlib.Path(job['outcome']).write_bytes({msgspec.json.encode(outcome)!r})"
    )
    with pytest.raises(error) as caught:
        backend.run_job(job(tmp_path), command=python(code))
    assert re.match(said, str(caught.value), re.DOTALL)


@pytest.mark.rtx
@needs_rtx
@pytest.mark.skipif(not __import__("os").path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_in_the_build_process(tmp_path):
    """A plan that does not fit on the disk is the environment's fault, in words."""
    onnx.save(backend.inline_functions(backend.load_graph(save_tiny(tmp_path / "a"))),
              tmp_path / "tiny.onnx")  # fmt: skip
    with pytest.raises(EnvironmentUnable, match="disk ran full"):
        backend.run_job(job(tmp_path, plan="/dev/full"))


@pytest.mark.rtx
@needs_rtx
def test_availability_here():
    """It builds wherever it is installed, and says plainly whether it can run."""
    found = backend.available()
    assert found.can_build and found.can_run == SUPPORTED_GPU and found.version
    assert backend.folder_name((86,)) == f"tensorrt-rtx-sm86-{found.version}"


@pytest.mark.parametrize(
    ("gpus", "can_run", "said"),
    [
        ([], False, "cannot run them: it has no GPU"),
        ([Gpu("NVIDIA H200", 90)], False, r"it has NVIDIA H200 \(9\.0\)"),
        ([Gpu("NVIDIA H200", 90), Gpu("RTX 4090", 89)], True, "can run it"),
    ],
)
def test_gpus_that_can_run_it(monkeypatch, gpus, can_run, said):
    """Only the compute capabilities that the library supports count."""
    monkeypatch.setattr(backend, "list_gpus", lambda: gpus)
    found, reason = backend._can_run_here()
    assert found == can_run and re.search(said, reason)


def test_not_installed(monkeypatch, tmp_path):
    """Without the package both doctor and build say what to install."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(backend.util, "find_spec", lambda name: None)
    found = backend.available()
    assert not found.can_build and "pip install tensorrt-rtx-cu13" in found.reason
    with pytest.raises(EnvironmentUnable, match="pip install tensorrt-rtx-cu13"):
        backend.build(save_tiny(tmp_path / "tiny.onnx"), tmp_path / "engines")
