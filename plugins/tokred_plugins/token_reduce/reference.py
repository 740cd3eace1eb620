"""Gather and merge, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def token_reduce_reference(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor, merge: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.token_reduce.op.token_reduce`."""
    return _branch(hidden, keep, src, dst, merge), _branch(residual, keep, src, dst, dst >= 0)


def _branch(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, merge: Tensor) -> Tensor:
    wide = x.to(accumulate(x.dtype))
    rows = []
    for row in range(x.shape[0]):
        for b in keep[row].tolist():
            merged = [wide[row, b]]
            for a, target, merges in zip(src[row], dst[row], merge[row], strict=True):
                if merges and target == b:
                    merged.append(wide[row, a])
            rows.append(torch.stack(merged).sum(dim=0) / len(merged))
    return torch.stack(rows).view(x.shape[0], -1, x.shape[2]).to(x.dtype)
