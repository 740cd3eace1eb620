"""The torch op: the strongest links act, and what each of them does."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import SENTINEL, complement


def token_link(
    similarity: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    pads: Tensor,
    removed: int,
    prune_permille: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose ``removed`` of the lower tokens: padding first, then the most similar links.

    Of the n links that act, the floor(n * prune_permille / 1000) most similar prune (their
    target already says what they say), the others merge. Order: similarity descending, then
    position ascending.

    Args:
        similarity: float32 [B, La], of the tokens at ``lower``.
        target: int32 [B, La].
        lower, upper: int32 [B, La], [B, Lb], a split of all positions.
        pads: int32 [B], padding tokens at the front of each row.
        removed: r, at most La.
        prune_permille: share of links that prune, in thousandths.

    Returns:
        src int32 [B, r] ascending, dst int32 [B, r] (-1 for padding), merge bool [B, r], and
        the ascending survivors keep int32 [B, La + Lb - r].

    Source: UTRC (EMNLP 2024), steps 4 and 5; the paper leaves open which part prunes.
    """
    padding = lower < pads[:, None]
    keys = similarity.masked_fill(padding, SENTINEL)
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :removed]
    n_pad = padding.sum(dim=1, keepdim=True).clamp(max=removed)
    n_prune = (removed - n_pad) * prune_permille // 1000
    rank = torch.arange(removed, device=keys.device)
    merge = rank >= n_pad + n_prune
    dst = torch.where(rank < n_pad, -1, target.gather(1, order))
    order, by_position = order.sort(dim=1)  # ``lower`` is ascending, so its order is src's
    src = lower.gather(1, order)
    keep = complement(src, lower.shape[1] + upper.shape[1])
    return src, dst.gather(1, by_position), merge.gather(1, by_position), keep


custom = torch.library.custom_op("tokred::token_link", token_link, mutates_args=())


@custom.register_fake
def _(
    similarity: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    pads: Tensor,
    removed: int,
    prune_permille: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = lower.shape[0]
    kept = lower.shape[1] + upper.shape[1] - removed
    return (
        lower.new_empty(batch, removed),
        lower.new_empty(batch, removed),
        lower.new_empty(batch, removed, dtype=torch.bool),
        lower.new_empty(batch, kept),
    )
