"""Conv, scan and norms: op and function body against the float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from single_op import run_body
from tokred_plugins import onnx_ops
from tokred_plugins.add_rms_norm.op import custom as add_rms_norm
from tokred_plugins.add_rms_norm.reference import add_rms_norm_reference
from tokred_plugins.causal_conv1d.op import custom as causal_conv1d
from tokred_plugins.causal_conv1d.reference import causal_conv1d_reference
from tokred_plugins.embed_rms_norm.op import custom as embed_rms_norm
from tokred_plugins.embed_rms_norm.reference import embed_rms_norm_reference
from tokred_plugins.gated_rms_norm.op import custom as gated_rms_norm
from tokred_plugins.gated_rms_norm.reference import gated_rms_norm_reference
from tokred_plugins.ssd_scan.op import NO_LIMIT
from tokred_plugins.ssd_scan.op import custom as ssd_scan
from tokred_plugins.ssd_scan.reference import ssd_scan_reference


def rel(found, expected):
    """Relative L2 error."""
    found, expected = (torch.as_tensor(x).double() for x in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def poison(x, pads):
    """NaN where padding must have no effect."""
    for row, n in enumerate(pads.tolist()):
        x[row, :n] = torch.nan
    return x


@pytest.mark.parametrize("length", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("taps", [2, 4, 7])
def test_conv(length, taps):
    """Odd lengths, lengths below the conv width, and poisoned padding."""
    rng = torch.Generator().manual_seed(length * 10 + taps)
    batch, channels, offset = 3, 10, 6
    pads = torch.tensor([0, length // 2, length], dtype=torch.int32)
    wide = torch.randn(batch, length, offset + channels + 3, dtype=torch.float64, generator=rng)
    weight = torch.randn(channels, taps, dtype=torch.float64, generator=rng)
    bias = torch.randn(channels, dtype=torch.float64, generator=rng)
    expected = causal_conv1d_reference(wide, weight, bias, pads, offset)
    assert all(torch.isfinite(x).all() for x in expected)
    narrow = poison(wide.float(), pads)
    tensors = (narrow, weight.float(), bias.float(), pads)
    found = causal_conv1d(*tensors, offset)
    attributes = {"offset": offset, "channels": channels, "taps": taps}
    ran = run_body(onnx_ops.CAUSAL_CONV1D, [t.numpy() for t in tensors], attributes)
    for result in (found, ran):
        assert rel(result[0], expected[0]) < 2e-6
        np.testing.assert_array_equal(np.asarray(result[1]), expected[1].float().numpy())


def scan_bound(x, chunk):
    """What float32 allows: exponents are differences of running sums within a chunk, so the
    error of a decay is a few roundings of the largest sum."""
    dt = torch.nn.functional.softplus(x["zxbcdt"][:, :, -4:] + x["dt_bias"])
    log_decay = (dt * x["a_log"].exp()).clamp(max=90)
    largest = max(float(part.sum(1).max()) for part in log_decay.split(chunk, dim=1))
    return 5e-6 + 4 * 2**-24 * largest


SCANS = list(itertools.product([1, 5, 16, 37], [4, 16], [1, 2, 4]))


def scan_inputs(length, groups, seed):
    """Inputs whose dt and decays cover their range; H = 4, P = 3, N = 5."""
    rng = torch.Generator().manual_seed(seed)
    heads, head_dim, state, batch = 4, 3, 5, 3
    inner = heads * head_dim

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    return {
        "xbc": randn(batch, length, inner + 2 * groups * state),
        "zxbcdt": 4 * randn(batch, length, heads + 7),
        "dt_bias": randn(heads),
        "a_log": torch.linspace(-4, 3, heads, dtype=torch.float64),
        "d": randn(heads),
        "pads": torch.tensor([0, length // 2, length], dtype=torch.int32),
        "initial": randn(batch, heads, head_dim, state),
    }


@pytest.mark.parametrize(("length", "chunk", "groups"), SCANS)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("limits", [(0.0, NO_LIMIT), (0.05, 0.5)])
def test_scan(length, chunk, groups, carried, limits):
    """Chunked forms equal the recurrence, with groups, an initial state and clamped dt."""
    x = scan_inputs(length, groups, seed=length + chunk + groups)
    names = ("xbc", "zxbcdt", "dt_bias", "a_log", "d")
    state = x["initial"] if carried else None
    arguments = (groups, 5, chunk, *limits)
    expected = ssd_scan_reference(*(x[n] for n in names), x["pads"], state, *arguments)
    # In float64 the chunked form is the same sum in another order.
    same = ssd_scan(*(x[n] for n in names), x["pads"], state, *arguments)
    assert max(rel(a, b) for a, b in zip(same, expected, strict=True)) < 1e-12

    single = {n: x[n].float() for n in (*names, "initial")}
    poison(single["zxbcdt"], x["pads"])  # raw dt of padding; x, B, C come from the conv
    tensors = [*(single[n] for n in names), x["pads"]]
    found = ssd_scan(*tensors, single["initial"] if carried else None, *arguments)
    op = onnx_ops.SSD_SCAN_FROM if carried else onnx_ops.SSD_SCAN
    attributes = {
        "heads": 4, "head_dim": 3, "n_groups": groups, "d_state": 5, "chunk_size": chunk,
        "dt_min": limits[0], "dt_max": limits[1],
    }
    inputs = [t.numpy() for t in tensors] + ([single["initial"].numpy()] if carried else [])
    ran = run_body(op, inputs, attributes, lengths=frozenset({length}))
    bound = scan_bound(x, chunk)
    for result in (found, ran):
        assert rel(result[0], expected[0]) < bound
        assert rel(result[1], expected[1]) < bound


def test_scan_of_strong_decay_stays_finite():
    """Decays that underflow within a chunk give zeros, not NaN or infinity."""
    x = scan_inputs(64, 1, seed=0)
    x["zxbcdt"] = x["zxbcdt"].abs() * 50
    names = ("xbc", "zxbcdt", "dt_bias", "a_log", "d")
    expected = ssd_scan_reference(*(x[n] for n in names), x["pads"], None, 1, 5, 64, 0.0, NO_LIMIT)
    tensors = [*(x[n].float() for n in names), x["pads"]]
    found = ssd_scan(*tensors, None, 1, 5, 64, 0.0, NO_LIMIT)
    attributes = {
        "heads": 4, "head_dim": 3, "n_groups": 1, "d_state": 5, "chunk_size": 64,
        "dt_min": 0.0, "dt_max": NO_LIMIT,
    }
    ran = run_body(
        onnx_ops.SSD_SCAN, [t.numpy() for t in tensors], attributes, lengths=frozenset({64})
    )
    for result in (found, ran):
        assert max(rel(a, b) for a, b in zip(result, expected, strict=True)) < scan_bound(x, 64)


def test_scan_keeps_digits_after_a_strong_decay():
    """A reset in an early chunk costs no digits of the slow decays in later chunks."""
    x = scan_inputs(64, 1, seed=3)
    x["zxbcdt"] = -x["zxbcdt"].abs() - 2  # slow everywhere ..
    x["zxbcdt"][:, 7] = 3e4  # .. but for the last token of chunk 0, which forgets everything
    x["pads"] = torch.zeros(3, dtype=torch.int32)
    names = ("xbc", "zxbcdt", "dt_bias", "a_log", "d")
    expected = ssd_scan_reference(*(x[n] for n in names), x["pads"], None, 1, 5, 8, 0.0, NO_LIMIT)
    tensors = [*(x[n].float() for n in names), x["pads"]]
    attributes = {
        "heads": 4, "head_dim": 3, "n_groups": 1, "d_state": 5, "chunk_size": 8,
        "dt_min": 0.0, "dt_max": NO_LIMIT,
    }
    ran = run_body(
        onnx_ops.SSD_SCAN, [t.numpy() for t in tensors], attributes, lengths=frozenset({64})
    )
    for result in (ssd_scan(*tensors, None, 1, 5, 8, 0.0, NO_LIMIT), ran):
        assert rel(result[0][:, 8:], expected[0][:, 8:]) < 5e-6
        assert rel(result[1], expected[1]) < 5e-6


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [24, 8, 3])
def test_gated_norm(before, group_size):
    """Both orders, all groupings."""
    rng = torch.Generator().manual_seed(group_size)
    y, z = (torch.randn(2, 5, n, dtype=torch.float64, generator=rng) for n in (24, 40))
    weight = torch.randn(24, dtype=torch.float64, generator=rng)
    expected = gated_rms_norm_reference(y, z, weight, group_size, 1e-5, before)
    tensors = [t.float() for t in (y, z, weight)]
    found = gated_rms_norm(*tensors, group_size, 1e-5, before)
    attributes = {
        "inner": 24, "group_size": group_size, "eps": 1e-5, "norm_before_gate": int(before)
    }
    (ran,) = run_body(onnx_ops.GATED_RMS_NORM, [t.numpy() for t in tensors], attributes)
    assert rel(found, expected) < 1e-6
    assert rel(ran, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_add_norm(dtype, wide):
    """Residual in float32 or in the model's dtype; 16-bit sums are made in float32."""
    rng = torch.Generator().manual_seed(1)
    hidden, residual = (torch.randn(2, 7, 24, generator=rng).to(dtype) for _ in range(2))
    residual = residual.float() if wide else residual
    weight = torch.randn(24, generator=rng).to(dtype)
    expected = add_rms_norm_reference(hidden.double(), residual.double(), weight.double(), 1e-5)
    found = add_rms_norm(hidden, residual, weight, 1e-5)
    is_wide = residual.dtype == torch.float32
    import onnx_ir as ir

    ran = run_body(
        onnx_ops.ADD_RMS_NORM, [hidden.numpy(), residual.numpy(), weight.numpy()],
        {"eps": 1e-5, "residual_in_fp32": int(is_wide)},
        dtype=ir.DataType.FLOAT if dtype == torch.float32 else ir.DataType.FLOAT16,
    )
    # One rounding to the output's dtype is all that may differ.
    half = 5e-4 if dtype == torch.float16 else 5e-7
    for result in (found, ran):
        assert rel(result[0], expected[0]) < half
        assert rel(result[1], expected[1]) < (5e-7 if is_wide else half)
        assert torch.as_tensor(result[1]).dtype == residual.dtype


