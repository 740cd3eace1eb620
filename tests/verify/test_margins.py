"""By how little two choices at a site differ, against plain loops and cases worked out by hand."""

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reduction.naive import choose_evit, choose_linked
from tiny_engines import record_of, stored_case

from tokred_export.verify.margins import (
    EXPLAINED,
    RowChoice,
    RowScores,
    find_flips,
    unexplained,
    unexplained_flips,
)
from tokred_export.verify.records import Flip, SiteAgreement


def choice(src, dst, merge):
    """A row of a Choice from lists."""
    return RowChoice(np.asarray(src), np.asarray(dst), np.asarray(merge, dtype=bool))


def lower_of(score, count, pads, protected):
    """The lower part of the split as a mask: padding, then by (score, position), no tail."""
    order = sorted(range(protected), key=lambda t: (t >= pads, score[t] if t >= pads else 0.0, t))
    return np.isin(np.arange(len(score)), order[:count])


def scores_of(score, unit, pads=0, tail=0, count=None, noise=(0.01, 0.001)):
    """The scores of a row; ``noise`` is of the split's scores and of similarities."""
    score = np.asarray(score, np.float64)
    protected = len(score) - tail
    count = len(score) // 2 if count is None else count
    lower = lower_of(score.tolist(), count, pads, protected)
    return RowScores(pads, protected, score, lower, unit, *noise)


def found(eager, engine, scores):
    """Flips as {(position, what): margin}."""
    flips = find_flips(4, 2, eager, engine, scores)
    assert all((flip.site, flip.row) == (4, 2) for flip in flips)
    return {(flip.position, flip.what): flip.margin for flip in flips}


# Tokens 0 to 2 are the lower half, 3 to 5 the upper one. In the plane of angles: 0 looks at 3
# (cosine of 10 degrees), 1 at 4 (20 degrees), 2 at 5 (30 degrees).
SCORE = [0.0, 0.10, 0.20, 0.23, 0.5, 0.9]
ANGLES = np.radians([10, 80, 150, 0, 100, 180])
UNIT = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
SCORES = scores_of(SCORE, UNIT)
FIRM = scores_of(SCORE, UNIT, noise=(1e-9, 0.001))  # importance as good as exact
RIGHT = choice([0, 1], [3, 4], [False, True])  # the two strongest; of them the stronger prunes
C10, C20, C30 = (float(np.cos(np.radians(a))) for a in (10, 20, 30))


def test_equal_choices_have_no_flips():
    """Nothing differs, nothing is to be explained."""
    assert found(RIGHT, RIGHT, SCORES) == {}


def test_removed_and_kept_by_similarity():
    """Token 2 goes in place of token 1: both by the distance between their links."""
    engine = choice([0, 2], [3, 5], [False, True])
    margin = pytest.approx((C20 - C30) / 0.001)
    assert found(RIGHT, engine, FIRM) == {(1, "kept"): margin, (2, "removed"): margin}


def test_target_by_similarity():
    """Token 1 merges into 3, at 80 degrees, instead of 4, at 20."""
    engine = choice([0, 1], [3, 3], [False, True])
    margin = pytest.approx((C20 - np.cos(np.radians(80))) / 0.001)
    assert found(RIGHT, engine, FIRM) == {(1, "target"): margin}


def test_merge_by_similarity():
    """The weaker link prunes and the stronger one merges."""
    engine = choice([0, 1], [3, 4], [True, False])
    margin = pytest.approx((C10 - C20) / 0.001)
    assert found(RIGHT, engine, SCORES) == {(0, "merge"): margin, (1, "merge"): margin}


def test_the_split_alone():
    """Tokens 2 and 3 swap halves; what follows for targets and sides is put down to that."""
    # With 3 below, 0 looks at 4 (90 degrees) or 5 (170); 3 looks at 4 (100). So 1 and 0 act, both
    # into 4, and 1 is the stronger. For 3 to go below takes 0.03 / 0.01.
    engine = choice([0, 1], [4, 4], [True, False])
    assert found(RIGHT, engine, SCORES) == {
        (0, "target"): pytest.approx(3), (0, "merge"): 0, (1, "merge"): 0,
    }  # fmt: skip


