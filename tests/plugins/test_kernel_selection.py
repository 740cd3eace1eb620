"""Importance, split and link kernels against their references: exact but for the mean."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, ON_GPU, TOLERANCE, close, exact, make, require_kernels

require_kernels()

from tokred_plugins.kernels import run, spec_of  # noqa: E402
from tokred_plugins.token_importance import kernel as importance  # noqa: E402
from tokred_plugins.token_importance.reference import token_importance_reference  # noqa: E402
from tokred_plugins.token_link import kernel as link  # noqa: E402
from tokred_plugins.token_link.op import token_link  # noqa: E402
from tokred_plugins.token_link.reference import token_link_reference  # noqa: E402
from tokred_plugins.token_split import kernel as split  # noqa: E402
from tokred_plugins.token_split.op import token_split  # noqa: E402
from tokred_plugins.token_split.reference import token_split_reference  # noqa: E402

# A launch takes 0.1 to 0.3 s in the interpreter: fewer cases there than on the GPU.
LENGTHS = [2, 3, 31, 64, 65, 200] if ON_GPU else [2, 31, 65]
COUNTS = range(11) if ON_GPU else (1, 4, 10)
PERMILLE = [0, 333, 500, 1000] if ON_GPU else [333, 1000]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 300])
def test_importance_is_the_mean_of_the_positive_part(width, dtype):
    """In float32 whatever the input; widths of one piece and of several."""
    y = make(0, 2, 5, width, dtype=dtype)
    scores = run(importance.calls(spec_of(y)), {"y": y})["scores"]
    assert scores.dtype == torch.float32
    # The sum is float32 even for 16-bit inputs.
    close(scores, token_importance_reference(y.cpu().double()), 2e-6, "scores")


def split_by(scores, pads, count, protect, by=None):
    """Kernels against reference, exactly, both ways."""
    given = {"scores": scores, "pads": pads}
    lower, upper = (by or token_split_reference)(scores.cpu(), pads.cpu(), count, protect)
    for search in (False, True):
        specs = (spec_of(scores), spec_of(pads))
        made = run(split.calls(*specs, count, protect, search=search), given)
        assert torch.equal(made["lower"].cpu(), lower)
        assert torch.equal(made["upper"].cpu(), upper)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 1100, 1600])
@pytest.mark.parametrize("search", [False, True])
def test_norms_beside_a_split(search, width, dtype):
    """Of every token, none infinite; the split is as without. Rows of one piece and of several."""
    scores, hidden = make(5, 2, 150), make(6, 2, 150, width, dtype=dtype)
    hidden[1, 3] = 0
    given = {"scores": scores, "pads": ints(0, 70), "hidden": hidden}
    specs = [spec_of(x) for x in given.values()]
    calls = split.calls(*specs[:2], 75, 1, search=search, hidden=specs[2])
    assert [c.kernel.name for c in calls] == (
        ["token_split_search_norm"] if search else ["token_split_rank", "token_split_norm"]
    )
    made = run(calls, given)
    for name, want in zip(
        ("lower", "upper"), token_split_reference(scores.cpu(), given["pads"].cpu(), 75, 1),
        strict=True,
    ):
        assert torch.equal(made[name].cpu(), want), name
    assert made["inverse"][1, 3].item() == pytest.approx(1e12)
    hidden[1, 3] = 1
    made["inverse"][1, 3] = width**-0.5
    close(made["inverse"], 1 / hidden.cpu().double().norm(dim=2), 2e-6, "inverse")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("protect", [0, 1, 2] if ON_GPU else [0, 2])
def test_split_is_the_reference(length, protect):
    """Any count the tail leaves, with and without padding."""
    scores = make(length, 3, length)
    for count in {0, 1, length // 3, length // 2, length - protect} if ON_GPU else {1, length // 2}:
        if count <= length - protect:
            split_by(scores, ints(0, length // 4, length), count, protect)


def test_split_breaks_ties_by_position():
    """Equal scores, both zeros, tiny, negative and huge values."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 1e-45, -1e-45, 1e37, -1e37, 0.0, 1.0])
    scores = torch.stack([values.roll(shift) for shift in range(11)]).to(DEVICE)
    for count in COUNTS:
        split_by(scores, ints(*[0] * 11), count, protect=1)


