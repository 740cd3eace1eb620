"""Both norm kernels against their float64 references."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DTYPES, TOLERANCE, close, exact, make, require_kernels

require_kernels()

from tokred_plugins.add_rms_norm import kernel as add_norm  # noqa: E402
from tokred_plugins.add_rms_norm.reference import add_rms_norm_reference  # noqa: E402
from tokred_plugins.embed_rms_norm import kernel as embed_norm  # noqa: E402
from tokred_plugins.embed_rms_norm.reference import embed_rms_norm_reference  # noqa: E402
from tokred_plugins.gated_rms_norm import kernel as gated_norm  # noqa: E402
from tokred_plugins.gated_rms_norm.reference import gated_rms_norm_reference  # noqa: E402
from tokred_plugins.kernels import run, spec_of  # noqa: E402
from tokred_plugins.row_tiles import TACTICS  # noqa: E402
from tokred_plugins.token_importance.reference import token_importance_reference  # noqa: E402


def check_add(batch, length, width, dtype, residual_dtype):
    given = {
        "hidden": make(0, batch, length, width, dtype=dtype),
        "residual": make(1, batch, length, width, dtype=residual_dtype, scale=3),
        "weight": make(2, width, dtype=dtype),
    }
    specs = [spec_of(x) for x in given.values()]
    got = run(add_norm.calls(*specs, eps=1e-5), given)
    normed, residual = add_rms_norm_reference(**exact(given), eps=1e-5)
    assert got["normed"].dtype == dtype and got["residual_out"].dtype == residual_dtype
    close(got["normed"], normed, TOLERANCE[dtype], "normed")
    close(got["residual_out"], residual, TOLERANCE[residual_dtype], "residual")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 residual", "same dtype"])
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 2, 256), (1, 1, 2570)], ids=str)
def test_add_norm_is_the_reference(shape, dtype, wide):
    """The sum is written back in the residual's dtype; odd widths, one piece and several."""
    check_add(*shape, dtype, torch.float32 if wide else dtype)


def check_gated(batch, length, inner, extra, group, before, dtype):
    given = {
        "y": make(0, batch, length, inner, dtype=dtype),
        "zxbcdt": make(1, batch, length, inner + extra, dtype=dtype, scale=4),
        "weight": make(2, inner, dtype=dtype),
    }
    options = {"group_size": group, "eps": 1e-5, "norm_before_gate": before}
    specs = [spec_of(x) for x in given.values()]
    got = run(gated_norm.calls(*specs, **options), given)["out"]
    close(got, gated_rms_norm_reference(**exact(given), **options), TOLERANCE[dtype], "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("group", [24, 12, 8])
def test_gated_norm_is_the_reference(group, before, dtype):
    """Groups of all channels and of some; z is a slice of the packed projection."""
    check_gated(2, 3, 24, 19, group, before, dtype)


def test_a_large_gate_neither_overflows_nor_leaks():
    """silu(-100) is zero, and NaN in one row stays in that row."""
    y, packed = make(0, 1, 3, 24), make(1, 1, 3, 30)
    packed[:, 0] = -100
    y[:, 1] = torch.nan
    given = {"y": y, "zxbcdt": packed, "weight": make(2, 24)}
    specs = [spec_of(x) for x in given.values()]
    out = run(gated_norm.calls(*specs, 24, 1e-5, False), given)["out"].cpu()
    assert torch.isfinite(out[:, 0]).all() and out[:, 1].isnan().all()
    assert torch.isfinite(out[:, 2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
def test_scores_come_with_the_gated_norm(before, dtype):
    """The importance of y on the way, and the norm as without it; refused with several groups."""
    given = {
        "y": make(0, 2, 3, 300, dtype=dtype),
        "zxbcdt": make(1, 2, 3, 320, dtype=dtype),
        "weight": make(2, 300, dtype=dtype),
    }
    specs = [spec_of(x) for x in given.values()]
    got = run(gated_norm.calls(*specs, 300, 1e-5, before, scores=True), given)
    assert torch.equal(got["out"], run(gated_norm.calls(*specs, 300, 1e-5, before), given)["out"])
    close(got["scores"], token_importance_reference(exact(given)["y"]), 2e-6, "scores")
    with pytest.raises(ValueError, match="found 100 of 300 channels"):
        gated_norm.calls(*specs, 100, 1e-5, before, scores=True)


@pytest.mark.gpu
@pytest.mark.skipif(DTYPES[-1] != torch.bfloat16, reason="true sizes need a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("width", "inner"), [(768, 1536), (2560, 5120)], ids=["130m", "2.7b"])
def test_norms_at_true_sizes(width, inner, dtype):
    """Every candidate tactic gives the reference at the sizes of real models."""
    check_add(2, 513, width, dtype, torch.float32)
    check_gated(2, 513, inner, 336, inner, False, dtype)
    for tactic in TACTICS:
        given = {
            "hidden": make(0, 1, 65, width, dtype=dtype),
            "residual": make(1, 1, 65, width),
            "weight": make(2, width, dtype=dtype),
        }
        specs = [spec_of(x) for x in given.values()]
        picked = {"add_rms_norm": tactic}
        got = run(add_norm.calls(*specs, eps=1e-5, tactics=picked), given)
        expected = add_rms_norm_reference(**exact(given), eps=1e-5)
        close(got["normed"], expected[0], TOLERANCE[dtype], f"normed with {tactic}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 residual", "same dtype"])
@pytest.mark.parametrize("width", [40, 2570])
def test_embed_norm_is_the_reference(width, wide, dtype):
    """Any row of the table, odd widths, and a residual in either dtype."""
    ids = torch.tensor([[0, 12, 3], [7, 7, 1]], dtype=torch.int32, device=make(0, 1).device)
    given = {
        "input_ids": ids, "table": make(1, 13, width, dtype=dtype, scale=0.02),
        "weight": make(2, width, dtype=dtype),
    }
    specs = [spec_of(x) for x in given.values()]
    got = run(embed_norm.calls(*specs, 1e-5, wide), given)
    normed, residual = embed_rms_norm_reference(**exact(given), eps=1e-5, residual_in_fp32=wide)
    assert got["residual"].dtype == (torch.float32 if wide else dtype)
    close(got["normed"], normed, TOLERANCE[dtype], "normed")
    close(got["residual"], residual, 0.0, "residual")
