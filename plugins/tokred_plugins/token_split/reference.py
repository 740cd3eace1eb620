"""The split of a site's tokens, by explicit ranking."""

from __future__ import annotations

import torch
from torch import Tensor


def token_split_reference(
    scores: Tensor, pads: Tensor, count: int, protect: int
) -> tuple[Tensor, Tensor]:
    """See :func:`tokred_plugins.token_split.op.token_split`."""
    length = scores.shape[1]
    lower, upper = [], []
    for row, padding in zip(scores.tolist(), pads.tolist(), strict=True):
        def key(t: int, row: list[float] = row, padding: int = padding) -> tuple[float, float, int]:
            tier = 2 if t >= length - protect else 0 if t < padding else 1
            return (tier, row[t] if tier == 1 else 0.0, t)

        order = sorted(range(length), key=key)
        lower.append(sorted(order[:count]))
        upper.append(sorted(order[count:]))
    return torch.tensor(lower, dtype=torch.int32), torch.tensor(upper, dtype=torch.int32)
