"""The registry of reduction methods: which tokens a site removes, and into what.

Every method is written over the custom ops, so that it exports as it stands. In all of them
padding is removed first and the protected tail never; ties are broken by position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokred_plugins._common import accumulate, complement
from tokred_plugins.opset import CUSTOM, OpSet
from torch import Tensor

from tokred_export.errors import InvalidRequest
from tokred_export.specs import Site


class Choice(NamedTuple):
    """What one site does: int32 src and dst [B, r], bool merge [B, r].

    src is ascending; dst is the position that src merges into, -1 for none. Positions index
    the tokens entering the site. ``merge`` says whether the hidden branch merges too.
    """

    src: Tensor
    dst: Tensor
    merge: Tensor


class Reduced(NamedTuple):
    """Tokens after a site: hidden and residual [B, L - r, D], keep int32 [B, L - r]."""

    hidden: Tensor
    residual: Tensor
    keep: Tensor
    choice: Choice


Select = Callable[[Tensor, Tensor, Tensor, Site, int, int, OpSet], tuple[Choice, Tensor]]
Score = Callable[[Tensor, Tensor, OpSet], Tensor]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as on the command line.
        select: (y, hidden, pads, site, prune_permille, protect_tail, ops) -> Choice, keep.
        source: where the method comes from.
        score: (y, pads, ops) -> [B, L], what the split into two halves ranks tokens by; None
            where positions alone decide.
        links: each token of the lower half looks for its most similar one in the upper half;
            without, the lower part is what goes.
        top_values: merge the hidden branch as UTRC's published code does, channel by channel.
    """

    name: str
    select: Select
    source: str
    score: Score | None = None
    links: bool = False
    top_values: bool = False

    def lower_count(self, site: Site) -> int:
        """Tokens in the lower part of the split."""
        return site.tokens_in // 2 if self.links else site.removed


def _importance(y: Tensor, pads: Tensor, ops: OpSet) -> Tensor:
    return ops.token_importance(y)


def _parity(y: Tensor, pads: Tensor, ops: OpSet) -> Tensor:
    # Even distances from the first prompt token look for a partner among odd ones.
    position = torch.arange(y.shape[1], device=y.device, dtype=torch.int32)
    return ((position - pads[:, None]) % 2).to(accumulate(y.dtype))


def _link(
    scores: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    """Split by ``scores``, link each lower token to its most similar upper one, let r act."""
    lower, upper = ops.token_split(scores, pads, site.tokens_in // 2, tail)
    similarity, target = ops.token_match(hidden, lower, upper)
    src, dst, merge, keep = ops.token_link(
        similarity, target, lower, upper, pads, site.removed, permille
    )
    return Choice(src, dst, merge), keep


def _utrc(
    y: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    return _link(_importance(y, pads, ops), hidden, pads, site, permille, tail, ops)


def _pumer(
    y: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    # Every link that acts merges.
    return _link(_parity(y, pads, ops), hidden, pads, site, 0, tail, ops)


def _evit(
    y: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    src, keep = ops.token_split(_importance(y, pads, ops), pads, site.removed, tail)
    dst = torch.full_like(src, -1)
    return Choice(src, dst, torch.zeros_like(src, dtype=torch.bool)), keep


def _utrc_code(
    y: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    src, dst, merge, keep = ops.token_stride(pads, site.tokens_in, site.removed)
    return Choice(src, dst, merge), keep


def _none(
    y: Tensor, hidden: Tensor, pads: Tensor, site: Site, permille: int, tail: int, ops: OpSet
) -> tuple[Choice, Tensor]:
    raise InvalidRequest("the method none removes nothing, so its schedule can have no sites")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("utrc", _utrc, "UTRC (EMNLP 2024), the paper's text", _importance, links=True),
        Method(
            "utrc-code", _utrc_code, "github.com/wuyushuwys/ToR_SSM at 2e9fc62", top_values=True
        ),
        Method("evit", _evit, "EViT (ICLR 2022), scored by UTRC's Eq. 5", _importance),
        Method(
            "pumer", _pumer, "PuMer (ACL 2023): ToMe's bipartite soft matching", _parity,
            links=True,
        ),
        Method("none", _none, "the dense model"),
    )
}


def reduce_tokens(
    method_name: str,
    y: Tensor,
    hidden: Tensor,
    residual: Tensor,
    pads: Tensor,
    site: Site,
    prune_permille: int,
    protect_tail: int,
    ops: OpSet = CUSTOM,
    choice: Choice | None = None,
) -> Reduced:
    """One site.

    Args:
        method_name: a key of METHODS.
        y: the scan's output before gate and norm [B, L, E].
        hidden: the block's output [B, L, D].
        residual: the residual stream before it takes ``hidden`` [B, L, D].
        pads: int32 [B], padding tokens at the front.
        site: L and L - r.
        prune_permille: share of links that only prune in the hidden branch, in thousandths.
        protect_tail: that many last tokens are never removed.
        ops: custom ops or the plain functions.
        choice: replay this choice instead of making one.
    """
    if method_name not in METHODS:
        known = ", ".join(METHODS)
        raise InvalidRequest(f"unknown method {method_name!r}; expected one of {known}")
    method = METHODS[method_name]
    if choice is None:
        choice, keep = method.select(y, hidden, pads, site, prune_permille, protect_tail, ops)
    else:
        keep = complement(choice.src, site.tokens_in)
    if method.top_values:
        hidden, residual = ops.token_reduce_top(hidden, residual, keep, choice.src, choice.dst)
    else:
        hidden, residual = ops.token_reduce(hidden, residual, keep, *choice)
    return Reduced(hidden, residual, keep, choice)
