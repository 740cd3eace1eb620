"""Every kind of bad input: one sentence on stderr, its exit code, no damaged output folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config, edit_weights, write_mamba_ssm, write_transformers

from tokred_export.cli import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("TOKRED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A good small checkpoint."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_transformers(folder)
    return folder


def failing(capsys, arguments, code):
    """Run a command line that must fail with ``code``; return what it said."""
    assert run([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if "--json" in arguments:
        said = json.loads(captured.out)
        assert said["exit_code"] == code and said["error"]
        assert " ".join(said["error"].split()) in " ".join(captured.err.split())
    else:
        assert captured.out == ""
    return captured.err


def build(model, out, *more):
    return ["build", model, "-o", out, "--seq-len", "64", "--sites", "0,1", "--quiet", *more]


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def wrong_shape(tensors):
    name = first(tensors, "out_proj.weight")
    tensors[name] = tensors[name][:-1].clone()


def not_a_number(tensors):
    tensors[first(tensors, "in_proj.weight")][3, 4] = torch.nan


DAMAGES = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "weights"),
    "truncated weights": (truncate, "model.safetensors"),
    "wrong shape": (lambda m: edit_weights(m, wrong_shape), "out_proj"),
    "NaN": (lambda m: edit_weights(m, not_a_number), "in_proj"),
    "unknown architecture": (lambda m: edit_config(m, model_type="llama"), "llama"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(capsys, model, tmp_path, damage):
    """Exit code 4, the culprit named, no bundle."""
    harm, culprit = DAMAGES[damage]
    harm(model)
    said = failing(capsys, build(model, tmp_path / "out"), 4)
    assert culprit in said
    assert not (tmp_path / "out").exists()


REQUESTS = {
    "no such folder": (["build", "no/such/folder", "-o", "OUT"], "no/such/folder"),
    "site beyond the last layer": (["--sites", "0,7"], "7"),
    "sites out of order": (["--sites", "1,0"], "1"),
    "no tokens left": (["--reduce", "99%"], "99"),
    "beyond 100 %": (["--reduce", "120%"], "120%"),
    "not a share": (["--reduce", "some"], "some"),
    "not a size": (["--seq-len", "2q"], "2q"),
    "no length": (["--seq-len", "0"], "0"),
    "a length twice": (["--seq-len", "64"], "twice"),
    "bfloat16 on the CPU": (["--dtype", "bfloat16"], "bfloat16"),
    "unknown method": (["--method", "magic"], "magic"),
    "unknown flag": (["--sequence-length", "64"], "--sequence-length"),
    "long tail": (["--protect-tail", "60"], "60"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_that_cannot_be_meant(capsys, model, tmp_path, request_):
    """Exit code 2, what was found named, no bundle."""
    flags, culprit = REQUESTS[request_]
    out = tmp_path / "out"
    arguments = (
        [out if a == "OUT" else a for a in flags]
        if flags[0] == "build"
        else build(model, out, *flags)
    )
    assert culprit in failing(capsys, arguments, 2)
    assert not out.exists()


def test_pickles_with_code_are_refused(capsys, tmp_path):
    """A pickle may not run anything."""

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    folder = tmp_path / "model"
    folder.mkdir()
    write_mamba_ssm(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"backbone.norm_f.weight": Harm()}, folder / "pytorch_model.bin")
    failing(capsys, build(folder, tmp_path / "out"), 4)
    assert not (tmp_path / "harmed").exists()


def test_foreign_folders_are_left_alone(capsys, model, tmp_path):
    """An output folder with something else in it is refused, even with --force."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("five years")
    failing(capsys, build(model, out, "--force"), 2)
    assert (out / "thesis.tex").read_text() == "five years"


