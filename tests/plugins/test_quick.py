"""The quick plugins, driven by NVIDIA's own plugin module and a real exported model.

TensorRT 11 itself is not here: its builder, parser and runtime are not exercised. Everything
before them is: validation, registry, creator and template class are NVIDIA's (nvidia_arrange.py),
and what the class hands to TensorRT is compared with the kernel descriptions that
test_aot_launch.py launches, and with the nodes for the launcher plugin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from checkpoints import write_mamba_ssm
from nvidia_arrange import arrange, what_is_missing
from test_aot import KERNELS

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.export import export_prefill
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.specs import ReductionSpec

WORKER = Path(__file__).parent / "quick_worker.py"
TARGET = 90
LENGTH = 300  # two segments of the scan before the reduction site, one after it
missing = what_is_missing()
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(missing is not None, reason=str(missing)),
]


def export(folder: Path, dtype: str, method: str, layers: int, max_batch: int) -> Path:
    """A tiny model as the ONNX file ``<dtype>.onnx``."""
    checkpoint_folder = folder / dtype
    checkpoint_folder.mkdir()
    write_mamba_ssm(checkpoint_folder, n_layer=layers)
    checkpoint = load_checkpoint(str(checkpoint_folder))
    asked = ReductionSpec(method=method, target=0.06, sites=(0,) if method != "none" else ())
    schedule = solve_schedule(checkpoint.spec, asked, LENGTH)
    path = folder / f"{dtype}.onnx"
    export_prefill(build_model(checkpoint, schedule, dtype=dtype), LENGTH, max_batch, path)
    return path


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """What came out of NVIDIA's classes, and what was to come out."""
    folder = tmp_path_factory.mktemp("quick")
    environment = arrange(folder)
    files = [
        export(folder, "float16", "utrc", layers=2, max_batch=3),
        export(folder, "bfloat16", "none", layers=1, max_batch=1),
    ]
    done = subprocess.run(
        [sys.executable, WORKER, str(TARGET), *files], env=environment, text=True,
        capture_output=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # TensorRT logs to the same stream


@pytest.fixture(scope="module")
def nodes(facts) -> list[dict]:
    """Every plugin node that was driven."""
    in_files = [node for file in facts["files"].values() for node in file["nodes"]]
    return [*in_files, *facts["continued"]]


def test_every_kernel_is_a_plugin(facts, nodes):
    """NVIDIA's validation took all of them, and its registry has a creator for each variant."""
    # Products stay TensorRT's own in this form, and a norm always follows a site.
    others = {"linear", "linear_few", "token_reduce"}
    assert others < KERNELS and {node["kernel"] for node in nodes} == KERNELS - others
    assert facts["creators"] == sorted(facts["definitions"]) == sorted({n["name"] for n in nodes})
    for file in facts["files"].values():
        assert file["names"] == list(dict.fromkeys(node["name"] for node in file["nodes"]))


def test_inputs_and_outputs_are_the_calls(facts, nodes):
    """A plugin's tensors are its kernel's, in the order in which the PTX takes them."""
    for node in nodes:
        assert node["inputs"] == node["in_kernel_order"]
        expected = [node["inputs"], ["call"], len(node["outputs"])]
        assert facts["definitions"][node["name"]] == expected, node["name"]


def test_output_shapes_and_dtypes(facts, nodes):
    """As in the file, for batch 1 and 3 where the batch is open, for batch 1 where it is not."""
    for node in nodes:
        for what in ("types", "shapes"):
            assert node[what] == node["file"][what], (node["name"], what)
    for name, batches in (("float16", {1, 3}), ("bfloat16", {1})):
        made = [node["shapes"] for node in facts["files"][name]["nodes"]]
        assert {shape[0] for shapes in made for shape in shapes} == batches


def test_one_combination_of_dtypes(facts, nodes):
    """The graph's own dtypes, row-major; one plugin serves two precisions in one process."""
    for node in nodes:
        assert node["combination"] == node["file"]["combination"], node["name"]
        assert node["formats"] == ["LINEAR"]
    first = {name: file["nodes"][0] for name, file in facts["files"].items()}
    assert first["float16"]["name"] == first["bfloat16"]["name"] == "embed_rms_norm"
    assert "HALF" in first["float16"]["combination"]
    assert "BF16" in first["bfloat16"]["combination"]


def test_tactics_are_numbered_from_one(nodes):
    """TensorRT takes positive numbers; there is a choice for nearly every kernel."""
    alone = {node["kernel"] for node in nodes if len(node["tactics"]) == 1}
    for node in nodes:
        assert node["tactics"] == list(range(1, len(node["expected"]) + 1))
    # Four heads in one group leave the chunk scan one number of heads a program.
    assert alone <= {"ssd_chunk_scan"}


def test_what_tensorrt_is_handed_is_the_kernel_description(nodes):
    """Entry, PTX, grid, block, shared memory and extras of every tactic of every node."""
    for node in nodes:
        for tactic, handed, expected in zip(
            node["tactics"], node["handed"], node["expected"], strict=True
        ):
            assert handed == expected, (node["name"], tactic)


def test_the_first_tactic_is_what_the_launcher_runs(facts):
    """The same exported file lowered for older TensorRT says the same of each node."""
    for file in facts["files"].values():
        for node in file["nodes"]:
            assert node["handed"][0] == node["launcher"], node["name"]


def test_the_grid_is_a_program_a_sequence(facts):
    """z is the batch, 1 and 3 where the graph leaves it open."""
    for name, batches in (("float16", [1, 3]), ("bfloat16", [1, 1])):
        for node in facts["files"][name]["nodes"]:
            for handed in node["handed"]:
                assert [grid[2] for grid in handed["grid"]] == batches, node["name"]


@pytest.mark.parametrize(("what", "says"), [
    ("unknown kernel", "no kernel of this version reads (KeyError: 'add_layer_norm'), expected"),
    ("call of another", "is given the call of token_norm, expected its own"),
    ("two inputs", "tokred::add_rms_norm has 2 inputs, expected 3: hidden, residual, weight"),
    ("no call", "attribute call that no kernel of this version reads (JSONDecodeError"),
    ("another GPU", "registered for sm_90 in this process, expected sm_80"),
    ("unknown GPU", "no kernels for compute capability 7.5; choose from 80, 86"),
])  # fmt: skip
def test_refusals(facts, what, says):
    """Through NVIDIA's creator too, the reason is named."""
    assert facts["refusals"][what].startswith("ValueError: ")
    assert says in facts["refusals"][what]


def test_only_tactics_that_fit_are_offered(facts):
    """Where the node's own needs too much shared memory the others remain, if there are any."""
    fits = facts["fits"]
    assert fits["own"] not in fits["offered"] and len(fits["offered"]) > 1
    assert fits["none"].startswith("ValueError: no tactic fits: ssd_scan with")
    assert "a block of sm_86 has at most 101376" in fits["none"]


def test_the_bindings_alone_are_no_tensorrt():
    """The wheel that this test needs brings no package ``tensorrt`` and no library with it."""
    wheel = metadata.distribution("tensorrt_cu13_bindings")
    assert {Path(str(f)).parts[0] for f in wheel.files} & {"tensorrt", "tensorrt_libs"} == set()
    assert [r for r in wheel.requires or () if "extra ==" not in r] == []
