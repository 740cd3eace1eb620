"""The torch op: Mamba-2's selective scan in its chunked (SSD) form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate, real_tokens

NO_LIMIT = 3.4e38  # dt_max where the model does not clamp
# A log decay this low is zero in float32 after exp. Taking no lower ones keeps the running sums
# of a chunk, whose differences are the exponents, small enough to have digits left.
FORGOTTEN = -90.0


def ssd_scan(
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
    """h[t] = exp(dt A) h[t-1] + dt x[t] B[t]^T;  y[t] = h[t] C[t] + D x[t], A = -exp(a_log).

    dt is softplus(raw + dt_bias), clamped, then zero on padding: no decay and no write there.

    Args:
        xbc: output of the convolution [B, L, E + 2 G N]: x, B and C side by side.
        zxbcdt: input projection [B, L, Z]; its last H columns are the raw dt.
        dt_bias, a_log, d: [H], float32.
        pads: int32 [B], padding tokens at the front of each row.
        initial_state: [B, H, P, N] or None for zeros.
        n_groups: G; heads h G/H.. share one B and C.
        d_state: N.
        chunk_size: Q, tokens handled by matrix products at a time; a matter of speed only.
        dt_min, dt_max: clamp of dt.

    Returns:
        y [B, L, E] in the input's dtype, final state [B, H, P, N] in float32 (float64 for
        float64 inputs).

    Source: Dao and Gu 2024 (Mamba-2), section 6; mamba_ssm ``ops/triton/ssd_combined.py``.
    """
    batch, length, _ = xbc.shape
    heads = dt_bias.shape[0]
    per_group = heads // n_groups
    wide = accumulate(xbc.dtype)
    inner = xbc.shape[2] - 2 * n_groups * d_state
    head_dim = inner // heads
    chunk = min(chunk_size, length)
    fill = -length % chunk
    chunks = (length + fill) // chunk

    dt = F.softplus(zxbcdt[:, :, -heads:].to(wide) + dt_bias.to(wide)).clamp(dt_min, dt_max)
    dt = dt.masked_fill(~real_tokens(pads, length)[:, :, None], 0)
    if fill:  # padding at the end has dt = 0 too
        xbc, dt = F.pad(xbc, (0, 0, 0, fill)), F.pad(dt, (0, 0, 0, fill))
    x, b, c = xbc.to(wide).split([inner, n_groups * d_state, n_groups * d_state], dim=2)
    split = (batch, chunks, chunk, n_groups)
    x = x.reshape(*split, per_group, head_dim).permute(0, 3, 4, 1, 2, 5)  # [B, G, H/G, c, Q, P]
    b = b.reshape(*split, 1, d_state).permute(0, 3, 4, 1, 2, 5)  # [B, G, 1, c, Q, N]
    c = c.reshape(*split, 1, d_state).permute(0, 3, 4, 1, 2, 5)
    dt = dt.reshape(*split, per_group).permute(0, 3, 4, 1, 2)  # [B, G, H/G, c, Q]

    a = -torch.exp(a_log.to(wide)).view(n_groups, per_group, 1, 1)
    total = torch.cumsum((dt * a).clamp(min=FORGOTTEN), dim=-1)  # log decay since the chunk's start
    x_dt = x * dt[..., None]
    # 1. Within a chunk: (C B^T masked by decay) x
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    y = ((c @ b.transpose(-1, -2)) * decay) @ x_dt
    # 2. What each chunk adds to the state by its end
    to_end = torch.exp(total[..., -1:] - total)
    added = (x_dt * to_end[..., None]).transpose(-1, -2) @ b  # [B, G, H/G, c, P, N]
    # 3. States at the chunk starts
    across = torch.exp(total[..., -1])[..., None, None]
    state = added.new_zeros(batch, n_groups, per_group, head_dim, d_state)
    if initial_state is not None:
        state = initial_state.to(wide).view_as(state)
    starts = []
    for i in range(chunks):
        starts.append(state)
        state = across[:, :, :, i] * state + added[:, :, :, i]
    # 4. What the state at the chunk's start contributes
    y = y + (c @ torch.stack(starts, dim=3).transpose(-1, -2)) * torch.exp(total)[..., None]
    y = y + d.to(wide).view(n_groups, per_group, 1, 1, 1) * x
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, length + fill, inner)[:, :length]
    return y.to(xbc.dtype).contiguous(), state.reshape(batch, heads, head_dim, d_state)


custom = torch.library.custom_op("tokred::ssd_scan", ssd_scan, mutates_args=())


@custom.register_fake
def _(
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
    batch, length, channels = xbc.shape
    inner = channels - 2 * n_groups * d_state
    heads = dt_bias.shape[0]
    state = xbc.new_empty(batch, heads, inner // heads, d_state, dtype=accumulate(xbc.dtype))
    return xbc.new_empty(batch, length, inner), state
