"""The Triton kernel: one program a sequence; two selections by one search."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_selection import ascending_bits, lowest, two_kth_lowest
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose, power_of_two
from tokred_plugins.token_split.kernel import TACTICS, check_length, warps_for


@triton.jit(do_not_specialize=["n_lower", "n_upper", "removed"])
def token_link_kernel(
    similarity, target, lower, upper, pads, n_lower, n_upper, removed, src, dst, merge, keep,
    PRUNE_PERMILLE: tl.constexpr, BLOCK_LOWER: tl.constexpr, BLOCK_UPPER: tl.constexpr,
):
    batch = tl.program_id(2)
    row = batch.to(tl.int64)
    i, j = tl.arange(0, BLOCK_LOWER), tl.arange(0, BLOCK_UPPER)
    inside = i < n_lower
    position = tl.load(lower + row * n_lower + i, mask=inside, other=0)
    partner = tl.load(target + row * n_lower + i, mask=inside, other=-1)
    strength = tl.load(similarity + row * n_lower + i, mask=inside, other=0)
    other = tl.load(upper + row * n_upper + j, mask=j < n_upper, other=0)

    # Padding first, then the strongest link: the lowest key goes first.
    padding = inside & (position < tl.load(pads + batch))
    keys = tl.where(padding, 0, ascending_bits(-strength))
    keys = tl.where(inside, keys, 4294967295)
    n_pad = tl.minimum(tl.sum(padding.to(tl.int32), axis=0), removed)
    n_prune = (removed - n_pad) * PRUNE_PERMILLE // 1000
    kth, kth_merge = two_kth_lowest(keys, removed, n_pad + n_prune)
    gone, rank = lowest(keys, kth, removed)
    prunes, _ = lowest(keys, kth_merge, n_pad + n_prune)

    slot = row * removed + rank - 1
    tl.store(src + slot, position, mask=gone)
    tl.store(dst + slot, tl.where(padding, -1, partner), mask=gone)
    tl.store(merge + slot, prunes == 0, mask=gone)

    # A survivor moves down by the removed positions before it. An upper position p at place j
    # has p - j lower ones before it; rank of the last of them counts those that are gone.
    keep += row * (n_lower + n_upper - removed)
    tl.store(keep + position - rank, position, mask=inside & (gone == 0))
    before = other - j
    moved = tl.gather(rank, tl.maximum(before - 1, 0), axis=0)
    moved = tl.where(before > 0, moved, 0)
    tl.store(keep + other - moved, other, mask=j < n_upper)


TOKEN_LINK = Kernel(
    "token_link", token_link_kernel,
    ("similarity", "target", "lower", "upper", "pads"), ("n_lower", "n_upper", "removed"),
    ("src", "dst", "merge", "keep"), TACTICS,
)


def calls(
    similarity: Spec, target: Spec, lower: Spec, upper: Spec, pads: Spec,
    removed: int, prune_permille: int, tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_link.op.token_link`.

    Raises:
        ValueError: more tokens than one program can hold.
    """
    batch, n_lower = lower.shape
    n_upper = upper.shape[1]
    check_length(n_lower + n_upper)
    call = Call(
        kernel=TOKEN_LINK,
        inputs={
            "similarity": similarity.dtype, "target": target.dtype, "lower": lower.dtype,
            "upper": upper.dtype, "pads": pads.dtype,
        },
        extras={"n_lower": n_lower, "n_upper": n_upper, "removed": removed},
        outputs={
            "src": Spec((batch, removed), "i32"), "dst": Spec((batch, removed), "i32"),
            "merge": Spec((batch, removed), "i1"),
            "keep": Spec((batch, n_lower + n_upper - removed), "i32"),
        },
        constants={
            "PRUNE_PERMILLE": prune_permille,
            "BLOCK_LOWER": power_of_two(n_lower, 32), "BLOCK_UPPER": power_of_two(n_upper, 32),
        },
        tactic=choose(TOKEN_LINK, tactics, warps_for(n_lower)),
        grid=(1, 1),
    )
    return (call,)