def test_a_target_from_the_other_half():
    """Token 0 merges into 2, which would have to cross the split's boundary upwards."""
    engine = choice([0, 1], [2, 4], [False, True])
    scores = scores_of(SCORE, UNIT, noise=(0.01, 1e3))  # similarities say nothing
    assert found(RIGHT, engine, scores) == {(0, "target"): pytest.approx(3)}


def test_a_source_from_the_other_half():
    """Token 3 goes instead of 0: 3 is 0.03 from the lower half."""
    engine = choice([1, 3], [4, 4], [False, True])
    scores = scores_of(SCORE, UNIT, noise=(0.01, 1e3))  # similarities say nothing
    assert found(RIGHT, engine, scores) == {
        (0, "kept"): pytest.approx(0, abs=0.01), (3, "removed"): pytest.approx(3),
        (1, "merge"): 0,
    }  # fmt: skip


def test_a_removal_answers_for_its_target():
    """All of the lower half goes. Token 3 may be there instead of 2, but not merge into 5."""
    eager = choice([0, 1, 2], [3, 4, 5], [False, True, True])
    near = scores_of([0.0, 0.10, 0.200, 0.201, 0.5, 0.9], UNIT, noise=(0.01, 0.1))
    engine = choice([0, 1, 3], [4, 4, 4], [True, False, True])
    assert found(eager, engine, near)[3, "removed"] == pytest.approx(0.1)
    engine = choice([0, 1, 3], [4, 4, 5], [True, False, True])
    margin = pytest.approx((np.cos(np.radians(100)) + 1) / 0.1)
    assert found(eager, engine, near)[3, "removed"] == margin


def test_a_kept_token_that_is_merged_into():
    """Token 1 stays and takes 0 in: a weak link is no excuse, it must be in the upper half."""
    engine = choice([0, 2], [1, 5], [False, True])
    scores = scores_of(SCORE, UNIT, noise=(0.01, 1e3))
    margin = pytest.approx((0.23 - 0.10) / 0.01)
    flips = found(RIGHT, engine, scores)
    assert (flips[1, "kept"], flips[0, "target"]) == (margin, margin)


def test_the_smaller_explanation_counts():
    """A kept token either has a weak link or is in the upper half, whichever is nearer."""
    engine = choice([0, 2], [3, 5], [False, True])
    near = scores_of([0, 0.22, 0.20, 0.23, 0.5, 0.9], UNIT)  # token 1 is 0.01 from the upper half
    assert found(RIGHT, engine, near)[1, "kept"] == pytest.approx(1)


def test_what_follows_from_a_near_tie():
    """Tokens 2 and 3 swap halves unseen: all that changes is that 0 looks for another target."""
    near = [0.0, 0.10, 0.200, 0.201, 0.5, 0.9]
    engine = choice([0, 1], [4, 4], [True, False])
    flips = found(RIGHT, engine, scores_of(near, UNIT))
    assert flips[0, "target"] == pytest.approx(0.1)
    far = [0.0, 0.10, 0.200, 0.4, 0.5, 0.9]
    assert found(RIGHT, engine, scores_of(far, UNIT))[0, "target"] == pytest.approx(20)


def test_a_target_in_use_has_not_moved():
    """A better target that the engine itself merges into cannot have been in the lower half."""
    near = [0.0, 0.10, 0.200, 0.201, 0.5, 0.9]
    engine = choice([0, 1], [4, 3], [False, True])
    flips = found(RIGHT, engine, scores_of(near, UNIT))
    assert flips[0, "target"] == pytest.approx((C10 - np.cos(np.radians(90))) / 0.001)


def test_an_idle_stronger_link_speaks_against_a_removal():
    """Token 2 goes though 0, the strongest, stays: near 1's place is not near enough."""
    engine = choice([1, 2], [4, 5], [False, True])
    assert found(RIGHT, engine, FIRM) == {
        (0, "kept"): pytest.approx((C10 - C30) / 0.001),
        (1, "merge"): 0,
        (2, "removed"): pytest.approx((C10 - C30) / 0.001),
    }