def test_a_full_disk(capsys, model, tmp_path, monkeypatch):
    """Exit code 3, and no half bundle."""
    import shutil

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    said = failing(capsys, build(model, tmp_path / "out", "--no-verify"), 3)
    assert "full" in said or "space" in said
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_no_gpu(capsys, model, tmp_path):
    """Exit code 3 before any work is done."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has ONNX Runtime for CUDA")
    said = failing(capsys, build(model, tmp_path / "out", "--device", "cuda"), 3)
    assert "CUDA" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_config_file(capsys, model, tmp_path):
    """Keys as the flags; a flag wins; an unknown key names the nearest."""
    config = tmp_path / "tokred.toml"
    config.write_text('reduce = "10%"\nmethod = "evit"\n')
    flags = ["plan", model, "--seq-len", "64", "--sites", "0,1", "--json", "--config", config]
    assert run([str(a) for a in flags]) == 0
    schedule = json.loads(capsys.readouterr().out)["plans"][0]["schedule"]
    assert schedule["method"] == "evit"
    assert run([str(a) for a in [*flags, "--method", "pumer"]]) == 0
    schedule = json.loads(capsys.readouterr().out)["plans"][0]["schedule"]
    assert schedule["method"] == "pumer"
    config.write_text('redcue = "10%"\n')
    assert "reduce" in failing(capsys, flags, 2)
    config.write_text("reduce = \n")
    assert "TOML" in failing(capsys, flags, 2)


def test_environment_variables(capsys, model, monkeypatch):
    """TOKRED_<VERB>_<FLAG> stands for a flag."""
    monkeypatch.setenv("TOKRED_PLAN_METHOD", "evit")
    flags = ["plan", model, "--seq-len", "64", "--sites", "0,1", "--json"]
    assert run([str(a) for a in flags]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["schedule"]["method"] == "evit"


def test_environment_variables_are_named_for_flags(capsys, model, monkeypatch):
    """Not for what a flag's value is called in the code; a flag still wins."""
    monkeypatch.setenv("TOKRED_PLAN_REDUCE", "30%")
    monkeypatch.setenv("TOKRED_PLAN_SEQ_LEN", "64")
    monkeypatch.setenv("TOKRED_PLAN_JSON", "1")

    def planned(*more):
        assert run(["plan", str(model), "--sites", "0,1", *more]) == 0
        return json.loads(capsys.readouterr().out)["plans"][0]["schedule"]

    thirty = planned()
    assert thirty["length"] == 64 and thirty == planned("--reduce", "30%")
    assert thirty != planned("--reduce", "20%")
    monkeypatch.setenv("TOKRED_PLAN_REDUCE", "130%")
    assert "130" in failing(capsys, ["plan", model], 2)


def test_flags_that_contradict_each_other(capsys, model):
    """In whatever order; a default contradicts nothing."""
    for flags, said in (
        (["--method", "none", "--reduce", "50%"], "--method none removes no token"),
        (["--reduce", "50%", "--method", "none"], "--method none removes no token"),
        (["--keep-ratio", "0.9", "--reduce", "30%"], "--keep-ratio takes the place of --reduce"),
    ):
        assert said in failing(capsys, ["plan", model, "--seq-len", "64", *flags], 2)
    for flags in (["--method", "none"], ["--keep-ratio", "0.9", "--sites", "0,1"]):
        assert run(["plan", str(model), "--seq-len", "64", *flags]) == 0


def test_a_config_file_that_contradicts_itself(capsys, model, tmp_path):
    """As flags that do; a flag beside it wins."""
    config = tmp_path / "c.toml"
    command = ["plan", str(model), "--seq-len", "64", "--config", str(config)]
    for text, said in (
        ('reduce = "30%"\nkeep-ratio = 0.9\n', "keep-ratio takes the place of reduce"),
        ('reduce = "30%"\nmethod = "none"\n', "method none removes no token"),
    ):
        config.write_text(text)
        found = failing(capsys, command, 2)
        assert said in found and str(config) in found.replace("\n", "")
    config.write_text('reduce = "30%"\n')
    assert run([*command, "--method", "none"]) == 0


