"""What a kernel-level file asks for is read, and refused where no kernel can serve it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from checkpoints import write_mamba_ssm
from kernel_shapes import MODELS, cases
from tokred_plugins.quick_file import parse_call, read_calls
from tokred_plugins.registry import call_to_json, variant_name

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.export import export_prefill
from tokred_export.export.lower import kernel_nodes, lower

CASE = next(iter(cases(MODELS["130m"], 1, 2048, "fp16", {"causal_conv1d"})))
(CALL,) = CASE.launches()
TEXT = call_to_json(CALL)


def file_of(folder, text=TEXT, op_type="causal_conv1d", inputs=4, outputs=2):
    """A graph of one plugin node, called /conv."""
    values = [ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT16),
                       shape=ir.Shape([1])) for i in range(inputs)]
    attributes = {"plugin_namespace": "tokred", "plugin_version": "1", "aot": 1}
    if text is not None:
        attributes["call"] = text
    node = ir.node(op_type, values, attributes, domain="tokred", name="/conv",
                   num_outputs=outputs)
    graph = ir.Graph(values, node.outputs, nodes=[node], name="one",
                     opset_imports={"": 18, "tokred": 1})
    path = folder / "one.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_calls_of_a_file(tmp_path):
    """Every call of an exported model comes back, by plugin; the weights are not needed."""
    write_mamba_ssm(tmp_path, n_layer=2)
    model = build_model(load_checkpoint(str(tmp_path)))
    export_prefill(model, 44, 1, tmp_path / "graph.onnx")
    counts = lower(tmp_path / "graph.onnx", tmp_path / "quick.onnx", "quick", 90)
    texts = [a["call"] for _, a in kernel_nodes(ir.load(tmp_path / "quick.onnx"))]
    (tmp_path / "quick.onnx.data").unlink()

    found = read_calls(tmp_path / "quick.onnx")
    assert {name: len(calls) for name, calls in found.items()} == {
        variant_name(call): counts[call.kernel.name] for calls in found.values() for call in calls
    }
    assert sorted(texts) == sorted(call_to_json(c) for calls in found.values() for c in calls)
    assert counts["causal_conv1d"] == counts["ssd_chunk_scan"] == 2


def test_a_call_from_a_node(tmp_path):
    """The same call, with and without the NUL that TensorRT's parser leaves at its end."""
    assert read_calls(file_of(tmp_path)) == {"causal_conv1d": [CALL]}
    for end in ("", "\0"):
        assert parse_call(TEXT + end, "causal_conv1d", 4) == CALL


@pytest.mark.parametrize(("changes", "says"), [
    ({"text": TEXT.replace('"causal_conv1d"', '"causal_conv2d"')},
     "(KeyError: 'causal_conv2d'), expected one of add_rms_norm, "),
    ({"text": "not a call"}, "that no kernel of this version reads (JSONDecodeError"),
    ({"text": "[1]"}, "that no kernel of this version reads (TypeError"),
    ({"text": '{"kernel":"ssd_scan"}'}, "(KeyError: 'inputs'), expected one of"),
    ({"text": None}, 'without an attribute call; expected a file that lower(..., form="quick")'),
    ({"op_type": "add_rms_norm"}, "is given the call of causal_conv1d, expected its own"),
    ({"inputs": 3}, "has 3 inputs, expected 4: zxbcdt, weight, bias, pads"),
    ({"outputs": 1}, "has 1 outputs, expected 2: y, state"),
])  # fmt: skip
def test_what_no_kernel_serves(tmp_path, changes, says):
    """The node and the file are named, with what was found and what was expected."""
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        read_calls(file_of(tmp_path, **changes))
    assert str(refused.value).startswith("node /conv of one.onnx")


def test_a_call_that_lacks_an_input_is_another_plugin():
    """A plugin has a fixed number of inputs, so an absent optional one makes another name."""
    scan = next(iter(cases(MODELS["130m"], 1, 2048, "fp16", {"ssd_scan"}))).launches()[-1]
    assert variant_name(scan) == "ssd_chunk_scan_without_initial_state"
    fewer = {n: d for n, d in scan.inputs.items() if n != "starts"}
    text = call_to_json(replace(scan, inputs=fewer))
    with pytest.raises(ValueError, match="ssd_chunk_scan_without_initial_state_without_starts"):
        parse_call(text, variant_name(scan), len(fewer))
