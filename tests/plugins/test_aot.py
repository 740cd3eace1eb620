"""Every kernel compiles for every target without a GPU, into PTX that is launchable as told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokred_plugins.aot import (
    DESCRIPTORS_SINCE,
    PTX_VERSIONS,
    SHARED_LIMITS,
    Compiled,
    Parameter,
    strip_hidden,
)

WORKER = Path(__file__).parent / "aot_worker.py"
KERNELS = {
    "add_rms_norm", "embed_rms_norm", "gated_rms_norm", "gated_rms_norm_scores",
    "causal_conv1d", "linear", "linear_few",
    "ssd_steps", "ssd_scan", "ssd_chunk_state", "ssd_pass", "ssd_chunk_scan",
    "token_importance", "token_split_rank", "token_split", "token_split_search",
    "token_split_norm", "token_split_search_norm",
    "token_norm", "token_match", "token_match_best", "token_link_rank", "token_link",
    "token_reduce", "token_reduce_norm",
}


@pytest.fixture(scope="module")
def compiled() -> list[tuple[Compiled, dict]]:
    """All kernels for all targets, and what the worker says about each."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    targets = list(map(str, PTX_VERSIONS))
    workers = [
        subprocess.Popen([sys.executable, WORKER, *share], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for share in (targets[::2], targets[1::2])
    ]
    made = []
    for worker in workers:
        out, err = worker.communicate(timeout=600)
        assert worker.returncode == 0, err[-3000:]
        made += [json.loads(line) for line in out.splitlines()]
    return [(Compiled.from_json(facts["compiled"]), facts) for facts in made]


def form(kernel: Compiled) -> str:
    """Its name, and whether it is given squares: products are compiled with and without."""
    given = {p.name for p in kernel.parameters if p.role == "input"}
    return f"{kernel.name} with squares" if "squares" in given else kernel.name


def entry_types(kernel: Compiled) -> list[str]:
    """PTX type of each parameter of the entry."""
    text = re.search(rf"\.entry {kernel.entry}\s*\(([^)]*)\)", kernel.ptx)[1]
    return re.findall(r"\.param \.(\w+)", text)


def test_all_kernels_for_all_targets(compiled):
    """Every kernel, every target, one of each pair."""
    found = [(form(kernel), kernel.target) for kernel, _ in compiled if not kernel.scratch]
    forms = KERNELS | {"linear with squares"}
    assert sorted(found) == sorted((k, t) for k in forms for t in PTX_VERSIONS)
    described = [(form(kernel), kernel.target) for kernel, _ in compiled if kernel.scratch]
    both = [90, *(sm for sm in PTX_VERSIONS if sm >= 90)]  # by Triton, and by hand for 9.0
    assert sorted(described) == [
        *(("linear", sm) for sm in both), *(("linear with squares", sm) for sm in both),
        ("ssd_scan_hopper", 90), ("ssd_scan_hopper_gated", 90), ("ssd_scan_hopper_scored", 90),
    ]


def test_parameters_are_inputs_extras_outputs(compiled):
    """The entry has exactly the described parameters, in the order TensorRT passes them."""
    for kernel, facts in compiled:
        assert [p.name for p in kernel.parameters] == facts["expected"], kernel.name
        types = ["u32" if p.role == "extra" else "u64" for p in kernel.parameters]
        types += ["u64"] * kernel.hidden
        assert entry_types(kernel) == types, (kernel.name, kernel.target)
        assert kernel.hidden == (1 if kernel.scratch else 0)
        assert all((p.value is None) == (p.role != "extra") for p in kernel.parameters)


def test_versions_and_sizes(compiled):
    """PTX version and target are the pinned ones, the block fits the code and the GPU."""
    for kernel, facts in compiled:
        version = PTX_VERSIONS[kernel.target]
        if kernel.scratch:  # descriptors are made with newer instructions
            version = max(version, DESCRIPTORS_SINCE)
        assert kernel.ptx_version == version
        assert f".version {version // 10}.{version % 10}\n" in kernel.ptx
        assert re.search(rf"^\.target sm_{kernel.target}a?\b", kernel.ptx, re.MULTILINE)
        assert kernel.block == 32 * facts["warps"]
        assert kernel.shared <= SHARED_LIMITS[kernel.target]


def test_ptxas_takes_the_stripped_code(compiled):
    """NVIDIA's assembler accepts the PTX without Triton's own parameters."""
    for kernel, facts in compiled:
        assert facts["ptxas"] == "", (kernel.name, kernel.target)


def test_accesses_are_wide(compiled):
    """Alignment hints reach the code: tensors move in 16-byte pieces."""
    for kernel, _ in compiled:
        if kernel.name in {"add_rms_norm", "gated_rms_norm", "causal_conv1d", "token_reduce",
                           "token_reduce_norm"}:
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", kernel.ptx), kernel.name
        if kernel.name in {"ssd_scan", "token_match"}:
            assert "cp.async.cg.shared.global" in kernel.ptx, kernel.name


def test_strides_of_descriptors_are_bytes(compiled):
    """In units of 16 bytes nearly all rows would be out of reach."""
    described = [kernel for kernel, _ in compiled if kernel.scratch]
    assert described
    for kernel in described:
        found, held = set(), {}
        for line in kernel.ptx.splitlines():
            if moved := re.search(r"mov\.[bu]64\s+(%?\w+), (\d+);", line):
                held[moved[1]] = int(moved[2])
            if used := re.search(r"tile\.global_stride\S+ \[[^]]*\], (?:0x)?0, (%?\w+);", line):
                found.add(held[used[1]])
        rows = {
            "linear": {768, 3352}, "linear with squares": {1536, 768},
            "ssd_scan_hopper": {1536, 1792}, "ssd_scan_hopper_gated": {1536, 1792, 3352},
            "ssd_scan_hopper_scored": {1536, 1792, 3352},
        }[form(kernel)]
        assert found == {2 * n for n in rows}, (form(kernel), kernel.target, found)


def test_json_round_trip(compiled):
    """A description survives a file."""
    kernel, _ = compiled[0]
    again = Compiled.from_json(kernel.to_json())
    assert again == kernel and isinstance(again.parameters[0], Parameter)


def test_a_hidden_pointer_that_is_read_is_not_stripped():
    """Taking away a parameter that the code uses is refused, not done."""
    ptx = (".version 8.2\n.visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1,\n"
           "\t.param .u64 k_param_2\n)\n.reqntid 32\n{\n\tld.param.u64 %rd1, [k_param_1];\n}\n")
    kernel = Compiled("k", "", 90, 82, "k", (1, 1), 32, 0, 2, (Parameter("x", "input", "fp16"),),
                      ptx)
    with pytest.raises(RuntimeError, match="k_param_1"):
        strip_hidden(kernel)
    unread = ptx.replace("[k_param_1]", "[k_param_0]")
    stripped = strip_hidden(Compiled(**{**vars(kernel), "ptx": unread}))
    assert entry_types(stripped) == ["u64"] and stripped.hidden == 0
    assert "k_param_1" not in stripped.ptx


REFUSED = """
import sys
sys.path[:0] = [{tools!r}]
from kernel_shapes import MODELS, cases
from tokred_plugins.aot import compile_call
from tokred_plugins.kernels import Tactic
case = next(iter(cases(MODELS["2.7b"], 1, 2048, "fp32", {{"ssd_scan"}})))
deep = Tactic({{"Q": 64, "HEADS": 1}}, 4, 3)
call = case.launches({{"ssd_scan": deep}}, segments=1)[-1]
for target in (75, 86):
    try:
        compile_call(call, target)
    except ValueError as refused:
        print(refused)
"""


def test_what_cannot_run_is_refused():
    """An unknown GPU, and a tactic that needs more shared memory than the GPU has."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = REFUSED.format(tools=str(Path(__file__).parents[2] / "tools" / "gpu"))
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True,
                          capture_output=True, timeout=300, check=False)
    unknown, large = done.stdout.splitlines()
    assert "compute capability 7.5" in unknown
    assert "ssd_scan" in large and "101376" in large
