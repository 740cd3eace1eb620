"""The TensorRT backend from an exported file to a described plan, over a stand-in for TensorRT.

What is proven is what this tool asks of each release and how it reads the answers; that a real
TensorRT takes it so, only a GPU can tell (tests/fake_gpu/README.md says what is played).
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import onnx
import pytest
from fake_launcher import launcher_text
from small_exports import Case, compiling_once, export

from tokred_export import pipeline
from tokred_export.backends import tensorrt as backend
from tokred_export.backends import tune
from tokred_export.backends.common import Gpu, read_engines
from tokred_export.cli import run as run_cli
from tokred_export.disk import hash_file
from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest
from tokred_export.runtime import tensorrt_python
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE
from tokred_export.specs import BuildSpec, ReductionSpec

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

FAKE_GPU = Path(__file__).parents[1] / "fake_gpu"
H100 = Gpu("NVIDIA H100 80GB HBM3", 90)
CASES = {
    "half": Case("none", dtype="float16"),
    "float": Case(method="evit"),
    "open": Case("none", dtype="float16", max_batch=4),
    "bfloat": Case("none", dtype="bfloat16"),
}
OLD, LAUNCHED, QUICK, NEWEST = "8.6.0", "10.9.0.34", "10.15.1.29", "11.4.0.106"
KERNELS = {  # of two dense layers
    "embed_rms_norm": 1, "causal_conv1d": 2, "ssd_chunk_state": 2, "ssd_pass": 2,
    "ssd_chunk_scan": 2, "gated_rms_norm": 2, "add_rms_norm": 2,
}  # fmt: skip
# The last layer's output projection and the head see one token a row.
PRODUCTS = {"linear": 3, "linear_few": 2}


class Untuned:
    """Takes every tactic as it is: there is nothing here to time it on."""

    def __init__(self, sm, file, multiprocessors, driver):
        assert sm == 90 and file.name.endswith(".tactics.json")

    def best(self, call):
        return call

    def close(self):
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Name of a case -> its exported file, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = export(tmp_path_factory.mktemp(name), CASES[name])
        return made[name]

    return get


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an H100 and the given TensorRT, in whose builds ``trouble`` comes up."""

    def set_up(version, trouble="", gpus=(H100,), launcher=True):
        monkeypatch.setenv("FAKE_TENSORRT", json.dumps({"version": version, "trouble": trouble}))
        monkeypatch.setenv("FAKE_TENSORRT_LOG", str(tmp_path / "log"))
        places = [str(FAKE_GPU), os.environ.get("PYTHONPATH")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
        monkeypatch.setenv("TOKRED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("TOKRED_LAUNCHER", str(tmp_path / "launcher.so"))
        monkeypatch.delenv("TOKRED_TENSORRT_PYTHON", raising=False)
        if launcher:
            (tmp_path / "launcher.so").write_text(launcher_text(version))
        monkeypatch.setattr(backend, "list_gpus", lambda: list(gpus))
        monkeypatch.setattr(tune, "Tuner", Untuned)
        tensorrt_python.installed_version.cache_clear()

    yield set_up
    tensorrt_python.installed_version.cache_clear()


def build(path, out, **options):
    """A build whose kernels need not be compiled anew."""
    with compiling_once():
        return backend.build(path, out, **options)


def builds(tmp_path):
    """What the stand-in wrote down, one entry a build."""
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def nothing_left(out):
    """No plan, no description and no temporary folder."""
    return not out.exists() or list(out.iterdir()) == []


# --- builds that succeed -------------------------------------------------------------------------


def test_release_8_is_held_to_the_types_of_the_file(machine, source, tmp_path):
    """FP16 with precisions obeyed, no TF32, no outside kernels, float32 where the file has it."""
    machine(OLD)
    path = source("half")
    info = build(path, tmp_path / "out", level=2)
    (said,) = builds(tmp_path)
    assert said["file"] == "kernels.onnx" and said["network_flags"] == 1 << 0
    assert said["set"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"] and said["cleared"] == ["TF32"]
    assert said["tactic_sources"] == 0 and said["level"] == 2
    assert said["verbosity"] == "DETAILED" and said["profile"] is None
    assert said["registered"] == {}
    check_engine(info, path, tmp_path / "out", OLD, "launcher")
    assert info.options["level"] == 2


def test_float32_parts_of_a_16_bit_file(machine, source, tmp_path):
    """Just the nodes that compute in float32 are pinned to it; a cast changes type anyway."""
    machine(OLD)
    model = onnx.load(source("half"))
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    helper = onnx.helper
    extra = [
        helper.make_node("Cast", [node.output[0]], ["wide"], name="to_wide", to=1),
        helper.make_node("Mul", ["wide", "wide"], ["wider"], name="square"),
        helper.make_node("Cast", ["wider"], ["narrow"], name="to_narrow", to=10),
    ]
    shape = next(v for v in model.graph.value_info if v.name == node.output[0])
    dims = [d.dim_value for d in shape.type.tensor_type.shape.dim]
    for name, kind in (("wide", 1), ("wider", 1), ("narrow", 10)):
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, dims))
    for user in model.graph.node:
        user.input[:] = ["narrow" if name == node.output[0] else name for name in user.input]
    place = list(model.graph.node).index(node) + 1
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *extra, *nodes[place:]])
    onnx.save(model, tmp_path / "graph.onnx")
    build(tmp_path / "graph.onnx", tmp_path / "out")
    build(source("half"), tmp_path / "before")
    changed, before = (said["pinned"] for said in builds(tmp_path))
    assert changed == before | {"square": [["precision", "FLOAT"], [0, "FLOAT"]]}
    kinds = {n.name: n.op_type for n in model.graph.node}
    assert {kinds[name] for name in before} == {"Slice"}  # of the float32 residual


