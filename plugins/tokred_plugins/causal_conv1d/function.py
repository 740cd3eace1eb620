"""The ONNX face: ``tokred::CausalConv1dSilu``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokred_plugins.body import Body, OnnxOp


def body(
    b: Body, zxbcdt: ir.Value, weight: ir.Value, bias: ir.Value, pads: ir.Value
) -> Sequence[ir.Value]:
    """y [B, L, C] and the conv state [B, C, K - 1]."""
    offset, channels, taps = (int(b.literal(n)) for n in ("offset", "channels", "taps"))
    length = b.dim(zxbcdt, 1)
    x = b.slice(zxbcdt, 2, offset, offset + channels)
    real = b.op("GreaterOrEqual", b.int32(b.range(length)), b.unsqueeze(pads, 1))
    zero = b.narrow(b.number(0.0))
    x = b.op("Where", b.unsqueeze(real, 2), x, zero)
    x = b.op("Transpose", x, perm=[0, 2, 1])  # [B, C, L]
    # In float32: that is the op's contract, and bfloat16 has no Conv before opset 22.
    y = b.op(
        "Conv", b.wide(x), b.unsqueeze(b.wide(weight), 1), b.wide(bias),
        group=channels, kernel_shape=[taps], pads=[taps - 1, 0],
    )
    y = b.op("Transpose", b.narrow(b.sigmoid_times(y)), perm=[0, 2, 1])
    last = b.slice(x, 2, -(taps - 1), np.iinfo(np.int64).max)  # shorter when L < K - 1
    missing = b.op("Sub", b.ints([taps - 1]), b.dim(last, 2))
    front = b.op("Concat", b.ints([0, 0]), missing, b.ints([0, 0, 0]), axis=0)
    return y, b.op("Pad", last, front)


ONNX = OnnxOp(
    name="CausalConv1dSilu",
    inputs=("zxbcdt", "weight", "bias", "pads"),
    outputs=("y", "conv_state"),
    attributes={"offset": int, "channels": int, "taps": int},
    body=body,
)
