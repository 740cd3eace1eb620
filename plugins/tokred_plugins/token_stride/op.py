"""The torch op: the input-independent choice of UTRC's published code."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import complement


def token_stride(
    pads: Tensor, length: int, removed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padding first, then every second prompt token from the first on, all into the second.

    Args:
        pads: int32 [B], padding tokens at the front of each row.
        length: L.
        removed: r.

    Returns:
        src int32 [B, r] ascending, dst int32 [B, r] (-1 for padding), merge bool [B, r] (true
        for every link), keep int32 [B, L - r].

    Source: github.com/wuyushuwys/ToR_SSM at 2e9fc62: its clipped metric is sorted channel by
    channel, which makes the same positions win whatever the input.
    """
    step = torch.arange(removed, device=pads.device, dtype=torch.int32)
    gone = pads.clamp(max=removed)[:, None]  # [B, 1]
    link = step >= gone
    src = torch.where(link, 2 * step - gone, step)  # gone + 2 (step - gone)
    dst = torch.where(link, gone + 1, -1)
    return src, dst, link, complement(src, length)


custom = torch.library.custom_op("tokred::token_stride", token_stride, mutates_args=())


@custom.register_fake
def _(pads: Tensor, length: int, removed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = pads.shape[0]
    return (
        pads.new_empty(batch, removed),
        pads.new_empty(batch, removed),
        pads.new_empty(batch, removed, dtype=torch.bool),
        pads.new_empty(batch, length - removed),
    )
