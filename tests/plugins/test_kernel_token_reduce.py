"""The gather-and-merge kernel against its float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import (
    DEVICE,
    DTYPES,
    ON_GPU,
    TOLERANCE,
    close,
    every_tactic,
    exact,
    make,
    require_kernels,
)

require_kernels()

from tokred_plugins.kernels import Tactic, run, spec_of  # noqa: E402
from tokred_plugins.token_reduce.kernel import TACTICS, calls  # noqa: E402
from tokred_plugins.token_reduce.op import token_reduce  # noqa: E402
from tokred_plugins.token_reduce.reference import token_reduce_reference  # noqa: E402

SMALL = Tactic({"BLOCK": 32, "TARGETS": 8, "SOURCES": 2}, 1)


def a_choice(length, removed, batch, seed=0, targets=None, pads=0):
    """Removed positions, and for each but ``pads`` a kept one to merge into."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"keep": [], "src": [], "dst": [], "merge": []}
    for _ in range(batch):
        order = torch.randperm(length, generator=generator)
        src, keep = order[:removed].sort().values, order[removed:].sort().values
        pick = torch.randint(targets or len(keep), (removed,), generator=generator)
        dst = keep[pick]
        dst[:pads] = -1
        rows["keep"].append(keep.int())
        rows["src"].append(src.int())
        rows["dst"].append(dst.int())
        rows["merge"].append(torch.rand(removed, generator=generator) < 0.5)
    return {name: torch.stack(values).to(DEVICE) for name, values in rows.items()}


def check(width, choice, dtype, residual_dtype, tactic=SMALL, by=token_reduce_reference):
    batch = len(choice["keep"])
    length = choice["keep"].shape[1] + choice["src"].shape[1]
    given = {
        "hidden": make(1, batch, length, width, dtype=dtype),
        "residual": make(2, batch, length, width, dtype=residual_dtype),
        **choice,
    }
    specs = [spec_of(x) for x in given.values()]
    got = run(calls(*specs, {"token_reduce": tactic}), given)
    hidden, residual = by(**exact(given))
    close(got["hidden_out"], hidden, TOLERANCE[dtype], "hidden")
    close(got["residual_out"], residual, TOLERANCE[residual_dtype], "residual")
    # A survivor that nothing merges into is a copy.
    alone = ~(choice["keep"][:, :, None] == choice["dst"][:, None, :]).any(2)
    source = given["residual"][torch.arange(batch)[:, None], choice["keep"].long()]
    assert torch.equal(got["residual_out"][alone], source[alone])
    # The same, and the norm after it.
    weight = 1 + make(3, width, dtype=dtype)
    calls_of_norm = calls(
        *specs, {"token_reduce_norm": tactic}, weight=spec_of(weight), eps=0.25
    )
    got = run(calls_of_norm, {**given, "weight": weight})
    total = hidden + residual
    normed = F.rms_norm(total, (width,), weight.double().cpu(), 0.25)
    close(got["normed"], normed, TOLERANCE[dtype], "normed")
    close(got["residual_out"], total, TOLERANCE[residual_dtype], "their sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 residual", "same dtype"])
@pytest.mark.parametrize("sizes", [(2, 1, 7), (30, 13, 40), (25, 20, 96)], ids=str)
def test_reduce_is_the_reference(sizes, wide, dtype):
    """Odd counts and widths, both residual dtypes."""
    length, removed, width = sizes
    check(width, a_choice(length, removed, 2), dtype, torch.float32 if wide else dtype)


def test_many_sources_of_one_target():
    """All sources merge into one token, over several blocks of targets."""
    check(24, a_choice(60, 40, 1, targets=1), torch.float32, torch.float32)


def test_padding_merges_into_nothing():
    """A source without a target vanishes."""
    check(24, a_choice(40, 20, 2, pads=9), torch.float32, torch.float32)
    check(24, a_choice(40, 20, 2, pads=20), torch.float32, torch.float32)


def test_poisoned_sources_without_a_target_leave_no_trace():
    """NaN in removed padding reaches no survivor."""
    choice = a_choice(30, 10, 1, pads=4)
    given = {"hidden": make(1, 1, 30, 16), "residual": make(2, 1, 30, 16), **choice}
    for name in ("hidden", "residual"):
        given[name][0, choice["src"][0, :4].long()] = torch.nan
    specs = [spec_of(x) for x in given.values()]
    weight = make(3, 16)
    for options in ({}, {"weight": spec_of(weight), "eps": 1e-5}):
        tactics = dict.fromkeys(("token_reduce", "token_reduce_norm"), SMALL)
        got = run(calls(*specs, tactics, **options), {**given, "weight": weight})
        assert all(torch.isfinite(found).all() for found in got.values()) and len(got) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="true sizes need a GPU")
@pytest.mark.parametrize("width", [768, 2560])
@pytest.mark.parametrize(("tactic", "dtype"), every_tactic(TACTICS), ids=str)
def test_reduce_at_true_sizes(tactic, width, dtype):
    """Every candidate tactic, 2048 tokens."""
    choice = a_choice(2048, 330, 2)
    check(width, choice, dtype, torch.float32, tactic, by=token_reduce)
