"""Gated RMSNorm, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def gated_rms_norm_reference(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, group_size: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """See :func:`tokred_plugins.gated_rms_norm.op.gated_rms_norm`."""
    wide = accumulate(y.dtype)
    x, z = y.to(wide), zxbcdt[:, :, : y.shape[2]].to(wide)
    gate = z / (1 + torch.exp(-z))
    if not norm_before_gate:
        x = x * gate
    groups = []
    for part in x.split(group_size, dim=2):
        rms = torch.sqrt((part * part).mean(dim=2, keepdim=True) + eps)
        groups.append(part / rms)
    x = torch.cat(groups, dim=2) * weight.to(wide)
    if norm_before_gate:
        x = x * gate
    return x.to(y.dtype)
