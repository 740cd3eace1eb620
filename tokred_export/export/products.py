"""Products with a constant: which nodes they are, and the constant as a kernel reads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def find_product(node: ir.Node) -> tuple[ir.Value, ir.Value, dict[str, bool]] | None:
    """x [B, L, K], the constant, and how it is stored, if the node is such a product."""
    if node.domain or len(node.inputs) != 2 or node.inputs[1].const_value is None:
        return None
    x, weight = node.inputs
    if node.op_type == "MatMul" and len(x.shape) == 3 and len(weight.shape) == 2:
        return x, weight, {"turned": False, "flat": False}
    taken = x.producer()
    if node.op_type != "Gemm" or taken is None or taken.op_type != "Gather":
        return None
    values = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    values |= {name: attribute.value for name, attribute in node.attributes.items()}
    tokens = taken.inputs[0]  # the last token of each row, alone
    axis = taken.attributes["axis"].value if "axis" in taken.attributes else 0
    plain = (values["alpha"], values["beta"], values["transA"]) == (1.0, 1.0, 0)
    if not plain or axis != 1 or len(tokens.shape) != 3 or tokens.shape[1] != 1:
        return None
    return tokens, weight, {"turned": bool(values["transB"]), "flat": True}


def turned(graph: ir.Graph, weight: ir.Value, by: ir.Value | None = None) -> ir.Value:
    """The constant [K, N] as [N, K], made when it is written; columns times the numbers of ``by``.

    The kernel reads both operands along K then: see the op's README.md.
    """
    name, constant = f"{weight.name}.turned", weight.const_value
    if by is not None:
        name = f"{name}.{by.name}"
    if name not in graph.initializers:
        shape = ir.Shape(reversed(weight.shape))

        def turn() -> ir.Tensor:
            turned = np.ascontiguousarray(constant.numpy().T)
            if by is not None:
                wide = turned.astype(np.float32) * by.const_value.numpy().astype(np.float32)
                turned = wide.astype(turned.dtype)
            return ir.Tensor(turned, dtype=weight.dtype, shape=shape)

        graph.register_initializer(ir.Value(
            name=name, shape=shape, type=ir.TensorType(weight.dtype),
            const_value=ir.LazyTensor(turn, weight.dtype, shape, name=name),
        ))
    return graph.initializers[name]
