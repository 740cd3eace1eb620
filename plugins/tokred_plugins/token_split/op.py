"""The torch op: the ``count`` lowest tokens by score, and the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import SENTINEL, complement, real_tokens


def token_split(scores: Tensor, pads: Tensor, count: int, protect: int) -> tuple[Tensor, Tensor]:
    """Split by the total order (score, position); padding lowest, the protected tail highest.

    Args:
        scores: float32 [B, L].
        pads: int32 [B], padding tokens at the front of each row.
        count: size of the lower part.
        protect: that many last tokens belong to the upper part; must leave ``count`` others.

    Returns:
        Ascending int32 positions: lower [B, count], upper [B, L - count].

    Source: UTRC (EMNLP 2024), step 2 of the algorithm: M_A and M_B.
    """
    length = scores.shape[1]
    keys = scores.masked_fill(~real_tokens(pads, length), -SENTINEL)
    keys[:, length - protect :] = SENTINEL  # also where the tail is padding
    lower = torch.sort(keys, dim=1, stable=True).indices[:, :count]
    lower = lower.sort(dim=1).values.to(torch.int32)
    return lower, complement(lower, length)


custom = torch.library.custom_op("tokred::token_split", token_split, mutates_args=())


@custom.register_fake
def _(scores: Tensor, pads: Tensor, count: int, protect: int) -> tuple[Tensor, Tensor]:
    batch, length = scores.shape
    return (
        scores.new_empty(batch, count, dtype=torch.int32),
        scores.new_empty(batch, length - count, dtype=torch.int32),
    )