def test_recorded_commands_stand_alone(capsys, model, tmp_path, monkeypatch):
    """Variables and files are written out as flags: the record is read where neither is."""
    config, out = tmp_path / "a file.toml", tmp_path / "out"
    config.write_text(
        f'model = "{model}"\nsites = [0, 1]\nno-verify = true\nseq-len = [32, "64"]\n'
    )
    monkeypatch.setenv("TOKRED_BUILD_KEEP_RATIO", "0.8")
    monkeypatch.setenv("TOKRED_BUILD_QUIET", "1")
    monkeypatch.setenv("TOKRED_BUILD_CONFIG", str(config))
    words = ["tokred-export", "build", "-o", str(out)]
    monkeypatch.setattr("sys.argv", words)
    assert run() == 0
    made = json.loads((out / "export.json").read_text())
    command = made["provenance"]["command"]
    for flag in ("--sites 0,1", "--no-verify", "--seq-len 32 --seq-len 64", "--keep-ratio 0.8"):
        assert flag in command
    assert "--config" not in command and "a file" not in command and str(model) in command
    monkeypatch.delenv("TOKRED_BUILD_KEEP_RATIO")
    monkeypatch.delenv("TOKRED_BUILD_CONFIG")
    monkeypatch.setattr("sys.argv", [*shlex.split(command), "--force"])
    assert run() == 0
    again = json.loads((out / "export.json").read_text())
    assert {n: f["sha256"] for n, f in again["files"].items() if n.endswith(".onnx")} == {
        n: f["sha256"] for n, f in made["files"].items() if n.endswith(".onnx")
    }


def test_a_config_with_too_many_layers(capsys, model, tmp_path):
    """Refused at once, before a name of every tensor fills the memory."""
    edit_config(model, num_hidden_layers=10**9)
    assert "num_hidden_layers" in failing(capsys, build(model, tmp_path / "out"), 4)


def test_pytorch_out_of_memory(capsys, model, tmp_path, monkeypatch):
    """It raises a RuntimeError like any other; while exporting too it is the machine's fault."""

    def full(*args, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(torch.export, "export", full)
    for more in ((), ("--json",)):
        said = failing(capsys, build(model, tmp_path / "out", *more), 3)
        assert "out of memory: use a machine with more" in said
    assert not (tmp_path / "out").exists()


def test_a_mount_point_is_no_bundle(capsys, model, tmp_path, monkeypatch):
    """A finished folder cannot be renamed to it: said before the work, not after."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    assert "is a mount point" in failing(capsys, build(model, tmp_path / "volume"), 2)


def test_names_that_no_disk_takes(capsys, model, tmp_path):
    """Too long a name is a sentence."""
    assert "cannot write to" in failing(capsys, build(model, tmp_path / ("x" * 300)), 3)


@pytest.mark.parametrize("method", ["utrc", "evit"])
def test_activations_that_overflow(capsys, model, tmp_path, method):
    """A failed gate with a bundle and a report, not a record that nobody can read."""

    def grow(tensors):
        name = next(n for n in tensors if n.endswith("layers.1.mixer.in_proj.weight"))
        tensors[name] *= 1e30

    edit_weights(model, grow)
    out = tmp_path / "out"
    flags = ["--method", method, "--reduce", "10%", "--no-bench", "--sites", "0,1"]
    assert run([str(a) for a in ["build", model, "-o", out, "--seq-len", "64", *flags]]) == 1
    said = capsys.readouterr()
    assert "holds values that are NaN or infinite" in said.out
    assert "not finite" in (out / "reports" / "report.md").read_text()
    assert run(["verify", str(out), "--stored"]) == 1


@pytest.mark.parametrize("verb", ["verify", "bench", "report", "inspect"])
def test_no_bundle(capsys, tmp_path, verb):
    """A folder that is no bundle, or no folder at all."""
    failing(capsys, [verb, tmp_path / "nothing"], 2)
    (tmp_path / "empty").mkdir()
    assert "export.json" in failing(capsys, [verb, tmp_path / "empty"], 4)


def test_internal_errors_are_not_gates(capsys, monkeypatch):
    """A crash exits with 70, since 1 would read as a failed gate."""
    import tokred_export.doctor

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(tokred_export.doctor, "diagnose", broken)
    assert run(["doctor"]) == 70
    assert "a bug" in capsys.readouterr().err


def test_doctor(capsys):
    """Every backend has an answer and a reason."""
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["onnxruntime (CPU)"]["can_run"]
    assert all(backend["reason"] for backend in found["backends"].values())
    assert run(["doctor"]) == 0
    assert "tensorrt-rtx" in capsys.readouterr().out
