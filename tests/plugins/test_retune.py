"""Tactics that can take a call's place: the same call as if it had been chosen from the start."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from kernel_shapes import MODELS, cases
from tokred_plugins.kernel_faces import TUNINGS
from tokred_plugins.retune import candidates

CASES = {
    f"{case.op}-{model}-B{batch}": case
    for model, batch in (("130m", 1), ("2.7b", 8))
    for case in cases(MODELS[model], batch, 2048, "fp16")
}
# So that the share of a program of token_match is the same for all tile sizes.
ONE_PART = {"programs": 1}


def with_tactic(case, call):
    """The call of the same kernel when the op's ``calls`` is asked for this one's tactic."""
    # Which of the scan's two ways is taken is decided with its tactic; here it is already.
    options = {}
    if call.kernel.name.startswith("ssd_"):
        options = {"segments": 1 if call.kernel.name in ("ssd_steps", "ssd_scan") else 2}
    if case.op == "token_match":
        options = ONE_PART
    made = case.launches({call.kernel.name: call.tactic}, **options)
    return next(c for c in made if c.kernel is call.kernel)


@pytest.mark.parametrize("name", CASES)
def test_a_candidate_is_what_calls_would_make(name):
    """Grid and constants of every candidate are those that kernel.py computes for its tactic."""
    case = CASES[name]
    for call in case.launches(**(ONE_PART if case.op == "token_match" else {})):
        own, *others = candidates(call)
        assert own is call
        for other in others:
            assert other == with_tactic(CASES[name], other), (call.kernel.name, other.tactic)


@pytest.mark.parametrize("name", CASES)
def test_a_candidate_changes_nothing_that_others_see(name):
    """Inputs, extras, outputs and constants stay; a candidate is not offered twice."""
    for call in CASES[name].launches():
        offered = candidates(call)
        for other in offered[1:]:
            assert replace(other, tactic=call.tactic, grid=call.grid) == call
        tactics = [str(c.tactic) for c in offered]
        assert len(tactics) == len(set(tactics))


def test_most_tactics_can_stand_in():
    """What is not offered is another chunk and parts that are no whole tiles."""
    for case in CASES.values():
        for call in case.launches():
            offered = {str(c.tactic) for c in candidates(call)}
            refused = [t for t in call.kernel.tactics if str(t) not in offered]
            if call.kernel.name in ("ssd_scan", "ssd_chunk_scan"):
                assert all(t.blocks["Q"] != call.tactic.blocks["Q"] for t in refused)
            elif call.kernel.name == "token_match":
                assert all(call.extras["share"] % t.blocks["BLOCK_B"] for t in refused)
            else:
                assert not refused, call.kernel.name


def test_the_chunk_stays():
    """Another Q would not fit the steps that the kernel before has written."""
    call = CASES["ssd_scan-2.7b-B8"].launches()[-1]
    assert {c.tactic.blocks["Q"] for c in candidates(call)} == {call.tactic.blocks["Q"]}


def test_heads_of_a_program_share_a_group():
    """Two heads a program do not go into groups of three."""
    call = CASES["ssd_scan-2.7b-B8"].launches()[-1]
    call = replace(call, constants={**call.constants, "H": 24}, grid=(24, 1))
    assert 2 in {c.tactic.blocks["HEADS"] for c in candidates(call)}
    groups_of_three = replace(call, constants={**call.constants, "G": call.constants["H"] // 3})
    assert {c.tactic.blocks["HEADS"] for c in candidates(groups_of_three)} == {1}


@pytest.mark.parametrize(("tiles", "sizes"), [(3, {64}), (4, {64, 128, 256}), (6, {64, 128})])
def test_parts_are_whole_tiles(tiles, sizes):
    """A tile that does not divide a program's share would reach into the next one's."""
    call = CASES["token_match-130m-B1"].launches()[1]
    square = {"BLOCK_A": call.tactic.blocks["BLOCK_A"], "BLOCK_B": 64, "BLOCK_D": 64}
    call = replace(call, tactic=next(t for t in call.kernel.tactics if t.blocks == square))
    shared = replace(call, extras={**call.extras, "share": 64 * tiles})
    assert {c.tactic.blocks["BLOCK_B"] for c in candidates(shared)} == sizes


def test_a_kernel_without_a_tuning_keeps_its_blocks():
    """What nobody has thought about is not changed; warps and stages may be."""
    call = CASES["add_rms_norm-130m-B1"].launches()[0]
    unknown = replace(call.kernel, name="unheard_of")
    assert unknown.name not in TUNINGS and len(candidates(call)) > 1
    same = [t for t in unknown.tactics if t.blocks == call.tactic.blocks]
    assert [c.tactic for c in candidates(replace(call, kernel=unknown))] == same


def test_a_tuning_that_disagrees_with_the_kernel_is_an_error():
    """A launch that follows from block sizes in a way nobody stated must not be guessed."""
    call = CASES["causal_conv1d-130m-B1"].launches()[0]
    with pytest.raises(RuntimeError, match=r"causal_conv1d.*\(1, 1\).*disagree"):
        candidates(replace(call, grid=(1, 1)))
