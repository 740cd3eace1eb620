"""What several ops share: accumulation dtype, padding, and ordered positions."""

from __future__ import annotations

import torch
from torch import Tensor

# Stands for "before" or "after everything" among scores, which are finite and far smaller;
# infinities are avoided inside engines.
SENTINEL = 3.0e38


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for 16-bit and float32 tensors, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real_tokens(pads: Tensor, length: int) -> Tensor:
    """True where a position holds a prompt token. ``pads`` int32 [B] -> bool [B, L]."""
    return torch.arange(length, device=pads.device, dtype=torch.int32) >= pads[:, None]


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``x`` [B, L, ...] or [B, L] at integer ``positions`` [B, K] -> [B, K, ...]."""
    index = positions.long()
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def complement(positions: Tensor, length: int) -> Tensor:
    """Ascending positions of [0, length) that are not in ``positions``.

    Args:
        positions: int32 [B, r], distinct in each row.
        length: number of tokens the positions index.

    Returns:
        int32 [B, length - r].
    """
    removed = torch.zeros(
        positions.shape[0], length, dtype=torch.int32, device=positions.device
    ).scatter(1, positions.long(), 1)
    # A stable sort of the 0/1 mask lists the survivors first, in their own order.
    order = torch.sort(removed, dim=1, stable=True).indices
    return order[:, : length - positions.shape[1]].to(torch.int32)
