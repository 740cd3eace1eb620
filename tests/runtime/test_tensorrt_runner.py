"""Which TensorRT engine of a bundle is opened, by which Python, and why another is not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from fake_bundle import COMMAND, MODEL, make_bundle
from fake_launcher import launcher_text

from tokred_export.backends.common import EngineInfo, Gpu, write_engine
from tokred_export.bundle import read_bundle
from tokred_export.disk import hash_file
from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.manifest import prefill_io
from tokred_export.runtime import runner as runner_module
from tokred_export.runtime import tensorrt_python
from tokred_export.runtime.runner import open_runner
from tokred_export.runtime.session import Session
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE

ROOT = Path(__file__).parents[2]
FAKE_GPU = ROOT / "tests" / "fake_gpu"
VERSION = "8.6.0"
NAME = "prefill-4"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with an H100 whose other Python has TensorRT 8.6."""
    python = tmp_path / "python3.10"
    path = os.pathsep.join(map(str, (FAKE_GPU, ROOT, ROOT / "plugins")))
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("TOKRED_TENSORRT_PYTHON", str(python))
    monkeypatch.setenv("FAKE_TENSORRT", json.dumps({"version": VERSION}))
    monkeypatch.setattr(runner_module, "list_gpus", lambda: [Gpu("NVIDIA H100", 90)])
    tensorrt_python.installed_version.cache_clear()
    yield
    tensorrt_python.installed_version.cache_clear()


def with_engines(target, *changes, plan=None):
    """A bundle with one TensorRT engine a change of its description; returns it, opened."""

    def add(folder):
        for index, change in enumerate(changes):
            place = folder / "engines" / f"tensorrt-{index}"
            place.mkdir(parents=True)
            (place / f"{NAME}.plan").write_text(json.dumps(plan or {"io": [], "layers": []}))
            (place / LAUNCHER_FILE).write_text(launcher_text(VERSION))
            digest = hash_file(folder / f"{NAME}.onnx").sha256
            info = EngineInfo(
                backend="tensorrt", version=VERSION, component=NAME, file=f"{NAME}.plan",
                files=(f"{NAME}.plan", LAUNCHER_FILE), target="sm90", machine=platform.machine(),
                processor="a CPU", onnx_files={f"{NAME}.onnx": digest}, seconds=1.0, bytes=1,
                layers=1, layers_from="engine", options={}, can_run_here=True, reason="",
            )  # fmt: skip
            write_engine(place, msgspec.structs.replace(info, **change))

    make_bundle(target, lengths=(4,), max_batch=1, dynamic=False, extra=add)
    return read_bundle(target)


class Opened:
    """Stands for an engine; says what it was opened with."""

    def __init__(self, plan, launcher):
        io = prefill_io(MODEL.n_layer, 1)
        self.source, self.launcher = plan, launcher
        self.input_names, self.output_names = tuple(io.inputs), tuple(io.outputs)


@pytest.fixture
def opened(monkeypatch):
    """Engines are not opened, only looked for."""
    monkeypatch.setattr(tensorrt_python, "open_engine", Opened)


