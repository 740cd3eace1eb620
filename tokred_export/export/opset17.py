"""Opset 18 to 17, in place: what TensorRT 8.6 reads.

Only what changed between the two for ops of this tool's graphs is rewritten; any other op that
changed is an error, not a guess.
"""

from __future__ import annotations

import onnx_ir as ir

from tokred_export.errors import BuildFailed

# Reductions take their axes as an input from opset 18 on (ReduceSum did before).
_REDUCTIONS = {
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
}
# New or changed in 18 in other ways (ONNX changelog).
_CHANGED = {
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im",
    "GroupNormalization", "LpPool", "Mish", "OptionalGetElement", "OptionalHasElement", "Pad",
    "Resize", "ScatterElements", "ScatterND", "Split",
}


def to_opset_17(model: ir.Model) -> ir.Model:
    """Rewrite an opset-18 model without functions to opset 17.

    Raises:
        BuildFailed: the model is of another opset, or has an op that opset 17 has not.
    """
    found = model.opset_imports.get("")
    if found != 18:
        raise BuildFailed(f"the graph is of opset {found}, expected 18: export it again")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _REDUCTIONS:
            _axes_to_attribute(node)
        elif node.op_type in _CHANGED:
            raise BuildFailed(
                f"node {node.name} is a {node.op_type}, which opset 17 has not in this form: "
                "build for another backend"
            )
        node.version = None
    model.opset_imports[""] = 17
    return model


def _axes_to_attribute(node: ir.Node) -> None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes: list[int] = []
    if given is not None:
        constant = ir.convenience.get_const_tensor(given)
        if constant is None:
            raise BuildFailed(f"node {node.name} has axes that are not constant, as opset 17 needs")
        axes = constant.numpy().ravel().tolist()
    nothing = node.attributes.pop("noop_with_empty_axes", None)
    if not axes and nothing is not None and nothing.value:
        raise BuildFailed(f"node {node.name} reduces nothing, which opset 17 cannot say")
    node.resize_inputs(1)
    if axes:  # none at all: all of them
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
