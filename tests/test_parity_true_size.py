"""Float32 parity of ONNX Runtime at true sizes: the demo model, and random weights at 130m.

Every prompt length at which something new happens to padding, in one bucket of 2048 at 30 %.
The engine's choices are replayed in eager where they differ from eager's own; each difference
must then be explained by rounding, which :func:`measure_case` works out in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import write_mamba_ssm

from tokred_export.backends import onnxruntime as backend
from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.export import export_prefill
from tokred_export.export.capture import prefill_names
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.runtime.ort import OrtRunner, open_session
from tokred_export.specs import ReductionSpec
from tokred_export.verify.baselines import steady_allocator
from tokred_export.verify.cases import padded_lengths, prompt_cases
from tokred_export.verify.margins import unexplained
from tokred_export.verify.parity import measure_case

LENGTH, BOUND = 2048, 1e-4
REAL_130M = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 16,
    "ssm_cfg": {"d_state": 128, "headdim": 64, "ngroups": 1, "chunk_size": 64},
}  # fmt: skip


def rel(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def flat(out):
    """Eager's outputs by the names of the I/O contract."""
    names = prefill_names(len(out.conv_states), len(out.choices)).outputs
    tensors = [out.logits, out.kept_positions, *(t for c in out.choices for t in c)]
    tensors += [*out.conv_states, *out.ssm_states]
    return {name: t.numpy() for name, t in zip(names, tensors, strict=True)}


def check(model, run, case):
    """One prompt through the engine and eager; returns the prompt tokens that were removed."""
    feeds = {"input_ids": case.input_ids, "prompt_len": case.prompt_len}
    found = run(feeds)
    with torch.no_grad():
        eager = flat(model(*(torch.from_numpy(x) for x in feeds.values())))
    chosen = [n for n in eager if n.startswith(("choice", "kept"))]
    if any((found[n] != eager[n]).any() for n in chosen):
        measured = measure_case(
            model, lambda feeds: found, "", case.input_ids, case.prompt_len, case.description
        )
        assert not measured.problems
        errors = {t.name: t.rel_l2 for t in measured.tensors}
        flips = [flip for site in measured.sites for flip in site.flips]
        assert flips, "other choices, but no flip"
        assert not unexplained(measured)
    else:
        errors = {n: rel(found[n], eager[n]) for n in eager if n not in chosen}
        if not case.prompt_len.any():  # the logits of an empty prompt mean nothing
            errors.pop("logits")
    assert {n: e for n, e in errors.items() if not e <= BOUND} == {}, case.description
    return int(case.prompt_len.sum()) - int((found["kept_positions"] >= 0).sum())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["demo", "130m"])
def test_parity(tmp_path, size):
    """Logits and states within 1e-4; short prompts lose nothing, long ones lose tokens."""
    steady_allocator()  # else eager spends as long in page faults as in arithmetic
    if size == "130m":
        write_mamba_ssm(tmp_path, weights="safetensors", **REAL_130M)
    checkpoint = load_checkpoint(str(tmp_path) if size == "130m" else None)
    schedule = solve_schedule(checkpoint.spec, ReductionSpec(target=0.3), LENGTH)
    model = build_model(checkpoint, schedule)
    path = tmp_path / "prefill-2048.onnx"
    export_prefill(model, LENGTH, 1, path)
    backend.build(path, tmp_path / "engine")
    engine = tmp_path / "engine" / path.name
    run = OrtRunner(open_session(engine, "cpu", None), engine).run

    lengths = padded_lengths(schedule)
    out = schedule.length_out
    assert {0, 1, 7, 100, out - 1, out, out + 1, 2047, 2048} <= set(lengths)
    for site in schedule.sites:  # one at which the padding runs out inside this site
        assert any(site.tokens_out < n < site.tokens_in for n in lengths)
    removed = {}
    for case in prompt_cases(schedule, checkpoint.spec.vocab_size, thorough=True):
        removed[int(case.prompt_len[0])] = check(model, run, case)
    assert set(removed) == set(lengths)
    assert all(count == max(0, n - out) for n, count in removed.items())
    assert removed[2048] > 500