def test_a_stronger_link_may_have_lost_its_target():
    """The same, if 3, the target of 0, may be in the lower half: then 0 has no strong link."""
    engine = choice([1, 2], [4, 5], [False, True])
    margins = found(RIGHT, engine, SCORES)
    assert margins[0, "kept"] == margins[2, "removed"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (choice([0, 5], [3, 4], [False, True]), "the protected tail goes"),
        (choice([0, 1], [3, -1], [False, True]), "a link without a target"),
        (choice([0, 1], [3, 4], [True, True]), "nothing prunes"),
        (choice([0, 1], [3, 4], [False, False]), "everything prunes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_scores_lead_to(engine, why):
    """Rules that do not depend on scores have no margin."""
    scores = scores_of(SCORE, UNIT, tail=1, noise=(1e6, 1e6))
    assert None in found(RIGHT, engine, scores).values(), why


def test_padding_has_no_margin():
    """Padding goes first, from the front, into nothing; anything else is no matter of scores."""
    eager = choice([0, 1], [-1, -1], [False, False])
    scores = scores_of(SCORE, UNIT, pads=3, noise=(1e6, 1e6))
    engine = choice([1, 2], [-1, -1], [False, False])
    assert found(eager, engine, scores) == {(0, "kept"): None, (2, "removed"): None}
    engine = choice([0, 3], [-1, 4], [False, True])
    assert found(eager, engine, scores) == {(1, "kept"): None, (3, "removed"): None}
    engine = choice([0, 1], [3, -1], [False, True])
    assert found(eager, engine, scores) == {(0, "target"): None, (1, "merge"): None}


def test_prompt_tokens_beside_padding():
    """Links of a padded row are judged as any others."""
    eager = choice([0, 1], [-1, 4], [False, True])
    engine = choice([0, 2], [-1, 5], [False, True])
    scores = scores_of(SCORE, UNIT, pads=1, noise=(1e-9, 0.001))
    margin = pytest.approx((C20 - C30) / 0.001)
    assert found(eager, engine, scores) == {(1, "kept"): margin, (2, "removed"): margin}


def test_exact_scores_leave_no_room():
    """Without noise not even a tie excuses another order: position breaks ties."""
    score = [0, 0, 0, 0, 1, 1]
    eager, engine = (choice([t], [4], [True]) for t in (2, 3))
    scores = scores_of(score, UNIT, noise=(0.0, 0.001))
    assert found(eager, engine, scores)[3, "removed"] is None
    scores = scores_of(score, UNIT, noise=(1e-9, 0.001))
    assert found(eager, engine, scores)[3, "removed"] is not None


def test_without_links_importance_alone_decides():
    """EViT: the distance in importance to the other side."""
    eager, engine = (choice([0, t], [-1, -1], [False, False]) for t in (1, 2))
    scores = scores_of(SCORE, None, count=2)
    assert found(eager, engine, scores) == {
        (1, "kept"): pytest.approx(10), (2, "removed"): pytest.approx(10),
    }  # fmt: skip
    engine = choice([0, 1], [-1, 4], [False, False])
    assert found(eager, engine, scores) == {(1, "target"): None}


def test_without_scores_nothing_is_free():
    """Where positions alone decide, every difference is an error."""
    engine = choice([0, 2], [3, 5], [False, True])
    nothing = RowScores(0, 6, None, None, None, 0.0, 0.0)
    assert set(found(RIGHT, engine, nothing).values()) == {None}


# --- against the plain loops ---------------------------------------------------------------------


def draw_row(data):
    """Random sizes, scores and unit vectors of one row."""
    length = data.draw(st.integers(4, 18), "length")
    tail = data.draw(st.integers(0, 2), "tail")
    removed = data.draw(st.integers(1, length // 2), "removed")
    pads = data.draw(st.integers(0, removed), "pads")
    permille = data.draw(st.sampled_from([0, 300, 500, 1000]), "permille")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    unit = random.normal(size=(length, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return (pads, removed, permille, tail), random.uniform(size=length), unit, random


def naive(score, cosine, numbers):
    """The choice of the plain loops."""
    return choice(*choose_linked(score.tolist(), cosine.tolist(), *numbers))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), noise=st.sampled_from([1e-4, 0.01, 0.05, 0.3]))
def test_rounding_is_always_explained(data, noise):
    """Two choices from scores within the noise of the truth differ by at most twice the noise.

    With a large noise half of all tokens cross the split and chains of consequences are long:
    none of them may be called an error.
    """
    numbers, score, unit, random = draw_row(data)
    cosine = unit @ unit.T

    def rounded():
        moved = random.uniform(-noise, noise, cosine.shape)
        return score + random.uniform(-noise, noise, len(score)), cosine + moved

    eager, engine = naive(*rounded(), numbers), naive(*rounded(), numbers)
    scores = scores_of(score, unit, numbers[0], numbers[3], noise=(noise, noise))
    for flip, margin in found(eager, engine, scores).items():
        assert margin is not None and margin <= 2.001, flip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), damage=st.sampled_from(["scores", "target", "merge", "source"]))
def test_damage_is_never_explained(data, damage):
    """Where scores are far apart, any other choice has a flip that their noise does not explain."""
    numbers, score, unit, random = draw_row(data)
    pads, _, _, tail = numbers
    cosine = unit @ unit.T
    apart = np.concatenate([np.diff(np.sort(score)), np.diff(np.sort(cosine, axis=None))])
    assume((apart[apart > 1e-12] > 1e-7).all())  # the diagonal and the symmetry repeat values
    eager = naive(score, cosine, numbers)
    src, dst, merge = (part.copy() for part in eager)
    links, stay = np.flatnonzero(src >= pads), np.setdiff1d(np.arange(len(score)), src)
    if damage == "scores":
        engine = naive(random.uniform(size=len(score)), cosine, numbers)
    else:
        assume(links.size and stay.size)
        link = random.choice(links)
        if damage == "target":
            dst[link] = random.choice(stay)
        elif damage == "merge":
            merge[links] = random.permutation(merge[links])
        else:
            src[link] = random.choice(stay)
            assume(not np.isin(dst, src).any())
        order = np.argsort(src)
        engine = RowChoice(src[order], dst[order], merge[order])
    scores = scores_of(score, unit, pads, tail, noise=(1e-9, 1e-9))
    margins = found(eager, engine, scores).values()
    same = all(np.array_equal(a, b) for a, b in zip(eager, engine, strict=True))
    assert any(margin is None or margin > EXPLAINED for margin in margins) == (not same)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), noise=st.sampled_from([1e-4, 0.05]))
