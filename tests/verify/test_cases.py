"""Which prompts a graph is verified on."""

from itertools import pairwise

import numpy as np
import pytest

from tokred_export.errors import InvalidRequest
from tokred_export.specs import ReductionSchedule, Site
from tokred_export.verify.cases import padded_lengths, prompt_cases


def chain(*tokens):
    """A schedule through these token counts, a site after each layer."""
    sites = tuple(
        Site(layer=i, tokens_in=a, tokens_out=b)
        for i, (a, b) in enumerate(pairwise(tokens))
    )
    return ReductionSchedule(method="utrc", length=tokens[0], sites=sites)


WIDE = chain(300, 260, 259, 200)


def pads_entering(schedule, prompt_len):
    """(pads entering, tokens removed) at every site, walked one by one."""
    pads, walk = schedule.length - prompt_len, []
    for site in schedule.sites:
        walk.append((pads, site.removed))
        pads = max(pads - site.removed, 0)
    return walk


def test_padded_lengths():
    """Nothing, one, few; around L_out; inside sites that remove more than one; almost all."""
    assert padded_lengths(WIDE) == (0, 1, 7, 100, 199, 200, 201, 229, 280, 299, 300)


@pytest.mark.parametrize(
    "schedule", [WIDE, chain(2048, 1902, 1767, 1641), chain(37, 30, 22), chain(9, 7, 6, 4)]
)
def test_padding_runs_out_inside_every_site(schedule):
    """For every site that removes two or more, some length leaves it 0 < pads < r."""
    walks = [pads_entering(schedule, n) for n in padded_lengths(schedule)]
    for s, site in enumerate(schedule.sites):
        inside = any(0 < walk[s][0] < walk[s][1] for walk in walks)
        assert inside == (site.removed > 1)


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_short_and_dense_graphs(length):
    """Lengths stay in range, whatever the graph."""
    dense = ReductionSchedule(method="none", length=length)
    lengths = padded_lengths(dense)
    assert {0, 1, length} <= set(lengths) and max(lengths) == length
    for thorough in (False, True):
        for case in prompt_cases(dense, 11, thorough=thorough):
            assert case.input_ids.shape == (1, length) and 0 <= case.prompt_len[0] <= length


def test_the_light_set_is_small_and_sees_the_turn():
    """Three runs: full, padding that runs out inside a site, and short."""
    cases = prompt_cases(WIDE, 50)
    assert [int(case.prompt_len[0]) for case in cases] == [300, 7, 229]
    assert any(0 < pads < r for pads, r in pads_entering(WIDE, 229))


def test_the_thorough_set_has_every_length_once():
    """All of padded_lengths, and unlike descriptions."""
    cases = prompt_cases(WIDE, 50, thorough=True)
    assert sorted(int(case.prompt_len[0]) for case in cases) == list(padded_lengths(WIDE))
    assert len({case.description for case in cases}) == len(cases)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batches(batch):
    """Every case has the asked rows, full prompts come first, and no length is lost."""
    cases = prompt_cases(WIDE, 50, batch=batch, thorough=True)
    assert {case.input_ids.shape for case in cases} == {(batch, 300)}
    assert cases[0].prompt_len.tolist() == [300] * batch
    assert {n for case in cases for n in case.prompt_len.tolist()} == set(padded_lengths(WIDE))
    rows = np.concatenate([case.input_ids for case in cases])
    assert len(np.unique(rows, axis=0)) == len(rows)  # rows differ, so that mixing them shows


def test_ids_are_seeded_and_cover_the_vocabulary():
    """The same seed gives the same prompts, another one others; ids stay in range."""
    first, again, other = (prompt_cases(WIDE, 50, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.prompt_len, b.prompt_len)
        assert not np.array_equal(a.input_ids, c.input_ids)
        assert a.input_ids.dtype == a.prompt_len.dtype == np.int32
    ids = np.concatenate([case.input_ids for case in first])
    assert (ids.min(), ids.max()) == (0, 49)


def test_texts():
    """A text stands at the end of its row; of one that is too long the last tokens count."""
    texts = [[1, 2, 3], list(range(40)) * 10]
    cases = prompt_cases(WIDE, 50, texts=texts)[3:]
    assert [case.prompt_len.tolist() for case in cases] == [[3], [300]]
    assert cases[0].input_ids[0, -3:].tolist() == [1, 2, 3]
    assert cases[1].input_ids[0].tolist() == texts[1][-300:]
    assert cases[0].description == "text, 3 of 300 tokens"
    (both,) = prompt_cases(WIDE, 50, batch=2, texts=texts)[2:]
    assert both.prompt_len.tolist() == [3, 300]


@pytest.mark.parametrize(
    ("text", "complaint"), [([], "text 1 has no tokens"), ([3, 50], "id 50, expected 0 to 49")]
)
def test_texts_that_cannot_be_run(text, complaint):
    """An empty text and a foreign tokenizer's ids are refused."""
    with pytest.raises(InvalidRequest, match=complaint):
        prompt_cases(WIDE, 50, texts=[[1], text])
