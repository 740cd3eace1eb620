"""Small ONNX models for backend tests: a gather, a `tokred` op with a function body, a product."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

V, D, L = 16, 8, 4

_BODY = """
<opset_import: ["" : 21], domain: "tokred">
scaled <alpha> (x, w) => (y) {
    f = Constant<value_float: float = @alpha>()
    a = CastLike(f, x)
    t = Mul(x, w)
    y = Mul(t, a)
}
"""


def tiny_model(batch=2, body=True, length=L, kind=np.float32):
    """logits [B,L,V] = (embedding[ids] * w * 3) @ head, with ``batch`` fixed or a name."""
    rng = np.random.default_rng(0)
    weights = {"embedding": (V, D), "w": (D,), "head": (D, V)}
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["e"], name="gather", axis=0),
        helper.make_node(
            "scaled", ["e", "w"], ["s"], domain="tokred", name="layers.0.scaled", alpha=3.0,
            plugin_namespace="tokred", plugin_version="1", aot=1,
        ),
        helper.make_node("MatMul", ["s", "head"], ["logits"], name="head"),
    ]  # fmt: skip
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [info("ids", TensorProto.INT32, [batch, length])],
        [info("logits", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [batch, length, V])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(kind), name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("tokred", 1)],
        functions=[onnx.parser.parse_function(_BODY)] if body else [],
        ir_version=10,
    )


def save_tiny(path, external=False, **options):
    """Write a tiny model, perhaps with its weights in ``<name>.data``; returns ``path``."""
    model = tiny_model(**options)
    if external:
        onnx.save(
            model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
        )
    else:
        onnx.save(model, path)
    return path
