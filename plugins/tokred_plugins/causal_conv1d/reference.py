"""Causal depthwise convolution followed by SiLU, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate, real_tokens


def causal_conv1d_reference(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, pads: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.causal_conv1d.op.causal_conv1d`."""
    channels, taps = weight.shape
    batch, length, _ = zxbcdt.shape
    wide = accumulate(zxbcdt.dtype)
    x = zxbcdt[:, :, offset : offset + channels]  # [B, L, C]
    x = torch.where(real_tokens(pads, length)[:, :, None], x, 0)
    history = torch.cat([x.new_zeros(batch, taps - 1, channels), x], dim=1)  # [B, L + K - 1, C]
    y = bias.to(wide).expand(batch, length, channels)
    for tap in range(taps):
        y = y + history[:, tap : tap + length].to(wide) * weight[:, tap].to(wide)
    y = (y * torch.sigmoid(y)).to(zxbcdt.dtype)
    state = history[:, length:].transpose(1, 2).contiguous()  # [B, C, K - 1]
    return y, state
