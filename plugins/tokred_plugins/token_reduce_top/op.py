"""The torch op: hidden states and residual as UTRC's published code reduces them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate, take
from tokred_plugins.token_reduce.op import token_reduce


def token_reduce_top(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor]:
    """All n links share one target; hidden merges, per channel, its n // 2 largest sources.

    target' = (target + sum of the n // 2 largest) / (1 + n // 2), channel by channel; the
    residual branch merges all n.

    Args:
        hidden, residual: [B, L, D].
        keep: int32 [B, L - r], ascending.
        src: int32 [B, r]; dst: int32 [B, r], one kept position for all links, -1 for padding.

    Returns:
        Both branches [B, L - r, D] in their dtypes.

    Source: github.com/wuyushuwys/ToR_SSM at 2e9fc62, hidden "hybrid", residual "merge_only".
    """
    wide = accumulate(hidden.dtype)
    linked = dst >= 0
    top = linked.sum(dim=1, keepdim=True) // 2  # [B, 1]
    sources = take(hidden, src).to(wide).masked_fill(~linked[:, :, None], -torch.inf)
    sources = sources.sort(dim=1, descending=True).values  # [B, r, D]
    counted = torch.arange(src.shape[1], device=src.device) < top
    total = sources.masked_fill(~counted[:, :, None], 0).sum(dim=1, keepdim=True)  # [B, 1, D]
    kept = take(hidden, keep).to(wide)
    is_target = (keep == dst.amax(dim=1, keepdim=True))[:, :, None]
    merged = (kept + total) / (1 + top)[:, :, None]
    nothing = torch.zeros_like(linked)
    _, residual = token_reduce(residual, residual, keep, src, dst, nothing)
    return torch.where(is_target, merged, kept).to(hidden.dtype), residual


custom = torch.library.custom_op("tokred::token_reduce_top", token_reduce_top, mutates_args=())


@custom.register_fake
def _(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor]:
    batch, kept = keep.shape
    return (
        hidden.new_empty(batch, kept, hidden.shape[2]),
        residual.new_empty(batch, kept, residual.shape[2]),
    )
