"""All ops in one place: as torch custom ops, and as the plain functions behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokred_plugins.add_rms_norm import op as add_rms_norm
from tokred_plugins.causal_conv1d import op as causal_conv1d
from tokred_plugins.embed_rms_norm import op as embed_rms_norm
from tokred_plugins.gated_rms_norm import op as gated_rms_norm
from tokred_plugins.ssd_scan import op as ssd_scan
from tokred_plugins.token_importance import op as token_importance
from tokred_plugins.token_link import op as token_link
from tokred_plugins.token_match import op as token_match
from tokred_plugins.token_reduce import op as token_reduce
from tokred_plugins.token_reduce_top import op as token_reduce_top
from tokred_plugins.token_split import op as token_split
from tokred_plugins.token_stride import op as token_stride


@dataclass(frozen=True)
class OpSet:
    """The functions a model is written over; see each op's own module for its contract."""

    causal_conv1d: Callable
    ssd_scan: Callable
    gated_rms_norm: Callable
    add_rms_norm: Callable
    embed_rms_norm: Callable
    token_importance: Callable
    token_split: Callable
    token_match: Callable
    token_link: Callable
    token_reduce: Callable
    token_stride: Callable
    token_reduce_top: Callable


# What torch.export sees as single opaque calls.
CUSTOM = OpSet(
    causal_conv1d=causal_conv1d.custom,
    ssd_scan=ssd_scan.custom,
    gated_rms_norm=gated_rms_norm.custom,
    add_rms_norm=add_rms_norm.custom,
    embed_rms_norm=embed_rms_norm.custom,
    token_importance=token_importance.custom,
    token_split=token_split.custom,
    token_match=token_match.custom,
    token_link=token_link.custom,
    token_reduce=token_reduce.custom,
    token_stride=token_stride.custom,
    token_reduce_top=token_reduce_top.custom,
)
# The same without the dispatcher: differentiable, for training and for reading a traceback.
PLAIN = OpSet(
    causal_conv1d=causal_conv1d.causal_conv1d,
    ssd_scan=ssd_scan.ssd_scan,
    gated_rms_norm=gated_rms_norm.gated_rms_norm,
    add_rms_norm=add_rms_norm.add_rms_norm,
    embed_rms_norm=embed_rms_norm.embed_rms_norm,
    token_importance=token_importance.token_importance,
    token_split=token_split.token_split,
    token_match=token_match.token_match,
    token_link=token_link.token_link,
    token_reduce=token_reduce.token_reduce,
    token_stride=token_stride.token_stride,
    token_reduce_top=token_reduce_top.token_reduce_top,
)
