"""The matching kernels against the pair-by-pair reference."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, ON_GPU, close, every_tactic, make, require_kernels

require_kernels()

from tokred_plugins.kernel_faces import FACES  # noqa: E402
from tokred_plugins.kernels import Spec, Tactic, run, spec_of  # noqa: E402
from tokred_plugins.token_match import kernel as match  # noqa: E402
from tokred_plugins.token_match.op import token_match  # noqa: E402
from tokred_plugins.token_match.reference import token_match_reference  # noqa: E402

SMALL = Tactic({"BLOCK_A": 16, "BLOCK_B": 16, "BLOCK_D": 16}, 4)


def a_split(length, n_lower, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(length, generator=generator) for _ in range(batch)]
    lower = torch.stack([o[:n_lower].sort().values for o in order]).int()
    upper = torch.stack([o[n_lower:].sort().values for o in order]).int()
    return lower.to(DEVICE), upper.to(DEVICE)


def launch(hidden, lower, upper, tactic=SMALL, parts=None):
    filled = {}
    if parts is not None:
        filled["programs"] = parts * hidden.shape[0] * -(-lower.shape[1] // 16)
    specs = [spec_of(x) for x in (hidden, lower, upper)]
    given = {"hidden": hidden, "lower": lower, "upper": upper}
    made = run(match.calls(*specs, {"token_match": tactic}, **filled), given)
    return made["similarity"].cpu(), made["target"].cpu()


def check(hidden, lower, upper, tolerance=2e-6, by=token_match_reference, **options):
    """Similarities agree; a target may differ from the best by no more than the tolerance."""
    similarity, target = launch(hidden, lower, upper, **options)
    exact = hidden.cpu().double()
    expected, best = by(exact, lower.cpu(), upper.cpu())
    close(similarity, expected, tolerance, "similarity")
    unit = exact / exact.norm(dim=2, keepdim=True).clamp(min=1e-12)
    for row in range(hidden.shape[0]):
        mine = unit[row, lower[row].cpu().long()]
        chosen = (mine * unit[row, target[row].long()]).sum(1)
        short = (expected[row] - chosen).max().item()
        assert short <= tolerance, f"a chosen partner is {short:.1e} less similar than the best"
        assert torch.isin(target[row], upper[row].cpu()).all()
    return target, best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("sizes", [(2, 1, 5), (37, 18, 20), (70, 33, 40)], ids=str)
def test_match_is_the_reference(sizes, parts, dtype):
    """Odd counts and widths, partners in one piece and in several."""
    length, n_lower, width = sizes
    hidden = make(1, 2, length, width, dtype=dtype)
    check(hidden, *a_split(length, n_lower, batch=2), parts=parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_the_first_of_equal_partners_wins(parts, dtype):
    """Every upper token occurs many times over, in and across tiles."""
    hidden = make(2, 1, 5, 24, dtype=dtype)[:, torch.arange(80) % 5].contiguous()
    lower, upper = a_split(80, 30)
    target, best = check(hidden, lower, upper, parts=parts)
    first = {int(p) % 5: int(p) for p in reversed(upper[0].tolist())}
    # Of tokens equal to the best one, the earliest.
    assert target[0].tolist() == [first[int(p) % 5] for p in best[0]]


def test_norms_that_are_there_already():
    """Are used, and computed by nobody: tokens whose norm is said to be less match less."""
    hidden = make(7, 1, 40, 24)
    lower, upper = a_split(40, 16)
    given = {"hidden": hidden, "lower": lower, "upper": upper,
             "inverse": 1 / hidden.norm(dim=2)}
    given["inverse"][:, upper[0, ::2].long()] *= 1e-3
    specs = [spec_of(x) for x in given.values()]
    calls = match.calls(*specs[:3], {"token_match": SMALL}, inverse=specs[3])
    assert [c.kernel.name for c in calls] == ["token_match", "token_match_best"]
    unit = hidden[0].cpu().double() * given["inverse"][0].cpu().double()[:, None]
    cosine = unit[lower[0].cpu().long()] @ unit[upper[0].cpu().long()].T
    made = run(calls, given)
    assert torch.equal(made["target"][0].cpu(), upper[0].cpu()[cosine.argmax(1)])
    close(made["similarity"][0], cosine.max(1).values, 2e-6, "similarity")


def test_zero_vectors_match_the_first():
    """A zero vector is equally unlike everything."""
    hidden = make(3, 1, 20, 16)
    lower, upper = a_split(20, 8)
    hidden[0, lower[0, 2].long()] = 0
    similarity, target = launch(hidden, lower, upper)
    assert similarity[0, 2] == 0 and target[0, 2] == upper[0, 0]


def test_poisoned_padding_is_nobodys_partner():
    """NaN rows neither win nor disturb others."""
    hidden = make(4, 1, 40, 16)
    lower, upper = a_split(40, 18)
    clean = launch(hidden, lower, upper)
    used = clean[1][0].unique()
    victim = next(int(p) for p in upper[0].tolist() if p not in used.tolist())
    hidden[0, victim] = torch.nan
    similarity, target = launch(hidden, lower, upper)
    assert torch.equal(similarity, clean[0]) and torch.equal(target, clean[1])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="true sizes need a GPU")
@pytest.mark.parametrize(("tactic", "dtype"), every_tactic(match.TOKEN_MATCH.tactics), ids=str)
def test_match_at_true_sizes(tactic, dtype):
    """Every candidate tactic at 130m's width, against the dense op in float64."""
    hidden = make(5, 2, 1501, 768, dtype=dtype)
    lower, upper = a_split(1501, 750, batch=2)
    check(hidden, lower, upper, tolerance=2e-5, by=token_match, tactic=tactic)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="true sizes need a GPU")
