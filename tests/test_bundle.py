"""Bundles: whole or absent, checked byte for byte, and refused with a clear sentence."""

import errno
import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from tokred_export.bundle import (
    read_bundle,
    update_files,
    verify_files,
    write_manifest,
    writing_bundle,
)
from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.manifest import (
    BundleSpec,
    Component,
    ComponentMetadata,
    Manifest,
    decode_io,
    describe_reduction,
    make_provenance,
    prefill_io,
)
from tokred_export.specs import ModelSpec, ReductionSchedule, ReductionSpec, Site

MODEL = ModelSpec(
    layout="mamba_ssm", vocab_size=11, d_model=4, n_layer=2, d_inner=4, n_heads=2, head_dim=2,
    d_state=3, norm_group_size=4,
)  # fmt: skip
COMMAND = "tokred-export build demo -o out"


def manifest():
    """A manifest with one prefill component and one site."""
    schedule = ReductionSchedule(
        method="utrc", length=8, sites=(Site(layer=0, tokens_in=8, tokens_out=6),)
    )
    metadata = ComponentMetadata(phase="prefill", seq_len=8, length_out=6, opset=18, sites=(0,))
    return Manifest(
        components={"prefill-8": Component(file="prefill-8.onnx", metadata=metadata)},
        spec=BundleSpec(model=MODEL, reduction=ReductionSpec(), schedules={8: schedule}),
        io={"prefill-8": prefill_io(n_layer=2, n_sites=1)},
        provenance=make_provenance("demo", "0" * 64, COMMAND),
    )


def fill(folder, content=b"graph"):
    """Write a component and the manifest into a folder."""
    (folder / "prefill-8.onnx").write_bytes(content)
    (folder / "engines").mkdir()
    (folder / "engines" / "engine.json").write_bytes(b"{}")
    return write_manifest(folder, manifest())


def build(target, content=b"graph", force=False):
    """Write a whole bundle."""
    with writing_bundle(target, force=force) as folder:
        fill(folder, content)


