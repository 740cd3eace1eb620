"""The ONNX Runtime backend: an optimised copy that is the same model, described and checked."""

import platform

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_onnx import L, V, save_tiny

from tokred_export.backends import onnxruntime as backend
from tokred_export.backends.common import read_engines
from tokred_export.disk import hash_file
from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest
from tokred_export.runtime.ort import open_session

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
FEEDS = {"ids": np.arange(8, dtype=np.int32).reshape(2, L) % V}


def run(path):
    """First output of an ONNX file under ONNX Runtime's defaults."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, FEEDS)[0]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_copy_is_the_same_model(tmp_path, monkeypatch, external, kind):
    """The copy has no functions left, gives the source's outputs, and is described in full."""
    source = save_tiny(tmp_path / "tiny.onnx", external=external, kind=kind)
    out = tmp_path / "engines"
    monkeypatch.setattr(backend, "_EXTERNAL_BYTES", 256)  # the two matrices, not the vector
    info = backend.build(source, out, threads=1)
    assert sorted(path.name for path in out.iterdir()) == sorted([*info.files, "engine.json"])
    assert info.files == ("tiny.onnx", "tiny.onnx.data")
    copy = onnx.load(out / info.file, load_external_data=False)
    assert not copy.functions and "tokred" not in {node.domain for node in copy.graph.node}
    np.testing.assert_allclose(run(out / info.file), run(source), rtol=1e-6)
    assert read_engines(out) == {"tiny": info}
    assert info.layers == len(copy.graph.node)
    assert info.bytes == sum((out / name).stat().st_size for name in info.files)
    assert info.onnx_files["tiny.onnx"] == hash_file(source).sha256
    assert ("tiny.onnx.data" in info.onnx_files) == external
    assert (info.version, info.target) == (onnxruntime.__version__, "cpu")
    assert (info.machine, info.options["level"]) == (platform.machine(), "extended")
    assert info.seconds > 0 and info.can_run_here


def test_cuda_multiplies_float32_in_full(tmp_path, monkeypatch):
    """ONNX Runtime's own default is TF32, whose products have three digits."""
    asked = {}

    class Session:
        def __init__(self, path, options, providers, settings):
            asked.update(zip(providers, settings, strict=True))

        def get_providers(self):
            return list(asked)

    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda level: None)
    open_session(save_tiny(tmp_path / "tiny.onnx"), "cuda")
    assert asked == {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}


def test_second_build_replaces_the_first(tmp_path):
    """A folder that is built into again holds the new engine and nothing stale."""
    source, out = save_tiny(tmp_path / "tiny.onnx"), tmp_path / "engines"
    out.mkdir()
    (out / "tiny.onnx.data").write_bytes(b"stale")
    backend.build(source, out, threads=1)
    info = backend.build(source, out, threads=1)
    assert info.files == ("tiny.onnx",)
    assert sorted(path.name for path in out.iterdir()) == ["engine.json", "tiny.onnx"]


def test_copy_with_other_nodes_is_refused(tmp_path, monkeypatch):
    """If the copy read back holds other ops than were written, the build fails and names them."""
    count, calls = backend.node_kinds, []

    def off_by_one(path):
        calls.append(path.name)
        kinds = count(path)
        kinds["::Identity"] += len(calls) - 1
        return kinds

    monkeypatch.setattr(backend, "node_kinds", off_by_one)
    with pytest.raises(BuildFailed, match=r"other nodes than it wrote \(::Identity\)"):
        backend.build(save_tiny(tmp_path / "tiny.onnx"), tmp_path / "engines", threads=1)
    assert calls == ["tiny.onnx", "again-tiny.onnx"]
    assert not list((tmp_path / "engines").glob("again-*"))


def test_copy_with_other_outputs_is_refused(tmp_path, monkeypatch):
    """If the copy computes one bit differently, the build fails and names the output."""
    run_once = backend.OrtRunner.run

    def drift(self, feeds):
        values = run_once(self, feeds)
        if self.source.parent.name == "engines":
            values["logits"] = np.nextafter(values["logits"], np.float32(9))
        return values

    monkeypatch.setattr(backend.OrtRunner, "run", drift)
    with pytest.raises(BuildFailed, match=r"gives another logits than tiny\.onnx"):
        backend.build(save_tiny(tmp_path / "tiny.onnx"), tmp_path / "engines", threads=1)


def test_files_that_cannot_be_built(tmp_path):
    """An absent file, and an op without a body, fail with the graph's name."""
    with pytest.raises(InvalidRequest, match="does not exist"):
        backend.build(tmp_path / "absent.onnx", tmp_path / "engines")
    source = save_tiny(tmp_path / "tiny.onnx", body=False)
    with pytest.raises(BuildFailed, match=r"does not accept .*tiny\.onnx.*scaled"):
        backend.build(source, tmp_path / "engines", threads=1)


def test_example_feeds_fill_the_prompt(tmp_path):
    """The check runs full prompts, so that padding does not hide the model from it."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        g (int32[B, 4] input_ids, int32[B] prompt_len, float16[B, 3] state)
          => (int32[B, 4] a, float16[B, 3] b) {
            column = Constant<value_ints: ints = [-1, 1]>()
            lengths = Reshape(prompt_len, column)
            a = Add(input_ids, lengths)
            b = Identity(state)
        }""")
    onnx.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    feeds = backend.example_feeds(session)
    assert {name: array.dtype for name, array in feeds.items()} == {
        "input_ids": np.int32, "prompt_len": np.int32, "state": np.float16
    }  # fmt: skip
    np.testing.assert_array_equal(feeds["prompt_len"], [4])
    np.testing.assert_array_equal(feeds["state"], [[-1, 0, 1]])
    session.run(None, feeds)


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_cuda_is_never_replaced_by_the_cpu(tmp_path):
    """Without the CUDA provider a CUDA engine is refused, not built for the CPU."""
    assert not backend.available("cuda").can_build
    with pytest.raises(EnvironmentUnable, match="onnxruntime-gpu"):
        backend.build(save_tiny(tmp_path / "t.onnx"), tmp_path / "engines", provider="cuda")


def test_availability(monkeypatch):
    """The CPU always serves; without onnxruntime the reason says what to install."""
    found = backend.available()
    assert found.can_build and found.can_run and found.version == onnxruntime.__version__
    assert backend.folder_name() == f"onnxruntime-cpu-{onnxruntime.__version__}"

    def missing():
        raise EnvironmentUnable("install it")

    monkeypatch.setattr(backend, "load_onnxruntime", missing)
    lost = backend.available()
    assert (lost.can_build, lost.can_run, lost.reason) == (False, False, "install it")
