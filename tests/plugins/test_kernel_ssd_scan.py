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
from tokred_plugins.ssd_scan.launches import SSD_SCAN, SSD_STATE, SSD_STEPS, calls  # noqa: E402
from tokred_plugins.ssd_scan.op import NO_LIMIT, ssd_scan  # noqa: E402
from tokred_plugins.ssd_scan.reference import ssd_scan_reference  # noqa: E402

SMALL = Tactic({"Q": 16, "HEADS": 1}, 4)


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


def launch(given, groups, states, limits=(0.0, NO_LIMIT), tactic=SMALL, **options):
    specs = [x if x is None else spec_of(x) for x in given.values()]
    tactics = {"ssd_scan": tactic}
    made = run(calls(*specs, groups, states, *limits, tactics=tactics, **options), given)
    return made["y"], made["state"]


def check(
    length, pads=(0,), heads=2, head_dim=8, groups=1, states=16, dtype=torch.float32,
    initial=False, limits=(0.0, NO_LIMIT), tactic=SMALL, **options,
):
    given = inputs(length, pads, heads, head_dim, groups, states, dtype, initial)
    y, state = launch(given, groups, states, limits, tactic, **options)
    expected = ssd_scan_reference(**exact(given), n_groups=groups, d_state=states,
                                  chunk_size=0, dt_min=limits[0], dt_max=limits[1])
    assert y.dtype == dtype and state.dtype == torch.float32
    close(y, expected[0], TOLERANCE[dtype], "y")
    close(state, expected[1], TOLERANCE[dtype], "state")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 37], ids="L{}".format)
def test_any_length(length, dtype):
    """Below one chunk, whole chunks, and tokens left over."""
    check(length, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [1, 2, 4, 9])
def test_segments_do_not_change_the_result(segments, dtype):
    """Pieces of the sequence side by side, the last one short; more pieces than chunks too."""
    check(71, dtype=dtype, segments=segments, initial=True)


def test_groups_share_b_and_c():
    """G > 1, and head and state sizes that are no power of two."""
    check(21, heads=6, head_dim=5, groups=3, states=10, segments=2)


@pytest.mark.parametrize("segments", [1, 3])
def test_several_heads_in_one_program(segments):
    """Four heads a program where the group has four, two where it has six."""
    four = Tactic({"Q": 16, "HEADS": 4}, 4)
    check(40, heads=4, tactic=four, segments=segments)
    check(40, heads=6, tactic=four, segments=segments)


def test_dt_is_clamped():
    """Both limits of dt act."""
    check(20, limits=(0.3, 0.6))


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("segments", [1, 3])
def test_padding_neither_decays_nor_writes(segments, initial):
    """Padding of a few tokens, of whole chunks and segments, and of a whole row."""
    check(50, pads=(0, 3, 17, 33, 49, 50), segments=segments, initial=initial)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poisoned_padding_has_no_effect(poison):
    """NaN or infinity in padded rows of any input changes neither real rows nor the state."""
    given = inputs(40, (0, 5, 20), 2, 8, 1, 16, torch.float32)
    clean_y, clean_state = launch(given, 1, 16, segments=2)
    for row, pad in enumerate((0, 5, 20)):
        given["xbc"][row, :pad] = poison
        given["zxbcdt"][row, :pad] = poison
    y, state = launch(given, 1, 16, segments=2)
    assert torch.equal(state, clean_state)
    for row, pad in enumerate((0, 5, 20)):
        assert torch.equal(y[row, pad:], clean_y[row, pad:])


def test_extreme_decay_stays_finite():
    """Decay to zero within a token, and none at all: no overflow above the diagonal."""
    given = inputs(33, (0,), 2, 8, 1, 16, torch.float32)
    given["a_log"] = torch.tensor([6.0, -12.0], device=DEVICE)
    given["dt_bias"] = torch.tensor([4.0, -20.0], device=DEVICE)
    y, state = launch(given, 1, 16)
    expected = ssd_scan_reference(**exact(given), n_groups=1, d_state=16, chunk_size=0,
                                  dt_min=0.0, dt_max=NO_LIMIT)
    close(y, expected[0], 2e-5, "y")
    close(state, expected[1], 2e-5, "state")


@pytest.mark.gpu
@pytest.mark.skipif(DTYPES[-1] != torch.bfloat16, reason="true sizes need a GPU")
@pytest.mark.parametrize(
    ("kernel", "tactic", "dtype"),
    [(k, *pair) for k in (SSD_SCAN, SSD_STATE, SSD_STEPS) for pair in every_tactic(k.tactics)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_scan_at_true_sizes(kernel, tactic, dtype):
    """Every candidate tactic at 2.7b's head sizes, against the chunked form in float64."""
    given = inputs(700, (0, 150), 8, 64, 2, 128, dtype, initial=True)
    specs = [spec_of(x) for x in given.values()]
    tactics = {kernel.name: tactic}
    expected = ssd_scan(**exact(given), n_groups=2, d_state=128, chunk_size=64,
                        dt_min=0.0, dt_max=NO_LIMIT)
    for segments in (1, 3):
        made = run(calls(*specs, 2, 128, 0.0, NO_LIMIT, tactics, segments), given)
        close(made["y"], expected[0], TOLERANCE[dtype], f"y with {tactic}")
        close(made["state"], expected[1], TOLERANCE[dtype], f"state with {tactic}")