def edit(target, **changes):
    """Change keys of a written manifest as a careless hand would."""
    path = target / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leftovers(folder):
    """Hidden siblings that writing may have left."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path):
    """What is read back is what was written, with every file listed but the manifest."""
    with writing_bundle(tmp_path / "a" / "out") as folder:
        written = fill(folder)
        assert not (tmp_path / "a" / "out").exists()
    bundle = read_bundle(tmp_path / "a" / "out")
    verify_files(bundle)
    assert bundle.manifest == written
    assert set(written.files) == {"prefill-8.onnx", "engines/engine.json"}
    assert written.spec.schedules[8].length_out == 6
    assert leftovers(tmp_path / "a") == []


def test_io_names_are_complete():
    """The I/O map lists inputs and outputs by meaning, for prefill and for decode."""
    prefill, decode = prefill_io(2, 1), decode_io(2)
    assert prefill.inputs == ("input_ids", "prompt_len")
    assert prefill.outputs == (
        "logits", "kept_positions", "choice.src.0", "choice.dst.0", "choice.merge.0",
        "present.conv_state.0", "present.conv_state.1", "present.ssm_state.0",
        "present.ssm_state.1",
    )  # fmt: skip
    assert decode.inputs == (
        "token", "conv_state.0", "conv_state.1", "ssm_state.0", "ssm_state.1"
    )  # fmt: skip
    assert decode.outputs[0] == "logits" and decode.kept_positions is None


@pytest.mark.parametrize(
    ("io", "said"),
    [
        ({"other": prefill_io(2, 1)}, "components are"),
        ({"prefill-8": prefill_io(2, 2)}, "1 sites, but io 2 choices"),
        ({"prefill-8": prefill_io(3, 1)}, "each of 2 layers"),
    ],
)
def test_manifest_contradictions(io, said):
    """A manifest whose I/O map does not match its components is refused when made."""
    fields = msgspec.structs.asdict(manifest())
    with pytest.raises(ValueError, match=said):
        Manifest(**fields | {"io": io})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": {}, "io": {}}, "no components"),
        ({"schedules": {}}, "no schedule that fits prefill prefill-8"),
        ({"schedules": {8: ReductionSchedule(method="none", length=8)}}, "no schedule that fits"),
    ],
)
def test_manifest_without_what_a_proof_needs(changes, said):
    """A manifest without a graph, or without the schedule of one, is refused when made."""
    fields = msgspec.structs.asdict(manifest())
    if "schedules" in changes:
        changes = {"spec": msgspec.structs.replace(fields["spec"], **changes)}
    with pytest.raises(ValueError, match=said):
        Manifest(**fields | changes)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target": 0.125}, "utrc 12.5%"),
        ({"keep_ratio": 0.9, "method": "evit"}, "evit, every site keeps 0.9"),
        ({"method": "none"}, "none"),
    ],
)
def test_a_reduction_in_words(asked, said):
    """What was asked for is told, not the default beside it."""
    assert describe_reduction(ReductionSpec(**asked)) == said


def test_failing_block_leaves_nothing(tmp_path):
    """An error inside the block goes through, and neither target nor temporary remains."""
    with pytest.raises(RuntimeError, match="boom"), writing_bundle(tmp_path / "out") as folder:
        fill(folder)
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_failing_replacement_keeps_the_old_bundle(tmp_path):
    """A failed build over an existing bundle leaves that bundle as it was."""
    build(tmp_path / "out", b"old")
    with pytest.raises(RuntimeError), writing_bundle(tmp_path / "out", force=True) as folder:
        fill(folder, b"new")
        raise RuntimeError
    verify_files(read_bundle(tmp_path / "out"))
    assert (tmp_path / "out" / "prefill-8.onnx").read_bytes() == b"old"


def test_block_without_manifest_is_refused(tmp_path):
    """A folder without a manifest never becomes a bundle."""
    with pytest.raises(BundleError, match=r"export\.json"), writing_bundle(tmp_path / "out") as f:
        (f / "prefill-8.onnx").write_bytes(b"graph")
    assert list(tmp_path.iterdir()) == []


def test_existing_targets(tmp_path):
    """Foreign folders and files are never touched; a bundle only with force; empty is fine."""
    foreign, file, empty = tmp_path / "foreign", tmp_path / "file", tmp_path / "empty"
    foreign.mkdir()
    (foreign / "export.json").write_text('{"name": "somebody else\'s"}')
    file.write_text("mine")
    empty.mkdir()
    for target in (foreign, file):
        with pytest.raises(InvalidRequest, match="not a bundle"):
            build(target, force=True)
    assert file.read_text() == "mine" and len(list(foreign.iterdir())) == 1
    build(empty)
    with pytest.raises(InvalidRequest, match="--force"):
        build(empty)
    build(empty, b"new graph", force=True)
    verify_files(read_bundle(empty))
    assert (empty / "prefill-8.onnx").read_bytes() == b"new graph"
    assert leftovers(tmp_path) == []


def test_linked_target_is_replaced_where_it_is(tmp_path):
    """A target that is a link keeps being one; the folder it leads to is replaced."""
    build(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to("real")
    build(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "prefill-8.onnx").read_bytes() == b"new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    """A full disk is one clear sentence, and the temporary folder is gone."""
    with (
        pytest.raises(EnvironmentUnable, match=r"disk ran full.*free some space"),
        writing_bundle(tmp_path / "out"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")
        file.flush()
    assert list(tmp_path.iterdir()) == []


def test_other_disk_errors_pass_unchanged(tmp_path):
    """An error that is not about the disk being full keeps its own name."""
    with pytest.raises(OSError) as caught, writing_bundle(tmp_path / "out"):
        raise OSError(errno.EIO, "input/output error")
    assert caught.value.errno == errno.EIO


def test_parent_that_cannot_be_written(tmp_path, monkeypatch):
    """A parent folder without permission is the environment's fault, and says where."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(EnvironmentUnable, match="cannot write to"), writing_bundle(tmp_path / "o"):
        pytest.fail("the block must not run")


