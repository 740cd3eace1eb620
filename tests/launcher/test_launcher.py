"""The C++ launcher plugin with the fields of real kernels: what it asks the driver to do.

Without TensorRT and without a driver; ``launcher_stage.py`` says how.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launcher_stage import CHAR, DATA_TYPES, INT32, SOURCES, expected_launch

from tokred_export.runtime.trt import launcher_release


def test_creator_lists_what_lower_writes(stage, built, fields):
    """TensorRT's parser passes on the attributes that the creator names, in its types."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built / "driver")}
    done = subprocess.run([built / "player10", built / "plugin10.so"], input="", text=True,
                          capture_output=True, env=environment, check=True)
    count, name, version, *listed = done.stdout.split()
    assert (count, name, version) == ("1", "tokred::KernelLaunch", "1")
    written = fields["conv"]["fields"]
    kinds = {n: CHAR if isinstance(v, str) else INT32 for n, v in written.items()
             if n not in ("plugin_namespace", "plugin_version")}
    assert sorted(listed) == sorted(f"{n}={kind}" for n, kind in kinds.items())


@pytest.mark.parametrize("major", [8, 10])
def test_library_names_its_release(built, major):
    """In the file itself: loading it into another major release could only crash."""
    assert launcher_release(built / f"plugin{major}.so") == (major, 6)


@pytest.mark.parametrize("major", [8, 10])
@pytest.mark.parametrize("name", ["norm", "conv", "scan", "scan-90", "link"])
def test_launch(stage, fields, name, major):
    """Arguments are inputs, extras, outputs; the grid is the call's, with the batch along z."""
    facts = fields[name]
    played = stage.play(
        stage.node("n", facts["fields"], nul=major == 8), "initialize n", "enqueue n 3",
        "enqueue n 1", "terminate n", "destroy n", sm=facts["fields"]["target"], major=major,
    )
    assert played.said == ["made", "0", "0", "0"]
    assert played.calls("cuLaunchKernel") == [expected_launch(facts, b) for b in (3, 1)]
    assert played.calls("cuModuleGetFunction") == [f"module=1 {facts['fields']['entry']}"]
    assert Path(f"{played.record}.1").read_text() == facts["fields"]["ptx"]
    shared = facts["fields"]["shared"]
    assert (shared > 48 * 1024) == name.startswith("scan")
    assert played.calls("cuFuncSetAttribute") == (
        [f"module=1 shared={shared}"] if name.startswith("scan") else []
    )


@pytest.mark.parametrize(
    ("name", "size"), [("linear-90", 384), ("linear-hopper", 384), ("walk-hopper", 256)]
)
def test_scratch_memory(stage, fields, tmp_path, name, size):
    """A kernel that builds descriptors gets room for each block of the grid, last of all."""
    facts, plan = fields[name], tmp_path / "plan"
    assert facts["fields"]["scratch"] == size
    played = stage.play(
        stage.node("n", facts["fields"]), "initialize n", "enqueue n 3", f"serialize n {plan}",
        f"deserialize m {plan}", "initialize m", "enqueue m 1", sm=90,
    )
    x, y = facts["grid"]
    sizes = [f"workspace {size * x * y * batch}" for batch in (3, 1)]
    assert played.said == ["made", "0", sizes[0], "0", "made", "0", sizes[1], "0"]
    assert played.calls("cuLaunchKernel") == [
        f"{expected_launch(facts, batch)},0xc00000000000" for batch in (3, 1)]


def test_a_kernel_without_extras(stage, fields):
    """An empty string may be all that there is of extras."""
    facts = fields["conv"]
    (extra,) = re.findall(r",\n[^,\n]*\.param \.u32 [^,\n]*", facts["fields"]["ptx"])
    less = {**facts["fields"], "ptx": facts["fields"]["ptx"].replace(extra, ""), "extras": ""}
    for nul in (False, True):
        played = stage.play(stage.node("n", less, nul=nul), "initialize n", "enqueue n 1")
        assert played.calls("cuLaunchKernel") == [expected_launch({**facts, "extras": []}, 1)]


def test_nothing_but_launches_between_initialize_and_terminate(stage, fields):
    """A stream may be capturing: anything else than a launch could break the capture."""
    played = stage.play(
        stage.node("n", fields["scan"]["fields"]), "initialize n", "clone n context", *(
            ["enqueue context 1"] * 3), "destroy context", "destroy n",
    )
    names = [line.split()[0] for line in played.asked]
    start = names.index("cuFuncSetAttribute")
    assert names[start + 1:] == ["cuLaunchKernel"] * 3 + [
        "cuCtxPushCurrent", "cuModuleUnload", "cuCtxPopCurrent"]


