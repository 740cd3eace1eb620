"""The per-channel hybrid of UTRC's published code, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def token_reduce_top_reference(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.token_reduce_top.op.token_reduce_top`."""
    out: tuple[list, list] = ([], [])
    for row in range(hidden.shape[0]):
        links = (dst[row] >= 0).nonzero()[:, 0]
        top = len(links) // 2
        for x, rows, whole in ((hidden, out[0], False), (residual, out[1], True)):
            values = x[row].to(accumulate(x.dtype))
            sources = values[src[row, links].long()]  # [n, D]
            if not whole:
                sources = sources.sort(dim=0, descending=True).values[:top]
            for b in keep[row].tolist():
                value = values[b]
                if len(links) and b == dst[row, links[0]]:
                    value = (value + sources.sum(dim=0)) / (1 + len(sources))
                rows.append(value.to(x.dtype))
    shape = (*keep.shape, -1)
    return torch.stack(out[0]).view(shape), torch.stack(out[1]).view(shape)
