"""What the kernel benchmark times: every variant that it names is among the launches it then asks
for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import bench_kernels
import kernel_shapes


@pytest.mark.parametrize(
    "gpu",
    [{}, {"target": 86, "multiprocessors": 84}, {"target": 90, "multiprocessors": 132},
     {"target": 90, "multiprocessors": 114}],
    ids=str,
)
def test_variants_are_launched(monkeypatch, gpu):
    """With the tactic that is named; the scan's kernels all ways that a GPU has."""
    monkeypatch.setattr(kernel_shapes, "this_gpu", lambda: gpu)
    model = kernel_shapes.MODELS["130m"]
    found = set()
    for case in kernel_shapes.cases(model, 8, 2048, "fp16"):
        for name, tactic, options in bench_kernels.variants(case):
            calls = bench_kernels.launches(case, {name: tactic}, **options)
            (call,) = (c for c in calls if c.kernel.name == name)
            asked, given = (
                ({**t.blocks, "HEADS": 0}, t.num_warps, t.num_stages) for t in (tactic, call.tactic)
            )
            assert asked == given, name  # heads a program are as many as divide a group
            found.add(name)
    walks = {"ssd_scan_hopper", "ssd_scan_hopper_gated", "ssd_scan_hopper_scored"}
    assert {"ssd_steps", "ssd_scan", "ssd_chunk_scan", "token_reduce_norm"} < found
    assert found & walks == (walks if gpu.get("target") == 90 else set())


def test_launches_are_those_of_the_gpu(monkeypatch):
    """As an engine's are, whose lowering knows how many multiprocessors there are."""
    found = []
    for count in (132, 114):
        monkeypatch.setattr(
            kernel_shapes, "this_gpu", lambda n=count: {"target": 90, "multiprocessors": n}
        )
        (case,) = kernel_shapes.cases(kernel_shapes.MODELS["2.7b"], 8, 2048, "fp16", {"ssd_scan"})
        (call,) = bench_kernels.launches(case)
        found.append(call.tactic.blocks["WALKS"])
    assert found == [5, 2]
