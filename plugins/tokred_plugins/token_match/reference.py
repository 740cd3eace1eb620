"""The most similar partner, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate

SMALLEST_NORM = 1e-12


def token_match_reference(hidden: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.token_match.op.token_match`."""
    x = hidden.to(accumulate(hidden.dtype))
    x = x / x.norm(dim=2, keepdim=True).clamp(min=SMALLEST_NORM)
    similarity = x.new_full(lower.shape, -torch.inf)
    target = torch.full_like(lower, -1)
    for row in range(x.shape[0]):
        for i, a in enumerate(lower[row].tolist()):
            for b in upper[row].tolist():
                s = (x[row, a] * x[row, b]).sum()
                if s > similarity[row, i]:  # a tie keeps the earlier position
                    similarity[row, i], target[row, i] = s, b
    return similarity, target
