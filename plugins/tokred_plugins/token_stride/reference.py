"""The positions that UTRC's published code removes."""

from __future__ import annotations

import torch
from torch import Tensor


def token_stride_reference(
    pads: Tensor, length: int, removed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tokred_plugins.token_stride.op.token_stride`."""
    out: tuple[list, list, list, list] = ([], [], [], [])
    for padding in pads.tolist():
        gone = min(padding, removed)
        links = removed - gone
        src = list(range(gone)) + [padding + 2 * j for j in range(links)]
        out[0].append(src)
        out[1].append([-1] * gone + [padding + 1] * links)
        out[2].append([False] * gone + [True] * links)
        out[3].append([t for t in range(length) if t not in set(src)])
    src, dst, merge, keep = (torch.tensor(rows) for rows in out)
    return src.int(), dst.int(), merge.bool(), keep.int()
