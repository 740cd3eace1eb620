"""The ONNX face of every op in one place."""

from __future__ import annotations

from tokred_plugins.add_rms_norm.function import ONNX as ADD_RMS_NORM
from tokred_plugins.causal_conv1d.function import ONNX as CAUSAL_CONV1D
from tokred_plugins.embed_rms_norm.function import ONNX as EMBED_RMS_NORM
from tokred_plugins.gated_rms_norm.function import ONNX as GATED_RMS_NORM
from tokred_plugins.ssd_scan.function import ONNX as SSD_SCAN
from tokred_plugins.ssd_scan.function import ONNX_FROM as SSD_SCAN_FROM
from tokred_plugins.token_importance.function import ONNX as TOKEN_IMPORTANCE
from tokred_plugins.token_link.function import ONNX as TOKEN_LINK
from tokred_plugins.token_match.function import ONNX as TOKEN_MATCH
from tokred_plugins.token_reduce.function import ONNX as TOKEN_REDUCE
from tokred_plugins.token_reduce_top.function import ONNX as TOKEN_REDUCE_TOP
from tokred_plugins.token_split.function import ONNX as TOKEN_SPLIT
from tokred_plugins.token_stride.function import ONNX as TOKEN_STRIDE

ONNX_OPS = {
    op.name: op
    for op in (
        CAUSAL_CONV1D, SSD_SCAN, SSD_SCAN_FROM, GATED_RMS_NORM, ADD_RMS_NORM, EMBED_RMS_NORM,
        TOKEN_IMPORTANCE,
        TOKEN_SPLIT, TOKEN_MATCH, TOKEN_LINK, TOKEN_REDUCE, TOKEN_STRIDE, TOKEN_REDUCE_TOP,
    )
}