@pytest.mark.parametrize("wide", [True, False], ids=["fp32 residual", "same dtype"])
def test_embed_norm(wide):
    """Rows of the table, the first and the last included, and their norms."""
    rng = torch.Generator().manual_seed(3)
    table = torch.randn(11, 40, dtype=torch.float64, generator=rng) * 0.02
    weight = torch.randn(40, dtype=torch.float64, generator=rng)
    ids = torch.tensor([[0, 10, 3], [7, 7, 1]], dtype=torch.int32)
    expected = embed_rms_norm_reference(ids, table, weight, 1e-5, wide)
    tensors = (ids, table.float(), weight.float())
    found = embed_rms_norm(*tensors, 1e-5, wide)
    attributes = {"eps": 1e-5, "residual_in_fp32": int(wide)}
    ran = run_body(onnx_ops.EMBED_RMS_NORM, [t.numpy() for t in tensors], attributes)
    for result in (found, ran):
        assert rel(result[0], expected[0]) < 1e-6
        np.testing.assert_array_equal(np.asarray(result[1]), expected[1].float().numpy())
    half = embed_rms_norm(ids, table.half(), weight.half(), 1e-5, wide)
    assert half[0].dtype == torch.float16
    assert half[1].dtype == (torch.float32 if wide else torch.float16)
