"""The ONNX file: every custom op present as a node with one body, and equal to eager."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import MAMBA_SSM, TRANSFORMERS, write_mamba_ssm, write_transformers
from tokred_plugins.names import DOMAIN, PLUGIN_ATTRIBUTES
from tokred_plugins.onnx_ops import ONNX_OPS

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.errors import BuildFailed
from tokred_export.export import OPSET, export_prefill
from tokred_export.export import emit as emit_module
from tokred_export.export.capture import capture_prefill, prefill_names
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.specs import ReductionSpec

LENGTH = 44
PER_SITE = {
    "utrc": {"TokenImportance": 1, "TokenSplit": 1, "TokenMatch": 1, "TokenLink": 1,
             "TokenReduce": 1},
    "pumer": {"TokenSplit": 1, "TokenMatch": 1, "TokenLink": 1, "TokenReduce": 1},
    "evit": {"TokenImportance": 1, "TokenSplit": 1, "TokenReduce": 1},
    "utrc-code": {"TokenStride": 1, "TokenReduceTop": 1},
    "none": {},
}  # fmt: skip


def reduced_model(folder, method, dtype="float32", sites=(0, 1), logits="last", **config):
    write_mamba_ssm(folder, **config)
    checkpoint = load_checkpoint(str(folder))
    asked = ReductionSpec(method=method, target=0.2, sites=sites)
    schedule = solve_schedule(checkpoint.spec, asked, LENGTH)
    return build_model(checkpoint, schedule, dtype=dtype, logits=logits)


def run(path, model, lengths, seed=0):
    """The graph's outputs by name, and eager's in the same order."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.spec.vocab_size, (len(lengths), LENGTH), dtype=np.int32)
    counts = np.asarray(lengths, np.int32)
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {"input_ids": tokens, "prompt_len": counts})
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), torch.from_numpy(counts))
    eager = [out.logits, out.kept_positions, *(t for c in out.choices for t in c)]
    eager += [*out.conv_states, *out.ssm_states]
    names = prefill_names(model.spec.n_layer, len(out.choices)).outputs
    assert [o.name for o in session.get_outputs()] == list(names)
    return dict(zip(names, found, strict=True)), dict(zip(names, eager, strict=True))


def assert_equal(found, eager):
    """Choices exactly, values to float32."""
    for name, value in found.items():
        expected = eager[name].numpy()
        assert value.dtype == expected.dtype, name
        if name.startswith(("choice", "kept")):
            np.testing.assert_array_equal(value, expected, err_msg=name)
        else:
            scale = max(np.linalg.norm(expected), 1e-6)
            assert np.linalg.norm(value - expected) / scale < 1e-5, name


@pytest.mark.parametrize("method", PER_SITE)
def test_every_custom_op_is_a_node_with_one_body(tmp_path, method):
    """No op is lost, no body nests or forwards, attributes are literal, the opset is as asked."""
    model = reduced_model(tmp_path, method)
    path = tmp_path / "graph.onnx"
    export_prefill(model, LENGTH, 1, path)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {o.domain: o.version for o in graph.opset_import} == {"": OPSET, DOMAIN: 1}

    layers, sites = model.spec.n_layer, len(model.schedule.sites)
    expected = Counter({"CausalConv1dSilu": layers, "SsdScan": layers, "GatedRmsNorm": layers,
                        "AddRmsNorm": layers, "EmbedRmsNorm": 1})  # fmt: skip
    for op, count in PER_SITE[method].items():
        expected[op] += count * sites
    nodes = [n for n in graph.graph.node if n.domain == DOMAIN]
    assert Counter(n.op_type for n in nodes) == expected
    assert Counter(f.name for f in graph.functions) == Counter(set(expected))
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for name, value in PLUGIN_ATTRIBUTES.items():
            assert attributes.pop(name) == (value.encode() if isinstance(value, str) else value)
        assert set(attributes) == set(ONNX_OPS[node.op_type].attributes)
    for function in graph.functions:
        assert not function.overload
        assert {n.domain for n in function.node} == {""}
        assert {o.domain: o.version for o in function.opset_import} == {"": OPSET}
    # A custom op may not be mistaken for a standard one: TensorRT looks those up by type alone.
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert not standard & set(expected)


@pytest.mark.parametrize("method", PER_SITE)
@pytest.mark.parametrize("max_batch", [1, 3])
def test_equals_eager(tmp_path, method, max_batch):
    """With and without padding, one row at a time or several of different lengths."""
    model = reduced_model(tmp_path, method)
    path = tmp_path / "graph.onnx"
    export_prefill(model, LENGTH, max_batch, path)
    out = model.schedule.length_out
    batches = [[n] for n in (0, 1, out - 1, out, out + 1, 41, 43, LENGTH)]
    if max_batch > 1:
        batches = [[LENGTH, out, 2], [40], [0, LENGTH]]
    for lengths in batches:
        assert_equal(*run(path, model, lengths, seed=len(lengths)))


