"""Opset 18 to 17: reductions mean what they meant, and what changed otherwise is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tokred_export.errors import BuildFailed
from tokred_export.export.opset17 import _CHANGED, _REDUCTIONS, to_opset_17

AXES = {"one": [1], "last": [-1], "two": [0, 2], "empty": [], "absent": None}


def reduction(op, axes, opset=18, as_node=False, **attributes):
    """y = op(x [2,3,4]) with its axes as an initializer or as a Constant node."""
    info = helper.make_tensor_value_info
    nodes, initializers, names = [], [], ["x"]
    if axes is not None:
        tensor = numpy_helper.from_array(np.array(axes, np.int64), "axes")
        names.append("axes")
        if as_node:
            nodes.append(helper.make_node("Constant", [], ["axes"], value=tensor))
        else:
            initializers.append(tensor)
    nodes.append(helper.make_node(op, names, ["y"], name="reduce", **attributes))
    over = tuple(axes) if axes else None
    shape = np.zeros((2, 3, 4)).sum(axis=over, keepdims=attributes.get("keepdims", 1) == 1).shape
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [2, 3, 4])],
        [info("y", TensorProto.FLOAT, shape)], initializers,
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )


def converted(model):
    """The model at opset 17."""
    return ir.to_proto(to_opset_17(ir.from_proto(model)))


def run(model):
    """y of a fixed positive x, as ONNX Runtime computes it."""
    x = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("op", sorted(_REDUCTIONS))
def test_reductions_give_the_same(op, axes):
    """Axes that were an input are an attribute; opset 17's checker and ONNX Runtime agree."""
    for keepdims in (0, 1):
        model = reduction(op, AXES[axes], keepdims=keepdims)
        found = converted(model)
        onnx.checker.check_model(found, full_check=True)
        assert found.opset_import[0].version == 17
        assert [list(node.input) for node in found.graph.node] == [["x"]]
        np.testing.assert_array_equal(run(found), run(model))


def test_axes_of_a_constant_node():
    """The exporter may write constants as nodes."""
    model = reduction("ReduceMean", [2], as_node=True)
    np.testing.assert_array_equal(run(converted(model)), run(model))


def test_reduce_sum_is_left_alone():
    """Its axes were an input before 18 already."""
    model = reduction("ReduceSum", [1])
    found = converted(model)
    onnx.checker.check_model(found, full_check=True)
    assert list(found.graph.node[-1].input) == ["x", "axes"]


@pytest.mark.parametrize("axes", ["empty", "absent"])
def test_reduction_of_nothing(axes):
    """noop_with_empty_axes has no counterpart; with axes it says nothing and goes."""
    with pytest.raises(BuildFailed, match="node reduce reduces nothing"):
        converted(reduction("ReduceMax", AXES[axes], noop_with_empty_axes=1))
    model = reduction("ReduceMax", [1], noop_with_empty_axes=1)
    np.testing.assert_array_equal(run(converted(model)), run(model))


def test_axes_that_are_computed():
    """They cannot be an attribute."""
    model = reduction("ReduceMean", None)
    model.graph.node[0].input.append("x_axes")
    model.graph.input.append(helper.make_tensor_value_info("x_axes", TensorProto.INT64, [1]))
    with pytest.raises(BuildFailed, match="node reduce has axes that are not constant"):
        converted(model)


def test_all_that_changed_is_known():
    """The two lists are all of ONNX's changes from 17 to 18."""
    schemas = onnx.defs.get_all_schemas_with_history()
    changed = {s.name for s in schemas if not s.domain and s.since_version == 18}
    assert changed == _REDUCTIONS | _CHANGED


@pytest.mark.parametrize("op", sorted(_CHANGED))
def test_other_changed_ops_are_refused(op):
    """By name, also inside a subgraph."""
    graph = ir.Graph(
        [], [], nodes=[ir.node(op, [], name="deep")], opset_imports={"": 18}, name="inner"
    )
    outer = ir.node("If", [], {"then_branch": graph}, name="branch")
    for node in (ir.node(op, [], name="deep"), outer):
        model = ir.Model(
            ir.Graph([], [], nodes=[node], opset_imports={"": 18}, name="g"), ir_version=10
        )
        with pytest.raises(BuildFailed, match=f"node deep is a {op}, which opset 17 has not"):
            to_opset_17(model)


@pytest.mark.parametrize("opset", [17, 21])
def test_other_opsets_are_refused(opset):
    """What is not 18 is not this tool's export."""
    with pytest.raises(BuildFailed, match=f"of opset {opset}, expected 18"):
        to_opset_17(ir.from_proto(reduction("ReduceSum", [1], opset)))