def test_parent_that_is_a_file(tmp_path):
    """A target below a file cannot be written, and the file stays."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentUnable, match="Not a directory"):
        build(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
import os, sys, time
from pathlib import Path
from tokred_export.bundle import writing_bundle
with writing_bundle(Path(sys.argv[1]), force=True) as folder:
    (folder / "prefill-8.onnx").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start(script, *args):
    """Start a Python script and wait until it prints its first line."""
    process = subprocess.Popen([sys.executable, "-c", script, *args], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def kill(process):
    """Kill a process the hard way and wait until it is gone."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_killed_build_leaves_no_half_bundle(tmp_path):
    """A writer killed midway leaves the target absent; the next build cleans up and succeeds."""
    target = tmp_path / "out"
    process = start(KILLED, str(target))
    (half,) = leftovers(tmp_path)
    other = tmp_path / ".other.tmp-1"
    other.mkdir()
    try:
        build(target)  # a living writer's folder is not touched
        assert half in leftovers(tmp_path)
    finally:
        kill(process)
    assert read_bundle(target)
    build(target, force=True)
    verify_files(read_bundle(target))
    assert leftovers(tmp_path) == [other.name]


def test_killed_first_build(tmp_path):
    """After a kill the target path does not exist, and building again succeeds."""
    target = tmp_path / "out"
    kill(start(KILLED, str(target)))
    assert not target.exists() and len(leftovers(tmp_path)) == 1
    build(target)
    assert leftovers(tmp_path) == []


def test_killed_between_the_renames(tmp_path):
    """A bundle that a killed build had moved aside comes back before anything else happens."""
    target = tmp_path / "out"
    build(target, b"old")
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    target.rename(tmp_path / f".out.old-{process.pid}")
    with pytest.raises(InvalidRequest, match="already holds a bundle"):
        build(target, b"new")
    assert (target / "prefill-8.onnx").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_own_process_number_from_an_earlier_life(tmp_path):
    """A leftover that carries our own number (as in a restarted container) is no obstacle."""
    half = tmp_path / f".out.tmp-{os.getpid()}"
    half.mkdir()
    (half / "junk").write_bytes(b"junk")
    build(tmp_path / "out")
    assert "junk" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_links_are_refused(tmp_path):
    """A link in the folder is refused, for its content would stay behind on copying."""
    with (
        pytest.raises(BundleError, match="link"),
        writing_bundle(tmp_path / "out") as folder,
    ):
        (folder / "weights").symlink_to("/dev/null")
        fill(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b"grapH"), "sha256"),
        (lambda path: path.write_bytes(b"graph!"), "has 6 bytes, expected 5"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, expected 5"),
    ],
)
def test_damaged_file(tmp_path, damage, said):
    """A changed file is named with what was found, what was expected and the way out."""
    build(tmp_path / "out")
    damage(tmp_path / "out" / "prefill-8.onnx")
    with pytest.raises(BundleError) as caught:
        verify_files(read_bundle(tmp_path / "out"))
    assert said in str(caught.value)
    assert "prefill-8.onnx" in str(caught.value) and COMMAND in str(caught.value)
    verify_files(read_bundle(tmp_path / "out"), skip=("prefill-",))


def test_missing_files(tmp_path):
    """A missing component fails at reading, any other missing file at verifying."""
    build(tmp_path / "out")
    (tmp_path / "out" / "engines" / "engine.json").unlink()
    with pytest.raises(BundleError, match=r"engines/engine\.json is missing"):
        verify_files(read_bundle(tmp_path / "out"))
    (tmp_path / "out" / "prefill-8.onnx").unlink()
    with pytest.raises(BundleError, match=r"prefill-8\.onnx of component prefill-8 is missing"):
        read_bundle(tmp_path / "out")