@pytest.mark.parametrize("config", sorted(set(MAMBA_SSM) - {"plain", "eight-layers"}))
def test_every_configuration_of_mamba_ssm(tmp_path, config):
    """Groups, norm orders, biases and limits reach the graph."""
    model = reduced_model(tmp_path, "utrc", **MAMBA_SSM[config])
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    assert_equal(*run(tmp_path / "graph.onnx", model, [30]))


@pytest.mark.parametrize("config", ["biases", "residual-16bit", "wide-conv"])
def test_configurations_of_transformers(tmp_path, config):
    """The other layout too."""
    write_transformers(tmp_path, **TRANSFORMERS[config])
    model = build_model(load_checkpoint(str(tmp_path)))
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    assert_equal(*run(tmp_path / "graph.onnx", model, [LENGTH]))


def test_all_logits(tmp_path):
    """logits="all" gives one row a kept token, and a site may follow the last layer."""
    model = reduced_model(tmp_path, "utrc", sites=(0, 2), logits="all")
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    found, eager = run(tmp_path / "graph.onnx", model, [LENGTH])
    assert found["logits"].shape[:2] == (1, model.schedule.length_out)
    assert_equal(found, eager)


def test_float16_runs_and_keeps_float32_states(tmp_path):
    """A 16-bit graph has float32 SSM states and is near the float32 model."""
    model = reduced_model(tmp_path, "none", dtype="float16")
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"))
    types = {o.name: o.type for o in session.get_outputs()}
    assert types["present.ssm_state.0"] == "tensor(float)"
    assert types["present.conv_state.0"] == types["logits"] == "tensor(float16)"
    found, eager = run(tmp_path / "graph.onnx", model, [LENGTH])
    for name in ("logits", "present.ssm_state.2"):
        expected = eager[name].float().numpy()
        error = np.linalg.norm(found[name].astype(np.float32) - expected)
        assert error / np.linalg.norm(expected) < 5e-3  # a few 16-bit roundings


def test_bfloat16_passes_the_checker(tmp_path):
    """bfloat16 graphs are for other runtimes than ONNX Runtime's CPU provider."""
    model = reduced_model(tmp_path, "utrc", dtype="bfloat16")
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx")
    logits = graph.graph.output[0].type.tensor_type.elem_type
    assert logits == onnx.TensorProto.BFLOAT16


def test_large_weights_go_beside_the_graph(tmp_path, monkeypatch):
    """Above the limit the weights are in one file of external data, and the graph still runs."""
    monkeypatch.setattr(emit_module, "EXTERNAL_ABOVE", 1000)
    model = reduced_model(tmp_path, "utrc")
    files = export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    assert [f.name for f in files] == ["graph.onnx", "graph.onnx.data"]
    assert files[1].stat().st_size > 10_000
    assert_equal(*run(tmp_path / "graph.onnx", model, [LENGTH]))


@pytest.mark.parametrize("config", [{}, {"ssm_cfg": {"conv_bias": False}}])
def test_a_program_has_the_weights_of_the_model_and_no_copies(tmp_path, config):
    model = reduced_model(tmp_path, "utrc", **config)
    program, _ = capture_prefill(model, LENGTH)
    held = {**program.state_dict, **program.constants}
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert held.keys() == {f"model.{name}" for name in expected}
    assert all(held[f"model.{name}"] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transposed_weights_are_those_of_the_model(tmp_path, dtype):
    model = reduced_model(tmp_path, "utrc", dtype)
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    graph = ir.load(tmp_path / "graph.onnx").graph
    found = [
        node.inputs[1].const_value.tobytes() for node in graph if node.op_type == "MatMul"
    ]
    expected = [
        layer.in_proj.weight.t().contiguous().view(torch.uint8).numpy().tobytes()
        for layer in model.layers
    ]
    assert [weight for weight in expected if weight not in found] == []


def test_a_lost_custom_op_is_an_error(tmp_path, monkeypatch):
    """The exporter's decomposition of a custom op must not pass unnoticed."""
    model = reduced_model(tmp_path, "none")
    program, names = capture_prefill(model, LENGTH)
    monkeypatch.setattr(emit_module, "tokred_nodes", lambda model: {})
    with pytest.raises(BuildFailed, match="0 custom ops, expected"):
        emit_module.to_onnx(program, names, torch.float32)


def test_no_path_of_this_machine_in_the_file(tmp_path):
    """The exporter would store stack traces on every node."""
    model = reduced_model(tmp_path, "utrc")
    export_prefill(model, LENGTH, 1, tmp_path / "graph.onnx")
    data = (tmp_path / "graph.onnx").read_bytes()
    assert b"site-packages" not in data
    assert b".py" not in data
