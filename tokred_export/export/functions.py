"""Stage 3 of the export: every custom op gets its function body of standard ops."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir
from tokred_plugins.body import Number, OnnxOp, function_for
from tokred_plugins.names import DOMAIN, VERSION
from tokred_plugins.onnx_ops import ONNX_OPS

from tokred_export.errors import BuildFailed


def tokred_nodes(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Custom-op nodes of the main graph by op type."""
    nodes: dict[str, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.domain == DOMAIN:
            nodes[node.op_type].append(node)
    return dict(nodes)


def add_functions(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """Add one function a custom op type to ``model``, in place.

    Attributes on which all nodes of a type agree become constants in its body; integer ones on
    which they differ (counts of a site) are references to the node's attribute.

    Args:
        model: with opaque ``tokred`` nodes.
        dtype: the dtype of its weights.
    """
    opset = model.opset_imports[""]
    for name, nodes in tokred_nodes(model).items():
        if name not in ONNX_OPS:
            raise BuildFailed(f"the graph holds an unknown custom op {DOMAIN}::{name}")
        op = ONNX_OPS[name]
        agreed, varying = _attributes(op, nodes)
        # Token counts this body meets: axis 1 of any input that has tokens there.
        lengths = frozenset(
            int(n.inputs[0].shape[1]) for n in nodes if len(n.inputs[0].shape) > 1
        )
        function = function_for(op, agreed, varying, dtype, lengths, opset)
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
    return model


def _attributes(op: OnnxOp, nodes: list[ir.Node]) -> tuple[dict[str, Number], dict[str, int]]:
    agreed: dict[str, Number] = {}
    varying: dict[str, int] = {}
    for name in op.attributes:
        values = [node.attributes[name].value for node in nodes]
        if len(set(values)) == 1:
            agreed[name] = values[0]
        elif op.attributes[name] is int:
            varying[name] = max(values)
        else:
            raise BuildFailed(f"{op.name} nodes differ in {name}: {sorted(set(values))}")
    return agreed, varying
