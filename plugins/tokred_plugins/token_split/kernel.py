"""The Triton kernel: one program a sequence, all its scores in registers."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernel_selection import ascending_bits, kth_lowest, lowest
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic, choose, power_of_two

LONGEST = 32768  # counts share 16-bit fields, and a program holds every score


@triton.jit(do_not_specialize=["length", "count", "protect"])
def token_split_kernel(
    scores, pads, length, count, protect, lower, upper, BLOCK: tl.constexpr,
):
    batch = tl.program_id(2)
    t = tl.arange(0, BLOCK)
    score = tl.load(scores + batch.to(tl.int64) * length + t, mask=t < length, other=0)
    # Padding is lowest, the protected tail highest, and places beyond the end are never taken.
    score = tl.where(t < tl.load(pads + batch), -3.0e38, score)
    score = tl.where(t < length - protect, score, 3.0e38)
    keys = tl.where(t < length, ascending_bits(score), 4294967295)
    kth = kth_lowest(keys, count)
    mask, rank = lowest(keys, kth, count)
    tl.store(lower + batch.to(tl.int64) * count + rank - 1, t, mask=mask)
    others = (t < length) & (mask == 0)
    tl.store(upper + batch.to(tl.int64) * (length - count) + t - rank, t, mask=others)


TACTICS = tuple(Tactic({}, warps) for warps in (8, 4, 16))
TOKEN_SPLIT = Kernel(
    "token_split", token_split_kernel,
    ("scores", "pads"), ("length", "count", "protect"), ("lower", "upper"), TACTICS,
)


def warps_for(length: int) -> Tactic:
    """Few warps for few tokens; many where one program would run out of registers."""
    return TACTICS[1] if length <= 1024 else TACTICS[0] if length <= 4096 else TACTICS[2]


def check_length(length: int) -> None:
    """Raise ValueError above the longest sequence that one program can hold."""
    if length > LONGEST:
        raise ValueError(
            f"{length} tokens at a reduction site, expected at most {LONGEST}; "
            "shorten the sequence or remove the site"
        )


def calls(
    scores: Spec, pads: Spec, count: int, protect: int,
    tactics: Mapping[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.token_split.op.token_split`.

    Raises:
        ValueError: more tokens than one program can hold.
    """
    batch, length = scores.shape
    check_length(length)
    call = Call(
        kernel=TOKEN_SPLIT,
        inputs={"scores": scores.dtype, "pads": pads.dtype},
        extras={"length": length, "count": count, "protect": protect},
        outputs={
            "lower": Spec((batch, count), "i32"), "upper": Spec((batch, length - count), "i32"),
        },
        constants={"BLOCK": power_of_two(length, 32)},
        tactic=choose(TOKEN_SPLIT, tactics, warps_for(length)),
        grid=(1, 1),
    )
    return (call,)