def test_the_longest_sequence():
    """32768 tokens: the matrix of similarities alone would take 1 GiB in float32."""
    hidden = make(6, 1, 32768, 256, dtype=torch.bfloat16)
    lower, upper = a_split(32768, 16384)
    default = match.TOKEN_MATCH.tactics[0]
    similarity, target = launch(hidden, lower, upper, tactic=default)
    expected, _ = token_match(hidden.float(), lower, upper)
    close(similarity, expected.cpu().double(), 2e-5, "similarity")
    assert target.min() >= 0


def test_parts_fill_the_gpu_that_is_there():
    """Partners are shared out among as many programs as a small GPU or a large one takes."""
    halves = Spec((1, 1024), "i32")
    specs = {"hidden": Spec((1, 2048, 768), "fp16"), "lower": halves, "upper": halves}
    grids = [FACES["token_match"].calls(specs, known)[1].grid
             for known in ({"multiprocessors": 16}, {"multiprocessors": 132}, {})]
    assert grids[0] == (8, 4) and grids[1] == grids[2] == (16, 8)


@pytest.mark.parametrize(
    ("target", "batch", "tile"),
    [(90, 8, (128, 256)), (100, 8, (128, 256)), (90, 5, (128, 128)), (90, 1, (64, 128)),
     (80, 8, (128, 128)), (86, 8, (128, 128)), (120, 8, (128, 128)), (None, 8, (128, 128))],
)
def test_the_widest_tiles_are_for_many_tokens_and_where_they_fit(target, batch, tile):
    """Their operands are more shared memory than a block has on most targets."""
    halves = Spec((batch, 1024), "i32")
    specs = {"hidden": Spec((batch, 2048, 2560), "fp16"), "lower": halves, "upper": halves}
    known = {"multiprocessors": 132} | ({} if target is None else {"target": target})
    call = FACES["token_match"].calls(specs, known)[1]
    blocks = call.tactic.blocks
    assert (blocks["BLOCK_A"], blocks["BLOCK_B"]) == tile
    rows, parts = call.grid
    assert rows * blocks["BLOCK_A"] >= 1024 and parts * call.extras["share"] >= 1024