def test_float32_file_for_release_8(machine, source, tmp_path):
    """No 16-bit kernels are allowed, and TF32 stays off."""
    machine(OLD)
    info = build(source("float"), tmp_path / "out")
    (said,) = builds(tmp_path)
    assert said["set"] == [] and said["cleared"] == ["TF32"]
    assert said["pinned"] == {}
    assert info.options["plugins.token_reduce_norm"] == 1


@pytest.mark.parametrize(("version", "form"), [(LAUNCHED, "launcher"), (QUICK, "quick")])
def test_later_releases_take_types_from_the_file(machine, source, tmp_path, version, form):
    """Strongly typed, nothing pinned; kernels through launcher or quick plugins."""
    machine(version, launcher=form == "launcher")
    info = build(source("half"), tmp_path / "out")
    (said,) = builds(tmp_path)
    assert said["network_flags"] == 1 << 1
    assert said["set"] == [] and said["cleared"] == ["TF32"] and said["tactic_sources"] is None
    assert said["pinned"] == {} and said["level"] is None
    assert set(said["registered"].values()) == ({90} if form == "quick" else set())
    check_engine(info, source("half"), tmp_path / "out", version, form)


def test_newest_release_and_an_open_batch(machine, source, tmp_path):
    """A release without 16-bit flags; the profile spans 1 to the largest batch."""
    machine(NEWEST, launcher=False)
    info = build(source("open"), tmp_path / "out", max_batch=4)
    (said,) = builds(tmp_path)
    assert said["set"] == [] and said["cleared"] == ["TF32"]
    assert said["profile"] == {
        "input_ids": [[1, 41], [4, 41], [4, 41]], "prompt_len": [[1], [4], [4]],
    }  # fmt: skip
    assert set(said["registered"].values()) == {90}
    assert info.options["max_batch"] == 4
    check_engine(info, source("open"), tmp_path / "out", NEWEST, "quick")


def check_engine(info, path, out, version, form):
    """The description: what was made, of what, for what, and every file of it."""
    files = {"graph.plan", "graph.layers.json", *([LAUNCHER_FILE] if form == "launcher" else [])}
    assert {p.name for p in out.iterdir()} == {"engine.json", *files}
    assert read_engines(out) == {"graph": info}
    assert set(info.files) == files and info.file == "graph.plan"
    assert info.bytes == sum((out / name).stat().st_size for name in files)
    assert (info.backend, info.version, info.target) == ("tensorrt", version, "sm90")
    assert (info.component, info.machine) == ("graph", platform.machine())
    assert info.onnx_files == {"graph.onnx": hash_file(path).sha256}
    assert info.can_run_here and info.seconds >= info.options["builder_seconds"] >= 0
    layers = json.loads((out / "graph.layers.json").read_text())
    assert info.layers == len(layers) and info.layers_from == "engine"
    kernels = {k: n for k, n in info.options.items() if k.startswith("plugins.")}
    expected = KERNELS | PRODUCTS if form == "launcher" else KERNELS
    assert kernels == {f"plugins.{kernel}": n for kernel, n in expected.items()}
    assert info.options["plugins"] == sum(expected.values())
    assert (info.options["form"], info.options["gpu"]) == (form, H100.name)
    if form == "launcher":
        assert (out / LAUNCHER_FILE).read_text() == launcher_text(version)


