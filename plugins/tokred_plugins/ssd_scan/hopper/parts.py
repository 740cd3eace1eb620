"""Which parts of walks a block has."""

from __future__ import annotations

from collections.abc import Iterator

from tokred_plugins.kernels import cdiv
from tokred_plugins.ssd_scan.hopper.walk import Walk


def can_share(of_sequence: int, walks: int, split: int = 1) -> bool:
    """Whether pairs of blocks can have so many of a sequence's walks: 2, which is one each, and may
    be in pieces; or an odd number of which every block gets as many whole ones as any other."""
    if walks == 2:
        return True
    if split > 1 or walks < 3 or walks % 2 == 0:
        return False
    return (walks - 1) * cdiv(of_sequence, walks) <= of_sequence


def parts(walk: Walk, label: str) -> Iterator[str]:
    """What this block walks, one part after the other: sets ``head``, ``group``, ``chunk`` and
    ``until``, at the label for the part ``index``."""
    if walk.cluster == 1:
        return
    yield "mov.u32 index, 0;"
    yield f"{label}:"
    yield from _halves(walk) if walk.shares else piece(walk)


def _halves(walk: Walk) -> Iterator[str]:
    """``turn`` is 1 for the first half of a walk, 2 for the second, 0 for a whole one. The block of
    rank 0 begins with the half that the other one ends with."""
    pairs, whole = walk.pairs, walk.walks // 2
    yield "mov.u32 t, %ctaid.x;"
    yield "shr.u32 t, t, 1;"
    yield f"add.u32 u, t, {2 * whole * pairs};"  # the walk in two halves, if there is one
    yield f"setp.lt.u32 p, u, {walk.of_sequence};"
    yield "selp.b32 v, one, zero, p;"
    yield f"add.u32 parts, v, {whole};"
    # Which part is a half: the first of rank 0, the last of rank 1.
    yield "setp.eq.u32 p, rank, 0;"
    yield f"selp.b32 at, zero, {whole}, p;"
    yield "setp.eq.u32 q, index, at;"
    yield "setp.ne.and.u32 q, v, 0, q;"
    # Neighbours in memory are walked at the same time, by as many blocks as are of one rank.
    yield "mov.u32 row, index;"
    yield "@p sub.u32 row, row, v;"
    yield "mad.lo.u32 row, row, 2, rank;"
    yield f"mad.lo.u32 row, row, {pairs}, t;"
    yield "@q mov.u32 row, u;"
    yield "mov.u32 turn, 0;"
    yield "@q add.u32 turn, rank, 1;"
    yield f"mul.lo.u32 head, row, {walk.together};"
    yield f"div.u32 group, head, {walk.heads // walk.groups};"
    yield "sub.u32 t, chunks, first;"
    yield "shr.u32 t, t, 1;"
    yield "add.u32 t, t, first;"
    yield "mov.u32 chunk, first;"
    yield "mov.u32 until, chunks;"
    yield "setp.eq.u32 p, turn, 1;"
    yield "@p mov.u32 until, t;"
    yield "setp.eq.u32 p, turn, 2;"
    yield "@p mov.u32 chunk, t;"


def piece(walk: Walk) -> Iterator[str]:
    """The same chunks twice: for what they add to the state, which nobody needs of the last piece,
    and for results."""
    yield "mov.u32 parts, 2;"
    yield "mov.u32 t, %ctaid.x;"
    yield f"div.u32 t, t, {walk.split};"
    yield f"mul.lo.u32 head, t, {walk.together};"
    yield f"div.u32 group, head, {walk.heads // walk.groups};"
    yield "sub.u32 t, chunks, first;"
    yield "mul.lo.u32 u, t, rank;"
    yield "add.u32 v, u, t;"
    for end in ("u", "v"):
        yield f"div.u32 {end}, {end}, {walk.split};"
    yield "add.u32 chunk, first, u;"
    yield "add.u32 until, first, v;"
    yield "setp.eq.u32 p, index, 0;"
    yield f"setp.eq.and.u32 p, rank, {walk.split - 1}, p;"
    yield "@p mov.u32 until, chunk;"


def next_part(walk: Walk, label: str) -> Iterator[str]:
    """To the label of :func:`parts`, where there is another."""
    if walk.cluster > 1:
        yield "add.u32 index, index, 1;"
        yield "setp.lt.u32 p, index, parts;"
        yield f"@p bra {label};"
