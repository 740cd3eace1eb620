"""What of the GPU baselines needs no GPU: mamba-ssm's names, samples, which backend is proven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_mamba_ssm

from tokred_export import prove
from tokred_export.checkpoint import load_checkpoint
from tokred_export.errors import GateFailed
from tokred_export.verify import cuda_baselines
from tokred_export.verify.speed import BURST, Milliseconds


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_are_mamba_ssms(tmp_path, tied):
    """Every tensor of a mamba_ssm checkpoint goes back under the name and shape it came from."""
    write_mamba_ssm(tmp_path, n_layer=2, tie_embeddings=tied)
    made = cuda_baselines._their_names(load_checkpoint(str(tmp_path)))
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if tied:
        expected.pop("lm_head.weight", None)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == expected


def test_a_sample_is_the_last_of_a_burst(monkeypatch):
    """Each call is waited for, before and after, and the number is of the last one."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    times = iter([0, 5_000_000, 10_000_000, 12_000_000])
    monkeypatch.setattr(cuda_baselines.time, "perf_counter_ns", lambda: next(times))
    sample = cuda_baselines.burst(lambda: events.append("call"), count=2)()
    assert isinstance(sample, Milliseconds) and sample == 2.0
    assert events == ["wait", "call", "wait"] * 2


class Runner:
    """Counts what it is asked; its graph gives what a run gives, but for ``strayed``."""

    source = Path("prefill-8.plan")

    def __init__(self, strayed=0.0):
        self.runs, self.asked = [], []
        self.strayed = np.float32(strayed)

    def run(self, feeds):
        self.runs.append(feeds)
        return {"logits": np.array([1.0, np.nan], np.float32), "tokens": np.array([3])}

    def replayed(self):
        logits = np.array([1.0, np.nan], np.float32) + self.strayed
        return {"logits": logits, "tokens": np.array([3])}

    def latencies(self, count):
        self.asked.append(count)
        return [9.0] * (count - 1) + [1.5]


def test_an_engine_is_fed_once():
    """Inputs are uploaded before anything is timed; a sample is the last replay of a burst."""
    runner = Runner()
    call = prove.gpu_call(runner, {"input_ids": 1})
    assert runner.runs == [{"input_ids": 1}] and runner.asked == [1]
    assert [call(), call()] == [1.5, 1.5] and len(runner.runs) == 1
    assert isinstance(call(), Milliseconds) and runner.asked == [1, BURST, BURST, BURST]


def test_a_graph_that_gives_something_else_has_no_speed():
    """By one unit in the last place of one output: nothing proves what would be timed."""
    with pytest.raises(GateFailed, match=r"graph of prefill-8\.plan gives another logits than"):
        prove.gpu_call(Runner(strayed=np.spacing(np.float32(1))), {})


@pytest.mark.parametrize(
    ("backends", "proven"),
    [(("onnxruntime",), "onnxruntime"), (("onnxruntime", "tensorrt"), "tensorrt"),
     (("tensorrt-rtx", "tensorrt"), "tensorrt"), (("tensorrt-rtx",), None)],
)
def test_which_engine_is_proven(backends, proven):
    """TensorRT's where there is one; a plan that does not run where it is built never."""
    assert prove.proven_backend(backends) == proven
