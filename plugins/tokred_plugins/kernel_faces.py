"""The GPU face of every op that has kernels, by the op's name in the torch opset."""

from __future__ import annotations

from tokred_plugins.add_rms_norm.tensorrt import FACE as ADD_RMS_NORM
from tokred_plugins.causal_conv1d.tensorrt import FACE as CAUSAL_CONV1D
from tokred_plugins.embed_rms_norm.tensorrt import FACE as EMBED_RMS_NORM
from tokred_plugins.faces import KernelFace, Tuning
from tokred_plugins.gated_rms_norm.tensorrt import FACE as GATED_RMS_NORM
from tokred_plugins.linear.tensorrt import FACE as LINEAR
from tokred_plugins.ssd_scan.tensorrt import FACE as SSD_SCAN
from tokred_plugins.token_importance.tensorrt import FACE as TOKEN_IMPORTANCE
from tokred_plugins.token_link.tensorrt import FACE as TOKEN_LINK
from tokred_plugins.token_match.tensorrt import FACE as TOKEN_MATCH
from tokred_plugins.token_reduce.tensorrt import FACE as TOKEN_REDUCE
from tokred_plugins.token_split.tensorrt import FACE as TOKEN_SPLIT

FACES: dict[str, KernelFace] = {
    "add_rms_norm": ADD_RMS_NORM,
    "embed_rms_norm": EMBED_RMS_NORM,
    "gated_rms_norm": GATED_RMS_NORM,
    "causal_conv1d": CAUSAL_CONV1D,
    "ssd_scan": SSD_SCAN,
    "token_importance": TOKEN_IMPORTANCE,
    "token_split": TOKEN_SPLIT,
    "token_match": TOKEN_MATCH,
    "token_link": TOKEN_LINK,
    "token_reduce": TOKEN_REDUCE,
}
# By the kernel's name.
TUNINGS: dict[str, Tuning] = {
    name: tuning for face in (*FACES.values(), LINEAR) for name, tuning in face.tunings.items()
}
# The op type of a node in an ONNX file -> the op's name above.
ONNX_NAMES: dict[str, str] = {
    "AddRmsNorm": "add_rms_norm",
    "EmbedRmsNorm": "embed_rms_norm",
    "GatedRmsNorm": "gated_rms_norm",
    "CausalConv1dSilu": "causal_conv1d",
    "SsdScan": "ssd_scan",
    "SsdScanFrom": "ssd_scan",
    "TokenImportance": "token_importance",
    "TokenSplit": "token_split",
    "TokenMatch": "token_match",
    "TokenLink": "token_link",
    "TokenReduce": "token_reduce",
}