def test_split_ignores_the_scores_of_padding():
    """NaN or infinite scores of padding: padding is lowest whatever stands there."""
    scores = make(0, 2, 40)
    scores[0, :7] = torch.nan
    scores[1, :30] = torch.inf
    split_by(scores, ints(7, 30), 20, 1)


def test_split_refuses_more_tokens_than_fit():
    """The limit is named before anything is launched."""
    scores, pads = torch.empty(1, 32769), torch.empty(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="32769 tokens at a reduction site"):
        split.calls(spec_of(scores), spec_of(pads), 100, 1)


def link_by(similarity, target, lower, upper, pads, removed, permille, by=None):
    given = {"similarity": similarity, "target": target, "lower": lower, "upper": upper,
             "pads": pads}
    made = run(link.calls(*(spec_of(x) for x in given.values()), removed, permille), given)
    on_cpu = {name: x.cpu() for name, x in given.items()}
    expected = (by or token_link_reference)(**on_cpu, removed=removed, prune_permille=permille)
    for name, want in zip(("src", "dst", "merge", "keep"), expected, strict=True):
        assert made[name].dtype == want.dtype
        assert torch.equal(made[name].cpu(), want), name
    assert made["left"].tolist() == [max(n - removed, 0) for n in pads.tolist()]


def a_split(seed, batch, n_lower, n_upper):
    """A random split of all positions, and a random partner for each lower one."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(n_lower + n_upper, generator=generator) for _ in range(batch)]
    lower = torch.stack([o[:n_lower].sort().values for o in order]).int()
    upper = torch.stack([o[n_lower:].sort().values for o in order]).int()
    best = torch.randint(n_upper, (batch, n_lower), generator=generator)
    return lower.to(DEVICE), upper.to(DEVICE), upper.gather(1, best).to(DEVICE)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 9), (20, 20), (33, 70)], ids=str)
@pytest.mark.parametrize("permille", PERMILLE)
def test_link_is_the_reference(sizes, permille):
    """Every number of removals, padding fewer and more than it."""
    lower, upper, target = a_split(1, 3, *sizes)
    similarity = make(2, 3, sizes[0]).clamp(-1, 1)
    for removed in {1, sizes[0] // 2 or 1, sizes[0]} if ON_GPU else {sizes[0] // 2 or 1, sizes[0]}:
        link_by(similarity, target, lower, upper, ints(0, 4, sum(sizes)), removed, permille)


def test_link_breaks_ties_by_position():
    """All similarities equal, then two values only."""
    lower, upper, target = a_split(3, 2, 16, 18)
    for similarity in (torch.zeros(2, 16), make(4, 2, 16).cpu().sign()):
        for removed in (1, 7, 16) if ON_GPU else (7,):
            given = (similarity.to(DEVICE), target, lower, upper, ints(0, 3), removed, 500)
            link_by(*given)


def test_link_ignores_what_padding_is_similar_to():
    """A NaN similarity and no target at all, on padding."""
    lower, upper, target = a_split(5, 1, 12, 12)
    similarity = make(6, 1, 12)
    similarity[lower < 9] = torch.nan
    target[lower < 9] = -1
    link_by(similarity, target, lower, upper, ints(9), 8, 500)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="true sizes need a GPU")
@pytest.mark.parametrize("length", [2048, 3001, 8192, 32768])
@pytest.mark.parametrize("levels", [40, None], ids=["many ties", "few ties"])
def test_selection_at_true_sizes(length, levels):
    """Split and link up to the longest sequence, against the sort-based ops."""
    scores = make(7, 2, length)
    if levels:
        scores = (scores * levels / 4).round() / levels
    pads = ints(0, length // 10)
    for count in (1, length // 3, length // 2):
        split_by(scores, pads, count, 1, by=token_split)
    lower, upper, target = a_split(8, 2, length // 2, length - length // 2)
    similarity = scores[:, : length // 2].clamp(-1, 1).contiguous()
    for removed in (1, length // 6, length // 2):
        link_by(similarity, target, lower, upper, pads, removed, 500, by=token_link)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="true sizes need a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_importance_at_true_sizes(dtype):
    """Both model widths."""
    for width in (1536, 5120):
        y = make(9, 2, 700, width, dtype=dtype)
        scores = run(importance.calls(spec_of(y)), {"y": y})["scores"]
        expected = token_importance_reference(exact({"y": y})["y"])
        close(scores, expected, TOLERANCE[torch.float32], "scores")
