"""Residual add and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def add_rms_norm_reference(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.add_rms_norm.op.add_rms_norm`."""
    wide = accumulate(hidden.dtype)
    total = hidden.to(wide) + residual.to(wide)
    rms = torch.sqrt((total * total).mean(dim=-1, keepdim=True) + eps)
    return (total / rms * weight.to(wide)).to(hidden.dtype), total.to(residual.dtype)