def test_limit_of_shared_memory(stage, fields):
    """Exactly 48 KiB needs no asking, one byte more does."""
    for shared, times in ((48 * 1024, 0), (48 * 1024 + 1, 1)):
        played = stage.play(stage.node("n", fields["conv"]["fields"], shared=shared),
                            "initialize n", "enqueue n 1")
        assert len(played.calls("cuFuncSetAttribute")) == times
        assert f"shared={shared} " in played.calls("cuLaunchKernel")[0]


def test_batches(stage, fields):
    """No rows, no launch; more than a grid can hold is a sentence."""
    create = stage.node("n", fields["conv"]["fields"])
    played = stage.play(create, "initialize n", "enqueue n 0", "enqueue n 65535")
    assert played.said == ["made", "0", "0", "0"]
    assert played.calls("cuLaunchKernel") == [expected_launch(fields["conv"], 65535)]
    for batch in (65536, -1, 2**32 + 1):
        played = stage.play(create, "initialize n", f"enqueue n {batch}")
        assert played.results[-1] == "1" and not played.calls("cuLaunchKernel")
        assert played.message == (
            f"kernel causal_conv1d takes a batch of at most 65535, found {batch}"
        )


def test_equal_code_is_one_module(stage, fields):
    """Layers of other lengths share the code; the last user unloads it."""
    conv, shorter = fields["conv"], fields["conv-1707"]
    assert conv["fields"]["ptx"] == shorter["fields"]["ptx"]
    played = stage.play(
        stage.node("a", conv["fields"]), stage.node("b", shorter["fields"]),
        stage.node("c", fields["norm"]["fields"]),
        "initialize a", "initialize b", "initialize c", "clone a d", "enqueue a 1", "enqueue b 1",
        "terminate a", "destroy a", "terminate b", "destroy b", "terminate c", "enqueue d 2",
        "destroy d",
    )
    assert played.calls("cuModuleLoadDataEx") == ["module=1 context=1", "module=2 context=1"]
    assert played.calls("cuLaunchKernel") == [
        expected_launch(conv, 1), expected_launch(shorter, 1), expected_launch(conv, 2)]
    assert played.calls("cuModuleUnload") == ["module=2", "module=1"]
    assert played.asked[-2:] == ["cuModuleUnload module=1", "cuCtxPopCurrent"]


def test_other_code_is_another_module(stage, fields):
    """Also where the entry has the same name."""
    first, second = fields["conv"], fields["conv-bf16"]
    assert first["fields"]["entry"] == second["fields"]["entry"]
    played = stage.play(
        stage.node("a", first["fields"]), stage.node("b", second["fields"]), "initialize a",
        "initialize b", "enqueue a 1", "enqueue b 1",
    )
    assert played.calls("cuLaunchKernel") == [
        expected_launch(first, 1, 1), expected_launch(second, 1, 2)]
    assert Path(f"{played.record}.2").read_text() == second["fields"]["ptx"]


def test_other_shared_memory_is_another_module(stage, fields):
    """What was asked for with the first would be too little for the second."""
    conv = fields["conv"]["fields"]
    played = stage.play(
        stage.node("a", conv, shared=50_000), stage.node("b", conv, shared=60_000),
        "initialize a", "initialize b",
    )
    assert played.calls("cuFuncSetAttribute") == [
        "module=1 shared=50000", "module=2 shared=60000"]


def test_a_module_that_is_gone_is_loaded_anew(stage, fields):
    """TensorRT's builder initialises and terminates a plugin many times."""
    rounds = ["initialize n", "enqueue n 1", "terminate n"] * 3
    played = stage.play(stage.node("n", fields["conv"]["fields"]), *rounds, "enqueue n 1")
    assert played.calls("cuLaunchKernel") == [
        expected_launch(fields["conv"], 1, module) for module in (1, 2, 3)]
    assert played.calls("cuModuleUnload") == ["module=1", "module=2", "module=3"]
    assert played.results[-1] == "1"
    assert played.message == "kernel causal_conv1d was not initialised"


def test_contexts(stage, fields):
    """A module belongs to its context: there it is loaded, launched and unloaded."""
    create = stage.node("n", fields["conv"]["fields"])
    played = stage.play(
        create, "initialize n", "clone n other", "context 2", "initialize other",
        "enqueue other 1", "destroy n", "destroy_in_thread other",
    )
    assert played.results == ["made", "0", "made", "0", "0"]
    assert played.calls("cuModuleLoadDataEx") == ["module=1 context=1", "module=2 context=2"]
    assert played.asked.count("cuModuleUnload module=1") == 1
    assert played.asked.count("cuModuleUnload module=2") == 1
    assert not [line for line in played.asked if "another context" in line]

    played = stage.play(create, "initialize n", "context 2", "enqueue n 1")
    assert played.results[-1] == "1"
    assert played.message == (
        "kernel causal_conv1d was loaded in another CUDA context than the current one: create an "
        "engine and run it in the same (CUDA error 400: error text 400)")

    played = stage.play(create, "initialize n", "destroy_context 1", "context 2", "destroy n")
    assert not played.calls("cuModuleUnload")  # it went with its context


