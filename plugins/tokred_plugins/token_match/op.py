"""The torch op: each lower token's most similar upper token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate, take
from tokred_plugins.token_match.reference import SMALLEST_NORM


def token_match(hidden: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """f[a] = argmax over b of cos(hidden[a], hidden[b]), and the cosine itself.

    Args:
        hidden: the block's output [B, L, D].
        lower: int32 [B, La], positions that look for a partner.
        upper: int32 [B, Lb], ascending positions of possible partners.

    Returns:
        similarity float32 [B, La] (float64 for float64 inputs) and target int32 [B, La], a
        position; of equally similar partners the first.

    Source: UTRC (EMNLP 2024), Eq. 6 and 7.
    """
    x = hidden.to(accumulate(hidden.dtype))
    x = x / x.norm(dim=2, keepdim=True).clamp(min=SMALLEST_NORM)
    cosine = take(x, lower) @ take(x, upper).transpose(1, 2)  # [B, La, Lb]
    best = cosine.argmax(dim=2)
    similarity = cosine.gather(2, best[:, :, None])[:, :, 0]
    return similarity, upper.gather(1, best)


custom = torch.library.custom_op("tokred::token_match", token_match, mutates_args=())


@custom.register_fake
def _(hidden: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(lower.shape, dtype=accumulate(hidden.dtype)),
        torch.empty_like(lower),
    )
