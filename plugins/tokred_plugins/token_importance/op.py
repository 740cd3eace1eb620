"""The torch op: how much a token's scan output says."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate


def token_importance(y: Tensor) -> Tensor:
    """S[t] = mean over E of max(0, y[t]).

    Args:
        y: the scan's output before gate and norm [B, L, E].

    Returns:
        float32 [B, L] (float64 for float64 inputs): 16-bit scores would have only hundreds of
        distinct values and tie all the time.

    Source: UTRC (EMNLP 2024), Eq. 5.
    """
    return y.to(accumulate(y.dtype)).relu().mean(dim=2)


custom = torch.library.custom_op("tokred::token_importance", token_importance, mutates_args=())


@custom.register_fake
def _(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[:2], dtype=accumulate(y.dtype))
