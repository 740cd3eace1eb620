"""Embedding and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def embed_rms_norm_reference(
    input_ids: Tensor, table: Tensor, weight: Tensor, eps: float, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.embed_rms_norm.op.embed_rms_norm`."""
    wide = accumulate(table.dtype)
    rows = table[input_ids.long()]
    x = rows.to(wide)
    rms = torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    normed = (x / rms * weight.to(wide)).to(table.dtype)
    return normed, (x if residual_in_fp32 else rows)
