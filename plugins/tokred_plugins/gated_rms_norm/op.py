"""The torch op: RMSNorm of the scan's output, gated by silu(z)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate


def gated_rms_norm(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, group_size: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """rms(y * silu(z)) * weight, or rms(y) * weight * silu(z) with ``norm_before_gate``.

    Args:
        y: the scan's output [B, L, E].
        zxbcdt: input projection [B, L, Z]; the gate z is its first E columns.
        weight: [E].
        group_size: channels normalised together; E / G in mamba_ssm, E in transformers.
        eps: added to the mean square.
        norm_before_gate: order of the two.

    Returns:
        [B, L, E] in y's dtype, computed in float32.

    Source: mamba_ssm ``ops/triton/layernorm_gated.py``.
    """
    wide = accumulate(y.dtype)
    x = y.to(wide)
    gate = F.silu(zxbcdt[:, :, : y.shape[2]].to(wide))
    if not norm_before_gate:
        x = x * gate
    shape = x.shape
    x = x.view(*shape[:2], -1, group_size)
    x = F.rms_norm(x, (group_size,), eps=eps).view(shape) * weight.to(wide)
    if norm_before_gate:
        x = x * gate
    return x.to(y.dtype)


custom = torch.library.custom_op("tokred::gated_rms_norm", gated_rms_norm, mutates_args=())


@custom.register_fake
def _(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, group_size: int, eps: float, norm_before_gate: bool
) -> Tensor:
    return torch.empty_like(y)
