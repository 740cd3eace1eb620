"""The torch op: hidden states and residual after a site."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_plugins._common import accumulate, take


def token_reduce(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor, merge: Tensor
) -> tuple[Tensor, Tensor]:
    """Survivors in order; a target with n merging sources becomes (b + sum a) / (1 + n).

    In ``hidden`` the sources with ``merge`` act, in ``residual`` every source with a target.

    Args:
        hidden, residual: [B, L, D].
        keep: int32 [B, L - r], ascending.
        src: int32 [B, r]; dst: int32 [B, r], a kept position or -1; merge: bool [B, r].

    Returns:
        Both branches [B, L - r, D] in their dtypes, merged in float32.

    Source: UTRC (EMNLP 2024), steps 5 and 6: hybrid in the hidden states, merge-only in the
    residual branch.
    """
    linked = dst >= 0
    place = torch.searchsorted(keep, dst.clamp(min=0))  # row of the target among the survivors
    return (
        _merge(hidden, keep, src, place, linked & merge),
        _merge(residual, keep, src, place, linked),
    )


def _merge(x: Tensor, keep: Tensor, src: Tensor, place: Tensor, acts: Tensor) -> Tensor:
    wide = accumulate(x.dtype)
    kept = take(x, keep).to(wide)
    acting = acts.to(wide)
    count = kept.new_ones(keep.shape).scatter_add(1, place, acting)
    index = place[:, :, None].expand(-1, -1, x.shape[2])
    # Not a product with 0: what merges into nothing may be anything, even NaN.
    sources = take(x, src).to(wide).masked_fill(~acts[:, :, None], 0)
    total = kept.scatter_add(1, index, sources)
    return (total / count[:, :, None]).to(x.dtype)


custom = torch.library.custom_op("tokred::token_reduce", token_reduce, mutates_args=())


@custom.register_fake
def _(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor, merge: Tensor
) -> tuple[Tensor, Tensor]:
    batch, kept = keep.shape
    return (
        hidden.new_empty(batch, kept, hidden.shape[2]),
        residual.new_empty(batch, kept, residual.shape[2]),
    )
