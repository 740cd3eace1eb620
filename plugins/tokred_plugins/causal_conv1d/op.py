"""The torch op: causal depthwise convolution + SiLU over the conv columns of in_proj."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate, real_tokens


def causal_conv1d(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, pads: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """y[t] = silu(bias + sum_k weight[:, k] * x[t - K + 1 + k]), x zero before the prompt.

    Args:
        zxbcdt: input projection [B, L, Z]; x is columns ``offset`` to ``offset + C``.
        weight: [C, K].
        bias: [C].
        pads: int32 [B], padding tokens at the front of each row; x counts as zero there.
        offset: first conv column, d_inner in Mamba-2.

    Returns:
        y [B, L, C] in the input's dtype, and the last K - 1 inputs [B, C, K - 1] (zeros where
        the prompt is shorter), which a decode step continues from.

    Source: mamba_ssm ``modules/mamba2.py``; causal-conv1d ``causal_conv1d_ref``.
    """
    channels, taps = weight.shape
    length = zxbcdt.shape[1]
    wide = accumulate(zxbcdt.dtype)
    x = zxbcdt[:, :, offset : offset + channels]
    x = x.masked_fill(~real_tokens(pads, length)[:, :, None], 0).transpose(1, 2)
    history = F.pad(x, (taps - 1, 0))  # [B, C, L + K - 1]
    y = F.conv1d(history.to(wide), weight.to(wide)[:, None, :], bias.to(wide), groups=channels)
    y = F.silu(y).transpose(1, 2).to(zxbcdt.dtype)
    return y.contiguous(), history[:, :, length:].contiguous()


custom = torch.library.custom_op("tokred::causal_conv1d", causal_conv1d, mutates_args=())


@custom.register_fake
def _(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, pads: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    batch, length, _ = zxbcdt.shape
    channels, taps = weight.shape
    return (
        zxbcdt.new_empty(batch, length, channels),
        zxbcdt.new_empty(batch, channels, taps - 1),
    )
