"""The dense eager models to beat: all of them are the same model over the same weights."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoints import MAMBA_SSM, TRANSFORMERS, write_mamba_ssm, write_transformers

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.errors import EnvironmentUnable, InvalidRequest
from tokred_export.verify import baselines
from tokred_export.verify.baselines import (
    EAGER_CHUNKS,
    TRANSFORMERS_CHUNKS,
    describe_timed,
    eager_baselines,
    steady_allocator,
    transformers_model,
    with_chunk,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:n_groups is:UserWarning")


@pytest.fixture(autouse=True)
def _threads():
    """Baselines set torch's threads for the whole process; give them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(folder: Path, name: str, write=write_transformers, table=TRANSFORMERS):
    write(folder, **table[name])
    return load_checkpoint(str(folder))


def prompts(batch: int = 2, length: int = 37) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 61, (batch, length), dtype=torch.int32, generator=generator)


def last_logits(result) -> torch.Tensor:
    logits = result.logits
    return logits if logits.dim() == 2 else logits[:, -1]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["plain", "tied", "groups", "biases", "no-conv-bias", "dt-limits"])
def test_all_baselines_are_one_model(tmp_path, name):
    """Ours at every chunk size and transformers' give the logits of the exact model."""
    checkpoint = make(tmp_path, name)
    ids = prompts()
    found = eager_baselines(checkpoint, ids, threads=1)
    names = [f"eager chunk {q}" for q in EAGER_CHUNKS]
    names += [f"transformers chunk {q}" for q in TRANSFORMERS_CHUNKS]
    assert list(found.timed) == names
    assert found.left_out == {}
    full = torch.full((2,), 37, dtype=torch.int32)
    with torch.no_grad():
        exact = build_model(checkpoint, dtype="float64")(ids, full).logits.float()
    for call in found.timed.values():
        assert relative(last_logits(call()), exact) < 1e-5


def test_both_return_states_and_the_last_logits_only(tmp_path):
    """transformers is asked for as much work as ours: states, and logits of one token."""
    found = eager_baselines(make(tmp_path, "plain"), prompts(), threads=1)
    ours, theirs = found.timed["eager chunk 32"](), found.timed["transformers chunk 64"]()
    assert theirs.logits.shape == (2, 1, 61)
    for layer, state in enumerate(ours.ssm_states):
        kept = theirs.cache_params.get_recurrent_state(layer, state_idx=0)
        assert relative(kept, state) < 1e-5
    assert not ours.logits.requires_grad
    assert theirs.logits.is_inference()


def test_threads_are_set(tmp_path):
    """The baselines run with as many threads as the engine gets."""
    eager_baselines(make(tmp_path, "plain"), prompts(), threads=2)
    assert torch.get_num_threads() == 2


def test_weights_are_shared(tmp_path):
    """Neither another chunk size nor transformers copies a parameter."""
    model = build_model(make(tmp_path, "tied"))
    twin = with_chunk(model, 64)
    assert (twin.spec.chunk_size, model.spec.chunk_size) == (64, 8)
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    theirs = transformers_model(model, 128)
    assert theirs.config.chunk_size == 128
    assert all(layer.mixer.chunk_size == 128 for layer in theirs.backbone.layers)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in theirs.parameters()} == ours


def test_norm_before_gate_leaves_transformers_out(tmp_path):
    """A model that transformers cannot express is timed without it, and the reason is given."""
    checkpoint = make(tmp_path, "norm-before-gate", write_mamba_ssm, MAMBA_SSM)
    found = eager_baselines(checkpoint, prompts(), threads=1)
    assert list(found.timed) == [f"eager chunk {q}" for q in EAGER_CHUNKS]
    assert "gates before the norm" in found.left_out["transformers"]


def test_another_norm_grouping_leaves_transformers_out(tmp_path):
    """The group size of the gated norm is transformers' own and must be the checkpoint's."""
    checkpoint = make(tmp_path, "groups", write_mamba_ssm, MAMBA_SSM)
    spec = msgspec.structs.replace(checkpoint.spec, norm_group_size=checkpoint.spec.d_inner)
    checkpoint = msgspec.structs.replace(checkpoint, spec=spec)
    found = eager_baselines(checkpoint, prompts(), threads=1)
    assert not any(name.startswith("transformers") for name in found.timed)
    assert "groups of 32 channels" in found.left_out["transformers"]
    assert "groups of 64" in found.left_out["transformers"]


def test_a_mamba_ssm_checkpoint_with_groups_has_transformers(tmp_path):
    """Where the groups of both libraries agree, transformers takes part."""
    checkpoint = make(tmp_path, "groups", write_mamba_ssm, MAMBA_SSM)
    assert "transformers chunk 256" in eager_baselines(checkpoint, prompts(), threads=1).timed


def test_without_transformers_ours_remain(tmp_path, monkeypatch):
    """transformers is optional; its absence is recorded."""
    checkpoint = make(tmp_path, "plain")
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = eager_baselines(checkpoint, prompts(), threads=1)
    assert len(found.timed) == len(EAGER_CHUNKS)
    assert "cannot be imported" in found.left_out["transformers"]


def test_other_logits_are_refused(tmp_path, monkeypatch):
    """A transformers that computes another model is an error, not a baseline."""
    original = baselines._their_names

    def skewed(model):
        state = original(model)
        name = "backbone.layers.1.mixer.D"
        return {**state, name: state[name] * 1.5}

    checkpoint = make(tmp_path, "plain")
    monkeypatch.setattr(baselines, "_their_names", skewed)
    with pytest.raises(EnvironmentUnable, match="other logits than our dense eager"):
        eager_baselines(checkpoint, prompts(), threads=1)


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 5)])
def test_refuses_empty_prompts(tmp_path, batch, length):
    """There is nothing to time in a prompt of no tokens."""
    with pytest.raises(InvalidRequest, match="at least one token"):
        eager_baselines(make(tmp_path, "plain"), prompts(batch, length), threads=1)


IN_A_PROCESS = """
import ctypes, resource
from tokred_export.verify.baselines import steady_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        block = ctypes.create_string_buffer(1 << 26)
        ctypes.memset(block, 1, len(block))
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
worked = steady_allocator()
faults()  # grows the heap once
print(worked, before, faults())
"""


def test_steady_allocator_ends_page_faults_on_glibc():
    """After it, a large block that was freed and is asked for again costs next to no faults."""
    if platform.libc_ver()[0] != "glibc":
        assert steady_allocator() is False
        return
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=True
    )
    worked, before, after = done.stdout.split()
    assert worked == "True"
    assert int(after) < int(before) / 10  # three times 64 MiB, in pages of 4 KiB or 2 MiB


def test_the_description_says_whether_the_allocator_was_changed():
    """The record's text differs with the allocator."""
    assert "M_MMAP_THRESHOLD" in describe_timed(True)
    assert "default settings" in describe_timed(False)
    assert "M_MMAP_THRESHOLD" not in describe_timed(False)