def test_kernels_are_split_for_the_gpu_that_is_here(
    machine, source, tmp_path, monkeypatch, caplog
):
    """Where its driver can be asked; otherwise for a large one."""
    machine(NEWEST, launcher=False)
    caplog.set_level("WARNING", logger="tokred_export")  # a --quiet of another test stays
    large = build(source("half"), tmp_path / "large")
    assert "split as for a large GPU" in caplog.text
    asked = SimpleNamespace(multiprocessors=2, destroy_stream=lambda: None)
    monkeypatch.setattr(backend, "Device", lambda: asked)
    small = build(source("half"), tmp_path / "small")
    assert large.options["plugins.ssd_pass"] == 2 and "plugins.ssd_scan" not in large.options
    assert small.options["plugins.ssd_scan"] == 2 and "plugins.ssd_pass" not in small.options


def test_timings_are_kept_between_builds(machine, source, tmp_path):
    """In the cache, by release and GPU; a later build reads what an earlier one found."""
    machine(OLD)
    build(source("half"), tmp_path / "out")
    file = tmp_path / "cache" / "timing" / "tensorrt-8.6.0-nvidia-h100-80gb-hbm3.cache"
    assert backend.timing_cache_path() == file
    assert file.read_text().splitlines() == ["timings of kernels.onnx"]
    build(source("half"), tmp_path / "again")
    first, second = builds(tmp_path)
    assert first["timings"] == [] and second["timings"] == ["timings of kernels.onnx"]


def test_timings_survive_a_build_that_dies(machine, source, tmp_path):
    """Those of earlier builds are still on disk."""
    machine(OLD)
    cache = tmp_path / "own.cache"
    build(source("half"), tmp_path / "out", timing_cache=cache)
    kept = cache.read_text()
    machine(OLD, "abort")
    with pytest.raises(BuildFailed):
        build(source("half"), tmp_path / "again", timing_cache=cache)
    assert cache.read_text() == kept


# --- builds that fail ----------------------------------------------------------------------------


