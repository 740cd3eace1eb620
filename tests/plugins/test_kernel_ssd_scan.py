"""The scan kernels against the float64 recurrence, token by token."""

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

from tokred_plugins.kernels import Tactic, run, spec_of  # noqa: E402
from tokred_plugins.ssd_scan.launches import (  # noqa: E402
    SSD_CHUNK_SCAN,
    SSD_CHUNK_STATE,
    SSD_PASS,
    SSD_SCAN,
    SSD_STEPS,
    calls,
)
from tokred_plugins.ssd_scan.op import NO_LIMIT, ssd_scan  # noqa: E402
from tokred_plugins.ssd_scan.reference import ssd_scan_reference  # noqa: E402

KERNELS = (SSD_SCAN, SSD_STEPS, SSD_CHUNK_SCAN, SSD_CHUNK_STATE, SSD_PASS)
# Small chunks, of two tiles side by side, and fewer of them ahead than there are.
SMALL = {
    "ssd_scan": Tactic({"Q": 16, "HEADS": 1}, 4),
    "ssd_chunk_scan": Tactic({"Q": 32, "ROWS": 16, "HEADS": 2}, 4),
    "ssd_pass": Tactic({"BLOCK": 64, "AHEAD": 2}, 1),
}


def inputs(length, pads, heads, head_dim, groups, states, dtype, initial=False):
    batch, inner, extra = len(pads), heads * head_dim, 2 * groups * states
    return {
        "xbc": make(0, batch, length, inner + extra, dtype=dtype),
        "zxbcdt": make(1, batch, length, 2 * inner + extra + heads, dtype=dtype),
        "dt_bias": make(2, heads),
        "a_log": make(3, heads),
        "d": make(4, heads),
        "pads": torch.tensor(pads, dtype=torch.int32, device=DEVICE),
        "initial_state": make(5, batch, heads, head_dim, states) if initial else None,
    }


def launch(given, groups, states, limits=(0.0, NO_LIMIT), tactics=SMALL, segments=1):
    specs = [x if x is None else spec_of(x) for x in given.values()]
    made = run(calls(*specs, groups, states, *limits, tactics, segments), given)
    return made["y"], made["state"]


def check(
    length, pads=(0,), heads=2, head_dim=8, groups=1, states=16, dtype=torch.float32,
    initial=False, limits=(0.0, NO_LIMIT), tactics=SMALL, segments=1,
):
    given = inputs(length, pads, heads, head_dim, groups, states, dtype, initial)
    y, state = launch(given, groups, states, limits, tactics, segments)
    expected = ssd_scan_reference(**exact(given), n_groups=groups, d_state=states,
                                  chunk_size=0, dt_min=limits[0], dt_max=limits[1])
    assert y.dtype == dtype and state.dtype == torch.float32
    close(y, expected[0], TOLERANCE[dtype], "y")
    close(state, expected[1], TOLERANCE[dtype], "state")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
@pytest.mark.parametrize("length", [1, 15, 16, 37, 71], ids="L{}".format)
def test_any_length(length, segments, dtype):
    """Below one chunk, whole chunks, and tokens left over."""
    check(length, dtype=dtype, segments=segments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_an_initial_state_is_continued(segments, dtype):
    """Several chunks from a state, the last one short."""
    check(103, dtype=dtype, segments=segments, initial=True)


@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_groups_share_b_and_c(segments):
    """G > 1, and head and state sizes that are no power of two."""
    check(21, heads=6, head_dim=5, groups=3, states=10, segments=segments)


@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_several_heads_in_one_program(segments):
    """Four heads a program where the group has four, two where it has six."""
    four = {
        "ssd_scan": Tactic({"Q": 16, "HEADS": 4}, 4),
        "ssd_chunk_scan": Tactic({"Q": 16, "ROWS": 16, "HEADS": 4}, 4),
    }
    check(40, heads=4, tactics=four, segments=segments)
    check(40, heads=6, tactics=four, segments=segments)


@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_dt_is_clamped(segments):
    """Both limits of dt act."""
    check(20, limits=(0.3, 0.6), segments=segments)


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_padding_neither_decays_nor_writes(segments, initial):
    """Padding of a few tokens, of whole chunks, and of a whole row."""
    check(50, pads=(0, 3, 17, 33, 49, 50), segments=segments, initial=initial)


@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poisoned_padding_has_no_effect(poison, segments):
    """NaN or infinity in padded rows of any input changes neither real rows nor the state."""
    given = inputs(40, (0, 5, 20), 2, 8, 1, 16, torch.float32)
    clean_y, clean_state = launch(given, 1, 16, segments=segments)
    for row, pad in enumerate((0, 5, 20)):
        given["xbc"][row, :pad] = poison
        given["zxbcdt"][row, :pad] = poison
    y, state = launch(given, 1, 16, segments=segments)
    assert torch.equal(state, clean_state)
    for row, pad in enumerate((0, 5, 20)):
        assert torch.equal(y[row, pad:], clean_y[row, pad:])


@pytest.mark.parametrize("segments", [1, 2], ids=["walk", "side by side"])
def test_extreme_decay_stays_finite(segments):
    """Decay to zero within a token, and none at all: no overflow above the diagonal."""
    given = inputs(33, (0,), 2, 8, 1, 16, torch.float32)
    given["a_log"] = torch.tensor([6.0, -12.0], device=DEVICE)
    given["dt_bias"] = torch.tensor([4.0, -20.0], device=DEVICE)
    y, state = launch(given, 1, 16, segments=segments)
    expected = ssd_scan_reference(**exact(given), n_groups=1, d_state=16, chunk_size=0,
                                  dt_min=0.0, dt_max=NO_LIMIT)
    close(y, expected[0], 2e-5, "y")
    close(state, expected[1], 2e-5, "state")


@pytest.mark.gpu
@pytest.mark.skipif(DTYPES[-1] != torch.bfloat16, reason="true sizes need a GPU")
@pytest.mark.parametrize(
    ("kernel", "tactic", "dtype"),
    [(k, *pair) for k in KERNELS for pair in every_tactic(k.tactics)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_scan_at_true_sizes(kernel, tactic, dtype):
    """Every candidate tactic at 2.7b's head sizes, against the chunked form in float64."""
    given = inputs(700, (0, 150), 8, 64, 2, 128, dtype, initial=True)
    specs = [spec_of(x) for x in given.values()]
    tactics = {kernel.name: tactic}
    expected = ssd_scan(**exact(given), n_groups=2, d_state=128, chunk_size=64,
                        dt_min=0.0, dt_max=NO_LIMIT)
    for segments in (1, 2):
        made = run(calls(*specs, 2, 128, 0.0, NO_LIMIT, tactics, segments), given)
        close(made["y"], expected[0], TOLERANCE[dtype], f"y with {tactic}")
        close(made["state"], expected[1], TOLERANCE[dtype], f"state with {tactic}")
