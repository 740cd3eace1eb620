"""Verbs over a bundle that was moved, changed, damaged or half rewritten; and gates that count."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import msgspec
import onnx
import pytest
from checkpoints import edit_config, write_transformers
from onnx import numpy_helper

from tokred_export.bundle import read_bundle
from tokred_export.cli import run
from tokred_export.cli._console import table
from tokred_export.runtime.runner import engine_folders


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A checkpoint in ``model`` and its bundle in ``out``, with records of parity and speed."""
    folder = tmp_path_factory.mktemp("built")
    write_transformers(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKRED_CACHE", str(folder / "cache"))
        assert run([*build(folder / "model", folder / "out"), "--bench-seconds", "0.2"]) == 0
        yield folder


@pytest.fixture
def bundle(built, tmp_path):
    """A copy of the bundle, to be harmed."""
    return shutil.copytree(built / "out", tmp_path / "out")


def build(model, out):
    return ["build", str(model), "-o", str(out), "--seq-len", "16", "--sites", "0,1",
            "--keep-ratio", "0.8", "--threads", "1", "--quiet"]  # fmt: skip


def failing(capsys, arguments, code):
    """Run a command line that must fail with ``code``; return what it said."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def bless(bundle):
    """Record the hashes of whatever lies in the bundle now, as a forger would."""
    manifest = json.loads((bundle / "export.json").read_text())
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "export.json").write_text(json.dumps(manifest))


def change_a_weight(path):
    """Make one parameter of an ONNX file a hundredth larger."""
    graph = onnx.load(path)
    tensor = next(t for t in graph.graph.initializer if t.name.endswith("layers.1.conv_weight"))
    array = numpy_helper.to_array(tensor) * numpy_helper.to_array(tensor).dtype.type(1.01)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, path)


def test_a_changed_weight_fails_parity(capsys, bundle):
    """Hashes that were made to fit do not help: 1 % in one weight is seen, and bench refuses."""
    page = bundle / "reports" / "report.md"
    assert "engine reduced" in page.read_text()
    change_a_weight(bundle / "prefill-16.onnx")
    assert "prefill-16.onnx" in failing(capsys, ["verify", bundle, "--quiet"], 4)
    bless(bundle)  # the engine was made of the other file, so that this one is run
    failing(capsys, ["verify", bundle, "--quiet", "--threads", "1"], 1)
    (record,) = json.loads((bundle / "reports" / "parity.json").read_text())
    assert record["backend"] == "onnxruntime (CPU), the ONNX file itself"
    assert "a gate did not hold" in page.read_text()
    assert "engine reduced" not in page.read_text(), "a wrong engine has no speed"
    assert "parity is FAIL" in failing(capsys, ["bench", bundle, "--quiet"], 1)


def test_a_pass_without_an_engine_says_so(capsys, bundle):
    """No gate of an engine can have held where none was run."""
    page = bundle / "reports" / "report.md"
    assert "every gate held." in page.read_text()
    (engine,) = bundle.glob("engines/*/engine.json")
    text = json.loads(engine.read_text())
    text["prefill-16"]["version"] = "1.0.0"
    engine.write_text(json.dumps(text))
    bless(bundle)
    assert run(["verify", str(bundle), "--quiet", "--threads", "1"]) == 0
    said = "every gate held for the ONNX file itself; no engine was run."
    assert said in page.read_text()
    assert said in (bundle / "reports" / "report.html").read_text()


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_a_bundle_that_cannot_be_written(capsys, bundle, verb, monkeypatch):
    """Is refused before anything is measured."""
    monkeypatch.setattr("tokred_export.bundle.os.access", lambda path, mode: mode != os.W_OK)
    said = failing(capsys, [verb, bundle, "--quiet"], 3)
    assert "cannot write to" in said and "records and report pages go" in said


def test_files_that_are_not_of_the_bundle(capsys, bundle):
    """What nobody vouches for is named."""
    assert run(["inspect", str(bundle)]) == 0
    assert "not of the bundle" not in capsys.readouterr().err
    (bundle / "engines" / "run.py").write_text("print()")
    assert run(["inspect", str(bundle)]) == 0
    assert "not of the bundle: engines/run.py" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_finds_no_room(bundle):
    """Is the machine's fault, in one sentence."""
    command = [sys.executable, "-m", "tokred_export", "inspect", "--json", str(bundle)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "error: the result cannot be written (No space left on device)\n"


def test_a_junit_file_that_is_a_folder(capsys, bundle, tmp_path):
    """Before the work, not after."""
    said = failing(capsys, ["verify", bundle, "--junit", tmp_path, "--quiet"], 2)
    assert "is a folder, expected the name of a file" in said


def test_an_engine_for_rtx_is_none_for_tensorrt(bundle):
    """One backend's name begins with the other's."""
    manifest = read_bundle(bundle)
    names = ("engines/tensorrt-rtx-sm89-1.7/engine.json", "engines/tensorrt-sm89-11.4/engine.json")
    files = {**manifest.manifest.files, **dict.fromkeys(names)}
    both = manifest._replace(manifest=msgspec.structs.replace(manifest.manifest, files=files))
    for backend, name in (("tensorrt-rtx", names[0]), ("tensorrt", names[1])):
        assert [f"{folder}/engine.json" for folder in engine_folders(both, backend)] == [name]


def test_the_onnx_file_is_judged_beside_its_engine(capsys, bundle):
    """An engine that is right does not vouch for an ONNX file that is not."""
    change_a_weight(bundle / "prefill-16.onnx")
    (engine,) = bundle.glob("engines/*/engine.json")
    text = json.loads(engine.read_text())
    data = (bundle / "prefill-16.onnx").read_bytes()
    text["prefill-16"]["onnx_files"] = {"prefill-16.onnx": hashlib.sha256(data).hexdigest()}
    engine.write_text(json.dumps(text))
    bless(bundle)
    failing(capsys, ["verify", bundle, "--quiet", "--threads", "1"], 1)
    (record,) = json.loads((bundle / "reports" / "parity.json").read_text())
    assert record["backend"] == "onnxruntime (CPU)"
    assert record["cases"][-1]["description"].endswith("the ONNX file itself")


def test_records_of_another_version(capsys, bundle):
    """A record with unknown keys is no crash; the message says how to get a new one."""
    (bundle / "reports" / "parity.json").write_text('[{"later": 1}]')
    bless(bundle)
    for verb in (["verify", "--stored"], ["report"], ["bench"]):
        assert "tokred-export verify" in failing(capsys, [*verb, bundle, "--quiet"], 4)
    assert run(["verify", str(bundle), "--quiet", "--threads", "1"]) == 0
    assert run(["report", str(bundle), "--quiet"]) == 0


def test_a_verify_killed_before_the_manifest(capsys, bundle):
    """Reports newer than their hashes are named with the remedy, and the next verify mends it."""
    (bundle / "reports" / "parity.json").write_text("[]")
    said = failing(capsys, ["inspect", bundle], 4)
    assert "reports/parity.json" in said and "tokred-export verify" in said
    assert run(["verify", str(bundle), "--quiet", "--threads", "1"]) == 0
    assert run(["inspect", str(bundle), "--quiet"]) == 0


def test_a_checkpoint_that_moved(capsys, built, tmp_path):
    """The message says --model, and --model works."""
    model = shutil.copytree(built / "model", tmp_path / "model")
    assert run([*build(model, tmp_path / "out"), "--no-verify"]) == 0
    model = model.rename(tmp_path / "moved")
    assert "--model" in failing(capsys, ["verify", tmp_path / "out", "--quiet"], 2)
    flags = ["--quiet", "--threads", "1", "--model", str(model)]
    assert run(["verify", str(tmp_path / "out"), *flags]) == 0


def test_a_config_that_changed(capsys, built, bundle, tmp_path):
    """Other constants beside the same weights are no failed gate; the culprit is named."""
    model = shutil.copytree(built / "model", tmp_path / "model")
    edit_config(model, layer_norm_epsilon=1e-3)
    said = failing(capsys, ["verify", bundle, "--quiet", "--model", model], 2)
    assert "norm_eps 0.001, expected 1e-05" in said


@pytest.mark.parametrize("flags", [["--thorough"], ["--model", "else"], ["--device", "cuda"]])
def test_flags_that_stored_would_ignore(capsys, bundle, flags):
    """What would have no effect is refused."""
    assert run(["verify", str(bundle), "--stored", "--quiet"]) == 0
    assert "--stored" in failing(capsys, ["verify", bundle, "--stored", *flags], 2)


def test_no_folder_for_junit(capsys, bundle, tmp_path):
    """Said before anything is measured."""
    file = tmp_path / "nowhere" / "parity.xml"
    assert str(file.parent) in failing(capsys, ["verify", bundle, "--junit", file], 2)


@pytest.mark.parametrize("flag", ["--no-bench", "--no-verify"])
def test_a_speed_gate_without_speed(capsys, built, tmp_path, flag):
    """A gate that nothing goes through would look like one that held."""
    out = tmp_path / "out"
    arguments = [*build(built / "model", out), "--min-speedup", "9", flag]
    assert "--min-speedup" in failing(capsys, arguments, 2)
    assert not out.exists()


@pytest.mark.parametrize("content", ["{", '{"version": "1.0", "model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer(capsys, built, tmp_path, content):
    """It is the checkpoint's fault, and no bundle is left."""
    model = shutil.copytree(built / "model", tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in failing(capsys, [*build(model, tmp_path / "out"), "--no-bench"], 4)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_another_model(capsys, built, tmp_path):
    """Ids beyond the vocabulary are the checkpoint's fault too."""
    from tokred_export.checkpoint.files import DEMO

    model = shutil.copytree(built / "model", tmp_path / "model")
    shutil.copy(DEMO / "tokenizer.json", model)
    said = failing(capsys, [*build(model, tmp_path / "out"), "--no-bench"], 4)
    assert "expected 0 to 60" in said


def test_a_folder_named_export_json(capsys, built, tmp_path):
    """It makes no bundle of the folder around it, and is not replaced."""
    (tmp_path / "out" / "export.json").mkdir(parents=True)
    assert "not a bundle" in failing(capsys, ["inspect", tmp_path / "out"], 4)
    failing(capsys, [*build(built / "model", tmp_path / "out"), "--force"], 2)
    assert (tmp_path / "out" / "export.json").is_dir()


TYPED = {
    'seq-len = 64\nsites = [0, 1]': (64, (0, 1)),
    'seq-len = "1k"\nsites = "0"': (1024, (0,)),
    'seq-len = [64]\nsites = 1': (64, (1,)),
}


@pytest.mark.parametrize("text", TYPED)
def test_a_config_file_reads_values_as_typed(capsys, built, tmp_path, text):
    """Numbers, texts and lists mean what the flags mean."""
    file = tmp_path / "tokred.toml"
    file.write_text(text + "\nkeep-ratio = 0.8\njson = true\n")
    capsys.readouterr()
    assert run(["plan", str(built / "model"), "--config", str(file)]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    length, sites = TYPED[text]
    assert plan["schedule"]["length"] == length
    assert tuple(site["layer"] for site in plan["schedule"]["sites"]) == sites


WRONG = {
    "seq-len = [64.5]": "64.5", "round-to = 1.5": "1.5", "json = 1": "true or false",
    'sites = ["a"]': "'a'", "sites = true": "one text or number", "reduce = 30": "30%",
    "method = [1, 2]": "one text or number", "reduce = {a = 1}": "one text or number",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_config_file_with_wrong_values(capsys, built, tmp_path, text):
    """Nothing is rounded or guessed."""
    file = tmp_path / "tokred.toml"
    file.write_text(text + "\n")
    assert WRONG[text] in failing(capsys, ["plan", built / "model", "--config", file], 2)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away(flags):
    """It is no failed gate, and nobody is told of it."""
    program = [sys.executable, "-m", "tokred_export", "plan", *flags]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141


def test_names_in_a_pipe_are_whole(capsys):
    """A table that no terminal shows is as wide as its words."""
    words = [f"{column}-" + "x" * 50 for column in range(6)]
    table("Wide", words, [words])
    shown = capsys.readouterr().out
    assert [shown.count(word) for word in words] == [2] * 6
