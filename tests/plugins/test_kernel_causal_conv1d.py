"""The convolution kernel against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    close,
    every_tactic,
    exact,
    make,
    require_kernels,
)

require_kernels()

from tokred_plugins.causal_conv1d.kernel import TACTICS, calls  # noqa: E402
from tokred_plugins.causal_conv1d.reference import causal_conv1d_reference  # noqa: E402
from tokred_plugins.kernels import Tactic, run, spec_of  # noqa: E402

SMALL = Tactic({"ROWS": 4, "BLOCK": 32}, 1)


def check(length, channels, taps, pads, dtype, offset=6, tactic=SMALL, poison=True):
    given = {
        "zxbcdt": make(0, len(pads), length, offset + channels + 5, dtype=dtype),
        "weight": make(1, channels, taps, dtype=dtype),
        "bias": make(2, channels, dtype=dtype),
        "pads": torch.tensor(pads, dtype=torch.int32, device=DEVICE),
    }
    expected = causal_conv1d_reference(**exact(given), offset=offset)
    if poison:
        for row, count in enumerate(pads):
            given["zxbcdt"][row, :count] = torch.nan
    specs = [spec_of(x) for x in given.values()]
    got = run(calls(*specs, offset, {"causal_conv1d": tactic}), given)
    close(got["y"], expected[0], TOLERANCE[dtype], "y")
    # The state is a copy of inputs: exact.
    assert torch.equal(got["state"].cpu().double(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9], ids="L{}".format)
def test_short_and_odd_lengths(length, dtype):
    """L below, at and above K, and rows left over at the end; poisoned padding has no effect."""
    check(length, 40, 4, [0, min(2, length), length], dtype)


@pytest.mark.parametrize("taps", [2, 3, 4, 5], ids="K{}".format)
def test_other_conv_widths(taps):
    """Widths that are no power of two."""
    check(7, 33, taps, [0, 3], torch.float32)


def test_padding_across_several_tiles():
    """A row whose first real token lies in the last tile."""
    check(11, 8, 4, [9, 0], torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DTYPES[-1] != torch.bfloat16, reason="true sizes need a GPU")
@pytest.mark.parametrize(("tactic", "dtype"), every_tactic(TACTICS), ids=str)
@pytest.mark.parametrize("inner", [1536, 5120], ids=["130m", "2.7b"])
def test_conv_at_true_sizes(inner, tactic, dtype):
    """Every candidate tactic at the sizes of real models."""
    check(521, inner + 256, 4, [0, 77], dtype, offset=inner, tactic=tactic)
