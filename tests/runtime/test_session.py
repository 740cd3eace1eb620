"""Sessions: the right graph, left padding, one row a prompt, and clear refusals."""

import logging
import subprocess
import sys

import msgspec
import numpy as np
import onnxruntime
import pytest
from fake_bundle import COMMAND, MODEL, TABLE, make_bundle

from tokred_export.backends import onnxruntime as backend
from tokred_export.backends.common import read_engines
from tokred_export.bundle import read_bundle, update_files
from tokred_export.errors import BuildFailed, BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.runtime.runner import open_runner
from tokred_export.runtime.session import Session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with lengths 4 and 8, any batch up to 2."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "out")


@pytest.fixture(scope="module")
def session(bundle):
    """That bundle, open."""
    return Session.open(bundle, threads=1)


def with_engine(target):
    """A bundle of one length that carries an ONNX Runtime engine, and the engine's folder."""
    name = f"engines/{backend.folder_name()}"
    make_bundle(
        target,
        lengths=(4,),
        extra=lambda folder: backend.build(folder / "prefill-4.onnx", folder / name, threads=1),
    )
    return target / name


def edit_engine(folder, **changes):
    """Change an engine's description, and record the change in the bundle."""
    engines = read_engines(folder)
    engines["prefill-4"] = msgspec.structs.replace(engines["prefill-4"], **changes)
    (folder / "engine.json").write_bytes(msgspec.json.encode(engines))
    update_files(folder.parent.parent, under="engines")


@pytest.mark.parametrize(("batch", "dynamic"), [(2, True), (2, False), (3, False)])
def test_rows_of_a_batch(tmp_path, batch, dynamic):
    """Each row gets its own padding, choices and states; spare rows of a static batch vanish."""
    path = make_bundle(tmp_path / "out", lengths=(4,), max_batch=batch, dynamic=dynamic)
    result = Session.open(path, threads=1).prefill([[5, 7, 3], [9]])
    np.testing.assert_array_equal(result.logits, TABLE[[3, 9]])
    np.testing.assert_array_equal(result.kept_positions, [[1, 2], [-1, 0]])
    assert result.kept_positions.dtype == np.int32
    (choice,) = result.choices
    np.testing.assert_array_equal(choice.src, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(choice.dst, [[3, 4], [1, 2]])
    np.testing.assert_array_equal(choice.merge, [[False, True], [False, True]])
    for layer in range(MODEL.n_layer):
        conv, ssm = result.conv_states[layer], result.ssm_states[layer]
        assert conv.shape == (2, MODEL.conv_dim, MODEL.d_conv - 1)
        assert ssm.shape == (2, MODEL.n_heads, MODEL.head_dim, MODEL.d_state)
        assert ssm.dtype == np.float32
        np.testing.assert_array_equal(conv[:, 0, 0], [15, 9])
        np.testing.assert_array_equal(ssm[:, 0, 0, 0], [15 + layer, 9 + layer])


@pytest.mark.parametrize(
    ("length", "component"),
    [(0, "prefill-4"), (1, "prefill-4"), (4, "prefill-4"), (5, "prefill-8"), (8, "prefill-8")],
)
def test_the_smallest_graph_that_fits(session, length, component):
    """The longest prompt of a batch decides; the others follow it."""
    result = session.prefill([[1] * length, []])
    assert result.component == component
    assert (result.kept_positions[1] == -1).all()
    assert result.kept_positions[0].max() == length - 1


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_numpy_prompts(session, kind):
    """An integer array [B,T] is as good as lists."""
    prompts = np.array([[5, 7, 3], [1, 2, 9]], kind)
    np.testing.assert_array_equal(session.prefill(prompts).logits, TABLE[[3, 9]])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompts"),
        (np.zeros((0, 4), np.int32), "no prompts"),
        ("text", "prompts are of type str, expected a list of rows"),
        (None, "prompts are of type NoneType, expected a list"),
        (5, "prompts are of type int"),
        (np.int32(5), "prompts are of type int32"),
        (np.array(5), "prompts are of type ndarray"),
        ([[1]] * 3, "3 prompts were given, and prefill-4 takes at most 2"),
        ([[1] * 9], r"9 tokens, and the longest graph .* takes 8.*--seq-len"),
        ([[1], [2, 11]], "prompt 1 has the id 11 at position 1.*0 to 10"),
        ([[-1]], "prompt 0 has the id -1"),
        ([[2**40]], "has the id 1099511627776"),
        ([1, 2], "put a single prompt in a list"),
        ([[1.0, 2.0]], "float64 of shape"),
        ([[True]], "bool of shape"),
        ([["a"]], "integer token ids"),
        ([[[1], [2, 3]]], "prompt 0 is nested"),
    ],
)
def test_prompts_that_are_refused(session, prompts, said):
    """What cannot be meant is refused before anything runs, with the reason."""
    with pytest.raises(InvalidRequest, match=said):
        session.prefill(prompts)


def test_damaged_bundle_is_not_opened(tmp_path):
    """One changed byte in a graph is found before use; a changed report is nobody's harm."""

    def report(folder):
        (folder / "reports").mkdir()
        (folder / "reports" / "report.md").write_text("fast")

    path = make_bundle(tmp_path / "out", extra=report)
    (path / "reports" / "report.md").write_text("faster")
    Session.open(path, threads=1)
    graph = path / "prefill-8.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"prefill-8\.onnx has sha256") as caught:
        Session.open(path)
    assert COMMAND in str(caught.value)