def test_unlisted_component(tmp_path):
    """A component whose file the manifest does not list cannot be checked, so it is refused."""
    build(tmp_path / "out")
    edit(tmp_path / "out", files={})
    with pytest.raises(BundleError, match="does not list"):
        read_bundle(tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "C:/x", "a\\b"])
def test_paths_that_leave_the_bundle(tmp_path, name):
    """A listed path that leads out of the bundle is refused, even when the file is there."""
    build(tmp_path / "out")
    (tmp_path / "secret").write_bytes(b"")
    files = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    edit(tmp_path / "out", files=files | {name: {"bytes": 0, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="leaves the folder"):
        verify_files(read_bundle(tmp_path / "out"))


def test_component_outside_the_bundle(tmp_path):
    """A component file that leads out through a link is refused on reading."""
    build(tmp_path / "out")
    (tmp_path / "secret").write_bytes(b"graph")
    (tmp_path / "out" / "prefill-8.onnx").unlink()
    (tmp_path / "out" / "prefill-8.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="through a link"):
        read_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2, "novelty": 1}, "schema version 2.*reads version 1"),
        ({"export_format": "other"}, "format 'other'"),
        ({"surprise": 1}, "surprise"),
        ({"components": 3}, "damaged"),
        ({"io": {}}, "io describes"),
    ],
)
def test_manifests_of_another_kind(tmp_path, changes, said):
    """Another version, another format, unknown keys and wrong values are each named."""
    build(tmp_path / "out")
    edit(tmp_path / "out", **changes)
    with pytest.raises(BundleError, match=said):
        read_bundle(tmp_path / "out")


def test_what_is_no_bundle(tmp_path):
    """No folder, no manifest and a truncated manifest each get their own sentence."""
    with pytest.raises(InvalidRequest, match="not a folder"):
        read_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="not a bundle"):
        read_bundle(tmp_path)
    build(tmp_path / "out")
    path = tmp_path / "out" / "export.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(tmp_path / "out")


def test_update_files(tmp_path):
    """A new report is listed, a removed one forgotten, and damage elsewhere stays visible."""
    target = tmp_path / "out"
    build(target)
    (target / "reports").mkdir()
    (target / "reports" / "parity.json").write_text("{}")
    bundle = update_files(target)
    assert bundle.manifest.files["reports/parity.json"].bytes == 2
    verify_files(read_bundle(target))
    (target / "reports" / "parity.json").rename(target / "reports" / "speed.json")
    (target / "prefill-8.onnx").write_bytes(b"grapH")
    assert set(update_files(target).manifest.files) == {
        "prefill-8.onnx", "engines/engine.json", "reports/speed.json"
    }  # fmt: skip
    with pytest.raises(BundleError, match=r"prefill-8\.onnx has sha256"):
        verify_files(read_bundle(target))


def test_update_files_waits_for_the_disk(tmp_path, monkeypatch):
    """Before the manifest that names them is there: new reports, and the folder's entries."""
    build(tmp_path / "out")
    (tmp_path / "out" / "reports").mkdir()
    (tmp_path / "out" / "reports" / "report.html").write_text("")
    synced, replaced = [], []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(
        os, "replace", lambda *paths: (replaced.append(list(synced)), replace(*paths))
    )
    update_files(tmp_path / "out")
    new = [tmp_path / "out" / "reports", tmp_path / "out" / "reports" / "report.html"]
    assert {path.stat().st_ino for path in new} <= set(replaced[0])


def test_update_files_is_atomic(tmp_path, monkeypatch):
    """A failure before the rename leaves the old manifest readable and no temporary file."""
    build(tmp_path / "out")
    before = (tmp_path / "out" / "export.json").read_bytes()

    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EnvironmentUnable, match="disk ran full"):
        update_files(tmp_path / "out")
    assert (tmp_path / "out" / "export.json").read_bytes() == before
    assert leftovers(tmp_path / "out") == []