MISFITS = {
    "version": ({"version": "10.3.0"}, "was made by tensorrt 10.3.0, and this is 8.6.0"),
    "sm": ({"target": "sm87"}, "was made for sm87, and this is sm90"),
    "machine": ({"machine": "aarch64"}, "was made for aarch64, and this is"),
    "hash": ({"onnx_files": {f"{NAME}.onnx": "0" * 64}}, "was made from another version of the"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_engines_that_do_not_fit(machine, opened, tmp_path, misfit):
    """Each is named with its reason, and the command that makes one that fits."""
    change, said = MISFITS[misfit]
    bundle = with_engines(tmp_path / "out", change)
    with pytest.raises(BundleError) as caught:
        open_runner(bundle, NAME, "tensorrt")
    text = str(caught.value)
    assert f"engines/tensorrt-0 {said}" in text and COMMAND in text
    assert "expected one for TensorRT 8.6.0 on sm90" in text


def test_the_one_that_fits(machine, opened, tmp_path):
    """Wherever it stands among others; its launcher plugin is the one beside it."""
    others = [change for change, _ in MISFITS.values()]
    bundle = with_engines(tmp_path / "out", *others[:2], {}, *others[2:])
    runner = open_runner(bundle, NAME, "tensorrt")
    assert runner.source == bundle.path / "engines" / "tensorrt-2" / f"{NAME}.plan"
    assert runner.launcher == runner.source.with_name(LAUNCHER_FILE)


def test_an_engine_that_another_gpu_tuned(machine, opened, tmp_path, caplog):
    """It runs on any of its compute capability; that it may be slow is said."""
    caplog.set_level("WARNING", logger="tokred_export")  # a --quiet of another test stays
    for name, said in (("NVIDIA H100", 0), ("NVIDIA H200", 1)):
        bundle = with_engines(tmp_path / name, {"options": {"gpu": name}})
        assert open_runner(bundle, NAME, "tensorrt").source.is_file()
        assert len(caplog.messages) == said
    assert "was tuned on an NVIDIA H200, and this is an NVIDIA H100: it runs" in caplog.text
    assert COMMAND in caplog.text


def test_an_engine_of_quick_plugins(machine, opened, tmp_path):
    """It needs no launcher, even where an old one lies about."""
    bundle = with_engines(tmp_path / "out", {"files": (f"{NAME}.plan",)})
    assert open_runner(bundle, NAME, "tensorrt").launcher is None


def test_all_misfits_are_named(machine, opened, tmp_path):
    """One after the other."""
    bundle = with_engines(tmp_path / "out", *(change for change, _ in MISFITS.values()))
    with pytest.raises(BundleError) as caught:
        open_runner(bundle, NAME, "tensorrt")
    for index, (_, said) in enumerate(MISFITS.values()):
        assert f"engines/tensorrt-{index} {said}" in str(caught.value)


def test_a_bundle_without_an_engine(machine, opened, tmp_path):
    """Nor does an engine of another component count."""
    bundle = with_engines(tmp_path / "out", {"component": "prefill-8"})
    with pytest.raises(BundleError, match="the bundle has none for prefill-4"):
        open_runner(bundle, NAME, "tensorrt")


def test_files_that_the_bundle_does_not_list(machine, opened, tmp_path):
    """A launcher is code: nobody runs one that the manifest does not vouch for."""
    bundle = with_engines(tmp_path / "out", {"files": (f"{NAME}.plan", "elsewhere.so")})
    with pytest.raises(BundleError, match=r"'elsewhere\.so', which the bundle does not list"):
        open_runner(bundle, NAME, "tensorrt")


def test_without_a_gpu(machine, opened, tmp_path, monkeypatch):
    """No engine fits then."""
    monkeypatch.setattr(runner_module, "list_gpus", lambda: [])
    with pytest.raises(BundleError, match="made for sm90, and this is no GPU"):
        open_runner(with_engines(tmp_path / "out", {}), NAME, "tensorrt")


def test_without_tensorrt(opened, tmp_path, monkeypatch):
    """The machine's fault, before any engine is looked at."""
    monkeypatch.setenv("TOKRED_TENSORRT_PYTHON", str(tmp_path / "no-python"))
    tensorrt_python.installed_version.cache_clear()
    bundle = with_engines(tmp_path / "out", {})
    said = r"TOKRED_TENSORRT_PYTHON names .*no-python, which is no program here"
    with pytest.raises(EnvironmentUnable, match=said):
        open_runner(bundle, NAME, "tensorrt")
    tensorrt_python.installed_version.cache_clear()


# --- for real, as far as the stand-ins go --------------------------------------------------------


def test_a_graph_without_a_promised_name(machine, tmp_path):
    """An engine is opened in the Python that has TensorRT, and its names are checked."""
    bundle = with_engines(tmp_path / "out", {})
    with pytest.raises(BundleError, match=r"prefill-4\.plan has no input input_ids"):
        open_runner(bundle, NAME, "tensorrt")


def test_a_session_over_an_engine(machine, tmp_path):
    """Prompts go to the other process under the graph's names, and arrays of its shapes return."""
    kinds = {"tensor(int32)": "INT32", "tensor(bool)": "BOOL", "tensor(float)": "FLOAT"}
    plain = make_bundle(tmp_path / "plain", lengths=(4,), max_batch=1, dynamic=False)
    itself = open_runner(read_bundle(plain), NAME, threads=1)
    tensors = [("INPUT", v) for v in itself.session.get_inputs()]
    tensors += [("OUTPUT", v) for v in itself.session.get_outputs()]
    plan = {"io": [[mode, v.name, kinds[v.type], v.shape] for mode, v in tensors], "layers": []}
    session = Session.open(with_engines(tmp_path / "out", {}, plan=plan).path, backend="tensorrt")
    with session.runner(NAME) as runner:
        assert (runner.version, runner.source.suffix) == (VERSION, ".plan")
        found = session.prefill([[5, 7]])
        expected = Session.open(plain, threads=1).prefill([[5, 7]])
        for mine, theirs in zip(found.ssm_states, expected.ssm_states, strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert found.choices[0].merge.dtype == bool and not found.logits.any()
        assert found.component == NAME
        with pytest.raises(InvalidRequest, match=r"needs the input input_ids, prompt_len"):
            runner.run({})
    with Session.open(session.bundle.path, backend="tensorrt") as again:
        process = again.runner(NAME)._process
        again.close()
        assert process.poll() == 0
        assert not again.prefill([[5, 7]]).logits.any()  # opened anew
        process = again.runner(NAME)._process
    assert process.poll() == 0


# --- the Python that has TensorRT ----------------------------------------------------------------


def test_paths_of_this_python(monkeypatch):
    """Its own path stays, behind this tool and the plugins."""
    monkeypatch.setenv("PYTHONPATH", "/for/this/python")
    monkeypatch.delenv("TOKRED_TENSORRT_PYTHON", raising=False)
    assert tensorrt_python.is_here() and tensorrt_python.interpreter() == sys.executable
    *roots, last = tensorrt_python.environment()["PYTHONPATH"].split(os.pathsep)
    assert {str(ROOT), str(ROOT / "plugins")} == set(roots) and last == "/for/this/python"


def test_paths_of_another_python(tmp_path):
    """It finds this tool and the plugins, not what lies beside them in site-packages.

    The folder that says so goes with the process that made it.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "tokred_export").symlink_to(ROOT / "tokred_export")
    (site / "tokred_plugins").symlink_to(ROOT / "plugins" / "tokred_plugins")
    (site / "beside.py").write_text("")  # as numpy lies there, for this Python only
    other = tmp_path / "another-python"
    other.symlink_to(sys.executable)
    ask_other = (
        "import tokred_export, tokred_plugins, importlib.util;"
        "print(importlib.util.find_spec('beside'))"
    )
    asked = (
        "import beside, os, subprocess; from tokred_export.runtime import tensorrt_python as t;"
        "given = t.environment(); print(given['PYTHONPATH'], flush=True);"
        f"subprocess.run([t.interpreter(), '-c', {ask_other!r}], check=True,"
        " env={**os.environ, **given})"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(site), "TOKRED_TENSORRT_PYTHON": str(other)},
        cwd=tmp_path,
    )  # fmt: skip
    folder, beside = done.stdout.splitlines()
    assert beside == "None"
    assert not Path(folder).exists()
    assert (ROOT / "tokred_export" / "__init__.py").is_file()  # a link went, not what it led to


def test_version_is_asked_as_builds_will_run(monkeypatch, tmp_path):
    """A tensorrt on this Python's own path says nothing about the other."""
    (tmp_path / "tensorrt.py").write_text("__version__ = '9.9.9'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    link = tmp_path / "another-python"
    link.symlink_to(sys.executable)
    for python, version in ((sys.executable, "9.9.9"), (str(link), None)):
        monkeypatch.setenv("TOKRED_TENSORRT_PYTHON", python)
        tensorrt_python.installed_version.cache_clear()
        assert tensorrt_python.installed_version() == version
    tensorrt_python.installed_version.cache_clear()
