"""Inlining, hashing and shape comparison of ONNX files."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny_onnx import L, V, save_tiny, tiny_model

from tokred_export.backends.graph import (
    compare_shapes,
    data_files,
    declared_shapes,
    fill_open_sizes,
    hash_sources,
    infer_shapes,
    inline_functions,
    load_graph,
    ort_shapes,
    save_with_data,
    walk_nodes,
    without_shapes,
)
from tokred_export.disk import hash_file
from tokred_export.errors import BuildFailed, InvalidRequest


def test_inlined_graph_is_standard_and_equal():
    """Bodies replace calls, nothing of the domain stays, and the outputs are the same."""
    model = tiny_model()
    inlined = inline_functions(model)
    assert [node.op_type for node in inlined.graph.node] == [
        "Gather", "Constant", "CastLike", "Mul", "Mul", "MatMul"
    ]  # fmt: skip
    assert [entry.domain for entry in inlined.opset_import] == [""]
    assert not inlined.functions and b"tokred" not in inlined.SerializeToString()
    onnx.checker.check_model(inlined, full_check=True)
    feeds = {"ids": np.arange(8, dtype=np.int32).reshape(2, L)}
    as_written = onnxruntime.SessionOptions()
    as_written.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found, expected = (
        onnxruntime.InferenceSession(
            m.SerializeToString(), as_written, providers=["CPUExecutionProvider"]
        ).run(None, feeds)[0]
        for m in (inlined, model)
    )
    np.testing.assert_array_equal(found, expected)


def test_leftover_plugin_attributes_are_dropped():
    """Plugin attributes on a standard op would mean nothing, and go."""
    model = tiny_model()
    model.graph.node[0].attribute.append(helper.make_attribute("plugin_namespace", "tokred"))
    (gather, *_) = inline_functions(model).graph.node
    assert [attribute.name for attribute in gather.attribute] == ["axis"]


def test_op_without_body_is_named():
    """A custom op that no function serves is an error that names its node."""
    with pytest.raises(BuildFailed, match=r"'layers\.0\.scaled' is a tokred::scaled"):
        inline_functions(tiny_model(body=False))


def test_op_without_body_inside_a_branch():
    """The search for custom ops goes into the graphs inside nodes."""
    inner = helper.make_graph(
        [helper.make_node("odd", [], ["o"], domain="tokred", name="inner.odd")],
        "branch",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])],
    )
    model = tiny_model()
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    )
    assert [node.op_type for node in walk_nodes(model.graph)].count("odd") == 2
    with pytest.raises(BuildFailed, match=r"inner\.odd"):
        inline_functions(model)


def test_sources_cover_external_data(tmp_path):
    """The hashes name the graph and its weights; a rewritten copy finds the weights beside it."""
    path = save_tiny(tmp_path / "tiny.onnx", external=True)
    model = load_graph(path)
    assert data_files(model) == ["tiny.onnx.data"]
    names = {"tiny.onnx", "tiny.onnx.data"}
    assert hash_sources(path, model) == {n: hash_file(tmp_path / n).sha256 for n in names}
    (tmp_path / "copy").mkdir()
    save_with_data(inline_functions(model), path, tmp_path / "copy" / "inlined.onnx")
    copy = onnx.load(tmp_path / "copy" / "inlined.onnx")  # reads the external data
    assert {i.name: i.raw_data for i in copy.graph.initializer} == {
        i.name: i.raw_data for i in tiny_model().graph.initializer
    }
    (tmp_path / "tiny.onnx.data").unlink()
    with pytest.raises(BuildFailed, match=r"weights in tiny\.onnx\.data, which is not beside it"):
        hash_sources(path, model)


def test_external_data_elsewhere_is_refused(tmp_path):
    """A graph that points outside its folder is not followed."""
    path = save_tiny(tmp_path / "tiny.onnx", external=True)
    model = load_graph(path)
    model.graph.initializer[0].external_data[0].value = "../secret"
    with pytest.raises(BuildFailed, match="leaves the folder"):
        hash_sources(path, model)


@pytest.mark.parametrize(("batch", "expected"), [(2, 2), ("B", "B")])
def test_shapes_are_inferred_not_read(tmp_path, batch, expected):
    """Both inferences see the true shape even where the file declares a wrong one."""
    model = tiny_model(batch=batch)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 99
    bare, inlined = tmp_path / "bare.onnx", tmp_path / "inlined.onnx"
    onnx.save(without_shapes(model), bare)
    onnx.save(without_shapes(inline_functions(model)), inlined)
    shapes = {"logits": (expected, L, V)}
    assert ort_shapes(bare) == shapes == infer_shapes(inlined)


def test_contradicting_shapes(tmp_path):
    """A graph that cannot be is named in onnx's words."""
    model = tiny_model()
    model.graph.initializer[2].dims[0] = 4
    model.graph.initializer[2].dims[1] = 32
    onnx.save(without_shapes(inline_functions(model)), tmp_path / "bad.onnx")
    with pytest.raises(BuildFailed, match=r"bad\.onnx contradict each other"):
        infer_shapes(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"y": (2, 4)}, None),
        ({"y": (-1, 4)}, None),
        ({"y": ("B", None)}, None),
        ({"y": None}, None),
        ({"y": (2, 5)}, r"gives output y the shape \[2, 5\].*\[2, 4\]"),
        ({"y": (2, 4, 1)}, "gives output y the shape"),
        ({"z": (2, 4)}, r"outputs \['z'\]"),
        ({}, r"outputs \[\]"),
    ],
)
def test_compare_shapes(found, said):
    """Fixed sizes must agree, open ones fit anything, names and ranks must be the same."""
    if said is None:
        compare_shapes("a parser", found, "ORT", {"y": (2, 4)})
        return
    with pytest.raises(BuildFailed, match=f"a parser.*{said}"):
        compare_shapes("a parser", found, "ORT", {"y": (2, 4)})


@pytest.mark.parametrize(
    ("inferred", "filled"),
    [
        ((None, 4), (2, 4)),
        (("n", 5), (2, 5)),
        (None, (2, 4)),
        ((3,), (3,)),
        ((), ()),
    ],
)
def test_open_sizes_are_filled(inferred, filled):
    """Only what inference left open is taken from the declaration; a clash stays visible."""
    assert fill_open_sizes({"y": inferred}, {"y": (2, 4)}) == {"y": filled}


def test_unknown_rank(tmp_path):
    """A shape that only running would tell is unknown to both, not a scalar's."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [4]), info("s", TensorProto.INT64, ["n"])],
        [info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    assert ort_shapes(tmp_path / "m.onnx") == infer_shapes(tmp_path / "m.onnx") == {"y": None}
    assert declared_shapes(model) == {"y": None}


def test_what_is_no_graph(tmp_path):
    """An absent file, junk and an empty file each get their own sentence."""
    with pytest.raises(InvalidRequest, match="does not exist"):
        load_graph(tmp_path / "absent.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(BuildFailed, match="not an ONNX file"):
        load_graph(tmp_path / "junk.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(BuildFailed, match="holds no node"):
        load_graph(tmp_path / "empty.onnx")
