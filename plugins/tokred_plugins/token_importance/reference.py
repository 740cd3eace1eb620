"""UTRC's token importance, Eq. 5."""

from __future__ import annotations

from torch import Tensor

from tokred_plugins._common import accumulate


def token_importance_reference(y: Tensor) -> Tensor:
    """See :func:`tokred_plugins.token_importance.op.token_importance`."""
    clipped = y.to(accumulate(y.dtype)).clamp(min=0)
    return clipped.sum(dim=2) / y.shape[2]
