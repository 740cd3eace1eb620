"""The selective state space recurrence of Mamba-2, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate, real_tokens


def ssd_scan_reference(
    xbc: Tensor,
    zxbcdt: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    pads: Tensor,
    initial_state: Tensor | None,
    n_groups: int,
    d_state: int,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.ssd_scan.op.ssd_scan`; ``chunk_size`` has no meaning here."""
    batch, length, _ = xbc.shape
    heads = dt_bias.shape[0]
    wide = accumulate(xbc.dtype)
    inner = xbc.shape[2] - 2 * n_groups * d_state
    x, b, c = xbc.to(wide).split([inner, n_groups * d_state, n_groups * d_state], dim=2)
    x = x.view(batch, length, heads, -1)  # [B, L, H, P]
    # A group's B and C serve all of its heads.
    b = b.view(batch, length, n_groups, d_state).repeat_interleave(heads // n_groups, 2)
    c = c.view(batch, length, n_groups, d_state).repeat_interleave(heads // n_groups, 2)

    dt = F.softplus(zxbcdt[:, :, -heads:].to(wide) + dt_bias.to(wide)).clamp(dt_min, dt_max)
    dt = torch.where(real_tokens(pads, length)[:, :, None], dt, 0)  # [B, L, H]
    decay = torch.exp(dt * -torch.exp(a_log.to(wide)))

    state = x.new_zeros(batch, heads, x.shape[3], d_state)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        write = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]  # [B, H, P, N]
        state = decay[:, t, :, None, None] * state + write
        y = (state * c[:, t, :, None, :]).sum(-1) + d.to(wide)[:, None] * x[:, t]
        outputs.append(y)
    y = torch.stack(outputs, dim=1).reshape(batch, length, inner)
    return y.to(xbc.dtype), state
