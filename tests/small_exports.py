"""Exported files of few layers for any test that needs a real one, made in two seconds each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import write_mamba_ssm

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.export import export_prefill
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.specs import ReductionSpec


class Case(NamedTuple):
    """What is exported: a site after each layer but the last."""

    method: str = "utrc"
    dtype: str = "float32"
    max_batch: int = 1
    logits: str = "last"
    length: int = 41  # no multiple of any chunk
    tied: bool = True
    groups: int = 1
    layers: int = 2
    published: bool = False  # 8 heads of 64 and states of 128, as the published models have


def export(folder: Path, case: Case) -> Path:
    """The exported file of a case."""
    heads = {"headdim": 64, "d_state": 128} if case.published else {}
    width = {"d_model": 256} if case.published else {}
    write_mamba_ssm(
        folder, n_layer=case.layers, tie_embeddings=case.tied,
        ssm_cfg={"ngroups": case.groups, **heads}, **width,
    )
    checkpoint = load_checkpoint(str(folder))
    sites = tuple(range(case.layers - 1))
    asked = ReductionSpec(method=case.method, keep_ratio=0.75, sites=sites)
    schedule = solve_schedule(checkpoint.spec, asked, case.length)
    model = build_model(checkpoint, schedule, dtype=case.dtype, logits=case.logits)
    export_prefill(model, case.length, case.max_batch, folder / "graph.onnx")
    return folder / "graph.onnx"


_compiled: dict = {}


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Within, code that an earlier file of this process had is not compiled again."""
    from tokred_plugins import aot

    compile_call = aot.compile_call

    def compile_new(call, sm):
        key = aot.compile_key(call), sm
        if key not in _compiled:
            _compiled[key] = compile_call(call, sm)
        return _compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_call", compile_new)
        yield
