"""A bundle whose graphs keep the I/O contract but compute something one can check by hand.

With ids left-padded to L, for each row: logits are the table's row of the last id; kept positions
are those of the last L_out tokens; every conv state holds the sum of the real ids, every ssm state
that sum plus the layer's number; the site's src are 0 and 1, dst prompt_len and prompt_len + 1.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tokred_export.bundle import write_manifest, writing_bundle
from tokred_export.manifest import (
    BundleSpec,
    Component,
    ComponentMetadata,
    Manifest,
    make_provenance,
    prefill_io,
)
from tokred_export.specs import ModelSpec, ReductionSchedule, ReductionSpec, Site

MODEL = ModelSpec(
    layout="mamba_ssm", vocab_size=11, d_model=4, n_layer=2, d_inner=4, n_heads=2, head_dim=2,
    d_state=3, norm_group_size=4,
)  # fmt: skip
TABLE = np.arange(121, dtype=np.float32).reshape(11, 11)
COMMAND = "tokred-export build demo -o out"
REMOVED = 2

_BODY = """
<opset_import: ["" : 21], domain: "tokred">
real_sum <axis> (ids, real) => (total) {
    zero = Sub(ids, ids)
    kept = Where(real, ids, zero)
    axes = Constant<value_ints: ints = @axis>()
    total = ReduceSum<keepdims: int = 1>(kept, axes)
}
"""


def prefill_graph(length, batch):
    """An ONNX model of length L; ``batch`` is a number or the name of an open size."""
    node = helper.make_node
    kept, last = length - REMOVED, length - 1
    constants = {
        "table": TABLE,
        "steps": np.arange(length, dtype=np.int32)[None],
        "length": np.array(length, np.int32),
        "minus": np.array(-1, np.int32),
        "zero": np.array(0, np.int32),
        "pair": np.array([[0, 1]], np.int32),
        "last": np.array(last, np.int64),
        "tail": np.array([REMOVED], np.int64),
        "end": np.array([length], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "conv_ones": np.ones((1, MODEL.conv_dim, MODEL.d_conv - 1), np.float32),
        "ssm_ones": np.ones((1, MODEL.n_heads, MODEL.head_dim, MODEL.d_state), np.float32),
        "column": np.array([-1, 1], np.int64),
        "cube": np.array([-1, 1, 1], np.int64),
        "hypercube": np.array([-1, 1, 1, 1], np.int64),
        **{f"layer{i}": np.array(i, np.float32) for i in range(MODEL.n_layer)},
    }
    nodes = [
        node("Reshape", ["prompt_len", "column"], ["len_column"]),
        node("Sub", ["length", "len_column"], ["pads"]),
        node("Sub", ["steps", "pads"], ["positions"]),
        node("GreaterOrEqual", ["positions", "zero"], ["real"]),
        node("Where", ["real", "positions", "minus"], ["marked"]),
        node("Slice", ["marked", "tail", "end", "one"], ["kept_positions"]),
        node("Gather", ["input_ids", "last"], ["last_id"], axis=1),
        node("Gather", ["table", "last_id"], ["logits"], axis=0),
        node("Mul", ["len_column", "zero"], ["nothing"]),
        node("Add", ["nothing", "pair"], ["choice.src.0"]),
        node("Add", ["len_column", "pair"], ["choice.dst.0"]),
        node("Greater", ["choice.src.0", "zero"], ["choice.merge.0"]),
        node(
            "real_sum", ["input_ids", "real"], ["sum"], domain="tokred", name="layers.0.sum",
            axis=[1], plugin_namespace="tokred", plugin_version="1", aot=1,
        ),
        node("Cast", ["sum"], ["sum_float"], to=TensorProto.FLOAT),
        node("Reshape", ["sum_float", "cube"], ["sum_cube"]),
        node("Reshape", ["sum_float", "hypercube"], ["sum_hypercube"]),
    ]  # fmt: skip
    outputs = {
        "logits": (TensorProto.FLOAT, [11]),
        "kept_positions": (TensorProto.INT32, [kept]),
        "choice.src.0": (TensorProto.INT32, [REMOVED]),
        "choice.dst.0": (TensorProto.INT32, [REMOVED]),
        "choice.merge.0": (TensorProto.BOOL, [REMOVED]),
    }
    for i in range(MODEL.n_layer):
        conv, ssm = f"present.conv_state.{i}", f"present.ssm_state.{i}"
        nodes += [
            node("Mul", ["sum_cube", "conv_ones"], [conv]),
            node("Mul", ["sum_hypercube", "ssm_ones"], [f"ssm{i}"]),
            node("Add", [f"ssm{i}", f"layer{i}"], [ssm]),
        ]
        outputs[conv] = (TensorProto.FLOAT, [MODEL.conv_dim, MODEL.d_conv - 1])
        outputs[ssm] = (TensorProto.FLOAT, [MODEL.n_heads, MODEL.head_dim, MODEL.d_state])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "prefill",
        [
            info("input_ids", TensorProto.INT32, [batch, length]),
            info("prompt_len", TensorProto.INT32, [batch]),
        ],
        [info(name, kind, [batch, *rest]) for name, (kind, rest) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("tokred", 1)],
        functions=[onnx.parser.parse_function(_BODY)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def make_bundle(target, lengths=(4, 8), max_batch=2, dynamic=True, extra=None):
    """Write a bundle of fake graphs; ``extra(folder)`` may add files before the manifest."""
    components, schedules = {}, {}
    for length in lengths:
        schedules[length] = ReductionSchedule(
            method="utrc",
            length=length,
            sites=(Site(layer=0, tokens_in=length, tokens_out=length - REMOVED),),
        )
        components[f"prefill-{length}"] = Component(
            file=f"prefill-{length}.onnx",
            metadata=ComponentMetadata(
                phase="prefill", seq_len=length, length_out=length - REMOVED, max_batch=max_batch,
                dynamic_batch=dynamic, opset=21, sites=(0,),
            ),
        )  # fmt: skip
    manifest = Manifest(
        components=components,
        spec=BundleSpec(model=MODEL, reduction=ReductionSpec(), schedules=schedules),
        io={name: prefill_io(MODEL.n_layer, 1) for name in components},
        provenance=make_provenance("demo", "0" * 64, COMMAND),
    )
    with writing_bundle(target) as folder:
        for length in lengths:
            graph = prefill_graph(length, "B" if dynamic else max_batch)
            onnx.save(graph, folder / f"prefill-{length}.onnx")
        if extra is not None:
            extra(folder)
        write_manifest(folder, manifest)
    return target