def test_engines_that_outlive_everything(stage, fields):
    """A plugin destroyed after static objects, and after the driver is gone, does no harm."""
    played = stage.play(stage.node("n", fields["scan"]["fields"]), "initialize n", "enqueue n 1")
    assert played.said == ["made", "0", "0"] and not played.calls("cuModuleUnload")


def test_threads(stage, fields):
    """Execution contexts come and go in threads: what is loaded is unloaded, once."""
    played = stage.play(stage.node("n", fields["conv"]["fields"]), "race n 8", "initialize n",
                        "race n 4", "terminate n")
    assert played.said == ["made", "0"]
    loaded = [line.split()[0] for line in played.calls("cuModuleLoadDataEx")]
    assert sorted(loaded) == sorted(played.calls("cuModuleUnload"))
    assert len(set(loaded)) == len(loaded)
    assert len(played.calls("cuLaunchKernel")) == (8 + 4) * 25
    last = played.asked.index(f"cuModuleLoadDataEx {loaded[-1]} context=1")
    assert sum("cuLaunchKernel" in line for line in played.asked[last:]) >= 4 * 25


def test_plan(stage, fields, tmp_path):
    """What a plan holds makes the same plugin again."""
    plan, again = tmp_path / "plan", tmp_path / "again"
    inputs, outputs = len(fields["scan"]["inputs"]), len(fields["scan"]["outputs"])
    asked = ("initialize n", "enqueue n 5", f"dims n {inputs}", f"formats n {inputs} {outputs}")
    made = stage.play(stage.node("n", fields["scan"]["fields"], nul=True), f"serialize n {plan}",
                      *asked)
    read = stage.play(f"deserialize n {plan}", f"serialize n {again}", *asked)
    assert made.said == read.said and made.asked == read.asked
    assert made.calls("cuLaunchKernel") == [expected_launch(fields["scan"], 5)]
    assert sum(line.startswith("takes ") for line in made.said) == inputs + outputs
    assert plan.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["norm", "conv", "conv-bf16", "scan", "link"])
def test_shapes_and_formats(stage, fields, name):
    """The batch stays open, and exactly the described types are taken, as plain rows."""
    facts = fields[name]
    inputs, outputs = facts["inputs"], facts["outputs"]
    played = stage.play(stage.node("n", facts["fields"]), f"dims n {len(inputs)}",
                        f"formats n {len(inputs)} {len(outputs)}")
    types = [DATA_TYPES[t] for t in (*inputs, *(dtype for dtype, *_ in outputs))]
    assert played.said == [
        "made",
        *(" ".join(map(str, ("dims", "batch", *dims, "type", DATA_TYPES[dtype])))
          for dtype, *dims in outputs),
        *(f"takes {t}/0" for t in types),
    ]


@pytest.mark.parametrize(("name", "sm", "runs"), [
    ("conv", 80, True), ("conv", 86, True), ("conv", 90, True), ("conv", 120, True),
    ("conv", 75, False), ("link", 86, False), ("link", 87, True), ("link", 110, True),
    ("scan-90", 90, True), ("scan-90", 100, False), ("scan-90", 89, False),
    ("conv-100", 100, True), ("conv-100", 103, False), ("conv-100", 110, False),
])  # fmt: skip
def test_gpus(stage, fields, name, sm, runs):
    """Code of 8.x runs there and on what is newer; that of 9.0 and later on its own GPU alone."""
    facts = fields[name]["fields"]
    played = stage.play(stage.node("n", facts), "initialize n", sm=sm)
    assert played.results == ["made", "0" if runs else "1"]
    assert bool(played.calls("cuModuleLoadDataEx")) == runs
    if not runs:
        target = facts["target"]
        assert played.message == (
            f"kernel {facts['kernel']} for compute capability {target // 10}.{target % 10} does "
            f"not run on Pretended GPU ({sm // 10}.{sm % 10}): build the engine for it")


HEADERS = [f for f in os.environ.get("TOKRED_TENSORRT_HEADERS", "").split(os.pathsep) if f]


@pytest.mark.skipif(not HEADERS, reason="TOKRED_TENSORRT_HEADERS names no TensorRT headers")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is missing")
@pytest.mark.parametrize("headers", HEADERS)
def test_real_headers(tmp_path, headers):
    """CMake builds the library against TensorRT's own headers without a warning."""
    source = ["-S", SOURCES, "-B", tmp_path, f"-DTENSORRT_INCLUDE_DIR={headers}"]
    subprocess.run(["cmake", *source, "-DCMAKE_CXX_FLAGS=-Werror"], check=True)
    done = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done.stderr
    exported = subprocess.run(["nm", "-D", "--defined-only", tmp_path / "libtokred_launcher.so"],
                              capture_output=True, text=True, check=True).stdout
    assert {"getPluginCreators", "setLoggerFinder"} <= {
        line.split()[-1] for line in exported.splitlines()}