def test_backends_and_devices_that_are_missing(bundle):
    """An unknown backend is a wrong request, a device that is not here is the environment's."""
    with pytest.raises(InvalidRequest, match="no runner for the backend 'tensorrt-rtx'"):
        Session.open(bundle, backend="tensorrt-rtx")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EnvironmentUnable, match="expected CUDAExecutionProvider"):
            Session.open(bundle, device="cuda")
    with pytest.raises(InvalidRequest, match=r"no component 'decode'.*prefill-4, prefill-8"):
        open_runner(read_bundle(bundle), "decode")


def test_fitting_engine_is_used(tmp_path):
    """An engine for this version and device runs in place of the ONNX file, with its results."""
    folder = with_engine(tmp_path / "out")
    session = Session.open(tmp_path / "out", engine="require", threads=1)
    assert session.runner("prefill-4").source == folder / "prefill-4.onnx"
    plain = Session.open(tmp_path / "out", engine="ignore", threads=1)
    assert plain.runner("prefill-4").source == tmp_path / "out" / "prefill-4.onnx"
    found, expected = (s.prefill([[5, 7], [1]]) for s in (session, plain))
    for one, other in zip(found.ssm_states, expected.ssm_states, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "1.0.0"}, "was made by onnxruntime 1.0.0, and this is"),
        ({"target": "cuda"}, "was made for cuda, and this is cpu"),
        ({"machine": "riscv64"}, "was made for riscv64"),
        ({"onnx_files": {"prefill-4.onnx": "0" * 64}}, "another version of the ONNX file"),
    ],
)
def test_engine_that_does_not_fit(tmp_path, caplog, change, said):
    """It is named with the command that makes a new one: a warning, or an error if required."""
    edit_engine(with_engine(tmp_path / "out"), **change)
    with caplog.at_level(logging.WARNING, "tokred_export"):
        session = Session.open(tmp_path / "out", threads=1)
    assert said in caplog.text and COMMAND in caplog.text
    assert session.runner("prefill-4").source == tmp_path / "out" / "prefill-4.onnx"
    with pytest.raises(BundleError, match=said):
        Session.open(tmp_path / "out", engine="require")


@pytest.mark.parametrize("name", ["unlisted.onnx", "../../../elsewhere.onnx"])
def test_engine_file_that_the_bundle_does_not_list(tmp_path, name):
    """Nobody vouches for the content of a file without a hash, wherever it lies."""
    folder = with_engine(tmp_path / "out")
    edit_engine(folder, file=name)
    (folder / name).write_bytes((folder / "prefill-4.onnx").read_bytes())
    with pytest.raises(BundleError, match="which the bundle does not list"):
        Session.open(tmp_path / "out")


def test_bundle_without_engine(bundle, caplog):
    """No engine at all is normal, and only an error when one is required."""
    with caplog.at_level(logging.WARNING, "tokred_export"):
        Session.open(bundle, threads=1)
    assert caplog.text == ""
    with pytest.raises(BundleError, match="the bundle has none for prefill-4"):
        Session.open(bundle, engine="require")


def test_graph_without_a_promised_name(tmp_path):
    """A graph that lacks a name of the I/O map is refused when opened, not when run."""
    path = make_bundle(tmp_path / "out", lengths=(4,))
    text = (path / "export.json").read_text().replace('"present.ssm_state.1"', '"elsewhere"')
    (path / "export.json").write_text(text)
    with pytest.raises(BundleError, match="no output elsewhere"):
        Session.open(path)


def test_file_that_is_no_graph(tmp_path):
    """A listed file that ONNX Runtime cannot read is a build failure, in its words."""
    path = make_bundle(tmp_path / "out", lengths=(4,))
    (path / "prefill-4.onnx").write_bytes(b"not a graph")
    session = Session(read_bundle(path), threads=1)
    with pytest.raises(BuildFailed, match="does not accept"):
        session.runner("prefill-4")


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"input_ids": np.zeros((1, 4), np.int64)},
        {"input_ids": np.zeros((1, 5), np.int32)},
        {"input_ids": np.full((1, 4), 99, np.int32)},
    ],
)
def test_wrong_feeds(session, feeds):
    """The lower level refuses wrong feeds in one sentence that names the graph."""
    lengths = {"prompt_len": np.ones(1, np.int32)}
    with pytest.raises(InvalidRequest, match=r"refuses the inputs of prefill-4\.onnx: ."):
        session.runner("prefill-4").run(lengths | feeds)


def test_failure_while_running(session, monkeypatch):
    """Any other error of ONNX Runtime while running is the environment's."""
    runner = session.runner("prefill-4")

    class Failing:
        def run(self, names, feeds):
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("out of memory\nmore words")

    monkeypatch.setattr(runner, "session", Failing())
    with pytest.raises(EnvironmentUnable, match=r"prefill-4\.onnx: out of memory; check"):
        runner.run({})


def test_without_onnxruntime(bundle):
    """A machine without onnxruntime is told what to install."""
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from tokred_export.errors import EnvironmentUnable\n"
        "from tokred_export.runtime.session import Session\n"
        "try:\n    Session.open(sys.argv[1])\n"
        "except EnvironmentUnable as error:\n    print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=True
    )
    assert "pip install onnxruntime" in found.stdout