def test_rounding_is_explained_without_links(data, noise):
    """The same for EViT, where importance alone decides."""
    (pads, removed, _, tail), score, _, random = draw_row(data)
    eager, engine = (
        choice(*choose_evit(score + random.uniform(-noise, noise, len(score)), pads, removed, tail))
        for _ in range(2)
    )
    scores = scores_of(score, None, pads, tail, count=removed, noise=(noise, 0.0))
    margins = found(eager, engine, scores).values()
    assert all(margin is not None and margin <= 2.001 for margin in margins)


# --- of a record ---------------------------------------------------------------------------------


def test_unexplained_flips_of_a_record():
    """Those above the limit and those without a margin, over all cases, also from a file."""
    margins = [0.0, EXPLAINED, EXPLAINED * 1.001, None]
    flips = tuple(
        Flip(site=0, row=0, position=i, what="kept", margin=margin)
        for i, margin in enumerate(margins)
    )
    site = SiteAgreement(
        site=0, layer=1, tokens_in=9, removed=4, real_removed=4, same_source=0.5, same_target=1,
        same_merge=1, flips=flips,
    )  # fmt: skip
    case = stored_case(sites=(site,))
    record = record_of(case, stored_case(), case)
    again = msgspec.json.decode(msgspec.json.encode(record), type=type(record))
    assert again == record
    assert [flip.position for flip in unexplained(case)] == [2, 3]
    assert [flip.position for flip in unexplained_flips(again)] == [2, 3, 2, 3]
