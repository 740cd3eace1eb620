"""The torch op: the residual stream begins as the embedding and is normalised for layer 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_plugins._common import accumulate


def embed_rms_norm(
    input_ids: Tensor, table: Tensor, weight: Tensor, eps: float, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """residual = table[input_ids];  normed = rms(residual) * weight.

    Args:
        input_ids: int32 [B, L], rows of ``table``.
        table: the embedding [V, D].
        weight: [D].
        eps: added to the mean square.
        residual_in_fp32: give the residual in float32 (float64 for float64 tables) rather than
            in the dtype of ``table``.

    Returns:
        normed [B, L, D] in the dtype of ``table``, and residual [B, L, D].

    Source: mamba_ssm ``models/mixer_seq_simple.py`` and ``modules/block.py``, first block.
    """
    wide = accumulate(table.dtype)
    rows = F.embedding(input_ids, table)
    normed = F.rms_norm(rows.to(wide), (table.shape[1],), weight.to(wide), eps)
    return normed.to(table.dtype), (rows.to(wide) if residual_in_fp32 else rows.clone())


custom = torch.library.custom_op("tokred::embed_rms_norm", embed_rms_norm, mutates_args=())


@custom.register_fake
def _(
    input_ids: Tensor, table: Tensor, weight: Tensor, eps: float, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    shape = (*input_ids.shape, table.shape[1])
    wide = accumulate(table.dtype) if residual_in_fp32 else table.dtype
    return table.new_empty(shape), table.new_empty(shape, dtype=wide)
