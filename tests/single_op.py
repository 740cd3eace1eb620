"""One custom op as an ONNX model of its own: a node and its function body, run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from tokred_plugins.body import OnnxOp, function_for
from tokred_plugins.names import DOMAIN, VERSION

OPSET = 18


def run_body(
    op: OnnxOp,
    inputs: list[np.ndarray],
    attributes: dict,
    varying: dict[str, int] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    lengths: frozenset[int] = frozenset({0, 1}),
) -> list[np.ndarray]:
    """Run ``op``'s function body on ``inputs``.

    ``varying`` attributes are left as references to the node's attribute, as in a file whose
    nodes differ in them; their value here is still ``attributes``'.
    """
    varying = varying or {}
    agreed = {k: v for k, v in attributes.items() if k not in varying}
    function = function_for(op, agreed, varying, dtype, lengths, OPSET)
    values = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(x.dtype)),
            shape=ir.Shape([f"{name}_{i}" for i in range(x.ndim)]),
        )
        for name, x in zip(op.inputs, inputs, strict=True)
    ]
    node = ir.Node(
        DOMAIN, op.name, values,
        [ir.AttrInt64(k, v) if isinstance(v, int) else ir.AttrFloat32(k, v)
         for k, v in attributes.items()],
        num_outputs=len(op.outputs),
    )
    for name, value in zip(op.outputs, node.outputs, strict=True):
        value.name = f"{name}_out" if name in op.inputs else name
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET}, name="one")
    model = ir.Model(graph, ir_version=10, functions=[function])
    model.opset_imports[DOMAIN] = VERSION
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {v.name: x for v, x in zip(values, inputs, strict=True)})
