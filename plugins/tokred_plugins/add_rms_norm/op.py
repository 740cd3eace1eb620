"""The torch op: the residual stream takes a block's output and is normalised for the next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual' = residual + hidden;  normed = rms(residual') * weight.

    Args:
        hidden: a block's output [B, L, D].
        residual: the residual stream [B, L, D], float32 or the dtype of ``hidden``.
        weight: [D].
        eps: added to the mean square.

    Returns:
        normed [B, L, D] in the dtype of ``hidden``, residual' in the dtype of ``residual``.

    Source: mamba_ssm ``modules/block.py`` with ``fused_add_norm``.
    """
    wide = accumulate(hidden.dtype)
    total = hidden.to(wide) + residual.to(wide)
    normed = F.rms_norm(total, (total.shape[-1],), weight.to(wide), eps)
    return normed.to(hidden.dtype), total.to(residual.dtype)


custom = torch.library.custom_op("tokred::add_rms_norm", add_rms_norm, mutates_args=())


@custom.register_fake
def _(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(residual)