TROUBLES = {
    "lost plugin": r"runs the plugins .*, expected .*'embed_rms_norm': 1.*fell back",
    "turned plugin": r"runs the plugins .*, expected .*'embed_rms_norm': 1.*fell back",
    "parse error": r"cannot parse node .*/embed_rms_norm: no plugin KernelLaunch; in any namespace",
    "no engine": r"parsed kernels\.onnx but built no engine",
    "unreadable plan": "cannot open the plan that it has just built",
    "other shapes": r"TensorRT gives output \S+ the shape .*the file gives it",
    "abort": r"the TensorRT build process ended with SIGABRT(.|\n)*terminate called",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_builds_that_fail(machine, source, tmp_path, trouble):
    """In words, with exit code 4, and nothing half made stays."""
    machine(OLD, trouble)
    with pytest.raises(BuildFailed, match=TROUBLES[trouble]) as caught:
        build(source("half"), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert nothing_left(tmp_path / "out")
    assert "Traceback" not in str(caught.value)


def test_timings_of_another_gpu(machine, source, tmp_path):
    """They are refused by name, not used."""
    machine(OLD)
    (tmp_path / "own.cache").write_text("of another GPU")
    with pytest.raises(BuildFailed, match=r"own\.cache is of another GPU or TensorRT: remove it"):
        build(source("half"), tmp_path / "out", timing_cache=tmp_path / "own.cache")


def test_bfloat16_needs_a_later_release(machine, source, tmp_path):
    """TensorRT 8 is refused with what to do; 10 takes it."""
    machine(OLD)
    with pytest.raises(InvalidRequest, match=r"8\.6\.0 has no bfloat16: .*--dtype float16"):
        build(source("bfloat"), tmp_path / "out")
    machine(LAUNCHED)
    info = build(source("bfloat"), tmp_path / "out")
    assert info.options["plugins"] == sum((KERNELS | PRODUCTS).values())


def test_file_that_is_not_there(machine, tmp_path):
    """The request is wrong."""
    machine(OLD)
    with pytest.raises(InvalidRequest, match="does not exist"):
        build(tmp_path / "none.onnx", tmp_path / "out")


# --- machines that cannot ------------------------------------------------------------------------


MACHINES = {
    "too old": (dict(version="8.5.3.1"), r"8\.5\.3\.1 is too old, expected 8\.6"),
    "no GPU": (dict(version=OLD, gpus=()), "there is no NVIDIA GPU here"),
    "no kernels": (
        dict(version=QUICK, gpus=[Gpu("Tesla T4", 75)]),
        r"no kernels for Tesla T4, which has compute capability 7\.5, expected one of 8\.0, 8\.6",
    ),
    "no launcher": (dict(version=OLD, launcher=False), r"none at .*launcher\.so.*TOKRED_LAUNCHER"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_machines_that_cannot_build(machine, source, tmp_path, case):
    """doctor, build, and the names of folders give the same reason, with exit code 3."""
    options, said = MACHINES[case]
    machine(**options)
    found = backend.available()
    assert not found.can_build and not found.can_run
    for call in (
        backend.require, backend.folder_name, backend.timing_cache_path,
        lambda: build(source("half"), tmp_path / "out"),
    ):
        with pytest.raises(EnvironmentUnable, match=said) as caught:
            call()
        assert found.reason in str(caught.value) and caught.value.exit_code == 3
    assert nothing_left(tmp_path / "out")


def test_machine_that_can_build(machine):
    """It says on what, and how kernels get in."""
    machine(OLD)
    found = backend.available()
    assert found.can_build and found.can_run and found.version == OLD
    assert found.reason == "NVIDIA H100 80GB HBM3 (9.0), kernels as the launcher plugin"
    assert backend.folder_name() == "tensorrt-sm90-8.6.0"
    machine(NEWEST, launcher=False)
    assert backend.available().reason.endswith("kernels as quick plugins")


def test_engines_in_the_cache_are_of_one_launcher_and_gpu(machine, tmp_path):
    """A launcher that was built anew makes a new engine, and so does another GPU of the same
    compute capability; other backends know neither."""
    asked = []

    class Keys:
        def get_or_make(self, key, make):
            asked.append(key)
            return tmp_path

    line = pipeline.Line(BuildSpec(model=None, reduction=ReductionSpec()), None, Keys())

    def keys_of(name):
        asked.clear()
        for launcher in ("", "", "mended"):
            backend.launcher_path().write_text(launcher_text("8.6.0") + launcher)
            pipeline.engine(line, name, tmp_path / "key" / "onnx" / "prefill-8.onnx")
        return asked

    machine(OLD)
    first, again, mended = keys_of("tensorrt")
    assert first == again != mended
    assert len(set(keys_of("onnxruntime"))) == 1
    machine(NEWEST)
    assert len(set(keys_of("tensorrt"))) == 1
    of_this_gpu = keys_of("tensorrt")[0]
    machine(NEWEST, gpus=[Gpu("NVIDIA H200", 90)])
    assert keys_of("tensorrt")[0] != of_this_gpu


def test_launcher_of_another_release(machine, source, tmp_path):
    """Before anything is built where it would crash, and by TensorRT where it is as good as new."""
    machine(OLD)
    (tmp_path / "launcher.so").write_text(launcher_text("10.3.0"))
    said = r"launcher\.so was compiled for TensorRT 10\.3, and this is 8\.6\.0: build .*headers"
    assert re.search(said, backend.available().reason)
    with pytest.raises(EnvironmentUnable, match=said):
        build(source("half"), tmp_path / "out")
    (tmp_path / "launcher.so").write_text(launcher_text("8.5.1"))
    with pytest.raises(EnvironmentUnable, match=r"does not load the launcher plugin .*\.so"):
        build(source("half"), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_broken_library(machine, source, tmp_path):
    """A TensorRT whose libraries do not load is the machine's fault."""
    machine(OLD, "broken library")
    with pytest.raises(EnvironmentUnable, match=r"cannot be used here .*libnvinfer\.so\.8"):
        build(source("half"), tmp_path / "out")


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_no_tensorrt(monkeypatch, tmp_path, capsys, python):
    """The command line says it in one sentence, exit code 3, and makes no folder."""
    monkeypatch.setenv("TOKRED_TENSORRT_PYTHON", python)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("TOKRED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "tensorrt.py").write_text("raise ImportError('none')")
    tensorrt_python.installed_version.cache_clear()
    out = tmp_path / "out"
    assert run_cli(["build", "-o", str(out), "--backend", "tensorrt", "--quiet"]) == 3
    tensorrt_python.installed_version.cache_clear()
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    text = " ".join(said.err.split())
    if python == sys.executable:
        assert f"TensorRT cannot be imported by {python}" in text
    else:
        assert f"names {python}, which is no program here: name the Python that has Tens" in text
    assert "TOKRED_TENSORRT_PYTHON" in text
    assert not out.exists()


@pytest.mark.parametrize("left", [b"", b'{"error": nu'])
def test_half_an_answer_is_none(tmp_path, left):
    """A process that dies while it answers has built nothing."""
    from tokred_export.backends.job import Job, run_job

    code = f"import json, sys; open(json.load(open(sys.argv[1]))['outcome'], 'wb').write({left!r})"
    asked = Job(outcome=str(tmp_path / "outcome.json"))
    with pytest.raises(BuildFailed, match="ended with exit status 0 and built nothing"):
        run_job(asked, (sys.executable, "-c", code), "TensorRT", "tensorrt")
    assert msgspec.json.decode((tmp_path / "job.json").read_bytes())["outcome"] == asked.outcome
