"""The kernel-level file: every op as its launches, wired right, and computing what it did before.

The last is proven by running the lowered files without TensorRT (lowered_worker.py).
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from small_exports import Case, compiling_once, export
from tokred_plugins.kernel_faces import FACES, LINEAR, ONNX_NAMES
from tokred_plugins.kernels import Spec
from tokred_plugins.names import DOMAIN, PLUGIN_ATTRIBUTES

from tokred_export.errors import BuildFailed, EnvironmentUnable
from tokred_export.export import emit
from tokred_export.export.lower import kernel_nodes, lower

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from tokred_plugins import aot
from tokred_plugins.registry import call_from_json

WORKER = Path(__file__).with_name("lowered_worker.py")
SM = 86
FORMS = ("quick", "launcher")
DTYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT32": "i32", "BOOL": "i1"}


CASES = {
    "utrc": Case(),
    "utrc-half-untied": Case(dtype="float16", tied=False),
    "utrc-open-untied": Case(max_batch=3, tied=False),
    "utrc-sites-open": Case(layers=4, max_batch=3),
    "dense-long": Case("none", length=260, groups=2),
    "evit-all-open": Case("evit", logits="all", max_batch=2),
    "pumer-half-open": Case("pumer", dtype="float16", max_batch=4),
    "pumer": Case("pumer", groups=2),
    "utrc-long": Case(length=161),  # more than one program finds places
}


class Lowered(NamedTuple):
    """A case's exported file and both forms of it."""

    case: Case
    source: Path
    quick: Path
    launcher: Path
    counts: Counter


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """Name of a case -> its files, made once; code that cases have in common is compiled once."""
    made = {}

    def get(name):
        if name not in made:
            case = CASES[name]
            source = export(tmp_path_factory.mktemp(name), case)
            files = [source.with_name(f"{form}.onnx") for form in FORMS]
            with compiling_once():
                counts = [
                    lower(source, file, form, SM, case.max_batch)
                    for form, file in zip(FORMS, files, strict=True)
                ]
            products = counts[1] - counts[0]
            assert counts[0] + products == counts[1]
            assert products.keys() <= {"linear", "linear_few"}
            made[name] = Lowered(case, source, *files, counts[0])
        return made[name]

    return get


def attributes(node):
    """A node's attributes as Python values."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in found.items()}


def specs_of(graph, batch):
    """Every tensor's name -> Spec, read from the file by onnx alone."""
    specs = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value or batch for d in tensor.shape.dim)
        kind = DTYPES.get(onnx.TensorProto.DataType.Name(tensor.elem_type))
        specs[value.name] = Spec(shape, kind)
    for tensor in graph.initializer:
        kind = DTYPES.get(onnx.TensorProto.DataType.Name(tensor.data_type))
        specs[tensor.name] = Spec(tuple(tensor.dims), kind)
    return specs


def expected_launches(graph, batch, form):
    """(name, call, inputs, outputs) of every launch, from the ops' faces and the edges."""
    specs, launches = specs_of(graph, batch), []
    constants = {tensor.name for tensor in graph.initializer}
    makers = {edge: node for node in graph.node for edge in node.output}
    # A gated norm over the whole row leaves the importance of its y too.
    scores = {n.input[0]: n.output[0] for n in graph.node if n.op_type == "TokenImportance"}
    # The norm after a site is the site's own.
    merged = {n.input[0]: n for n in graph.node if n.op_type == "AddRmsNorm"}
    sites = {n.output[0] for n in graph.node if n.op_type == "TokenReduce"}
    paddings = iter([n.input[3] for n in graph.node if n.op_type == "CausalConv1dSilu"][1:])
    split = {n.input[2]: n for n in graph.node if n.op_type == "TokenMatch"}
    taken = set()
    for node in graph.node:
        given_attributes, results = attributes(node) | {"target": SM}, node.output
        if node.domain != DOMAIN:
            product = expected_product(node, makers, constants)
            if form == "quick" or product is None:
                continue
            face, edges, more = LINEAR, *product
            given_attributes |= more
        else:
            face, edges = FACES[ONNX_NAMES[node.op_type]], node.input
        names, extra = face.results, ()
        if node.op_type == "TokenSplit" and node.output[1] in split:  # leaves norms along
            edges, extra = [*edges, split[node.output[1]].input[0]], ("hidden",)
        if node.op_type == "TokenMatch":
            splitting = makers[edges[1]]
            inverse = f"{splitting.name}/1/inverse"
            specs[inverse] = Spec(specs[edges[0]].shape[:2], "fp32")
            edges, extra = [*edges, inverse], ("inverse",)
        if node.op_type == "GatedRmsNorm" and edges[0] in scores:
            if given_attributes["group_size"] == given_attributes["inner"]:
                given_attributes["scores"] = True
                names, results = (*names, "scores"), [*results, scores[edges[0]]]
                taken.add(edges[0])
        elif node.input[0] in (taken if node.op_type == "TokenImportance" else sites):
            continue
        elif node.op_type == "TokenReduce":
            norm = merged[node.output[0]]
            assert list(norm.input[:2]) == list(node.output)
            given_attributes["eps"] = attributes(norm)["eps"]
            edges, extra = [*edges, norm.input[2]], ("weight",)
            names, results = ("normed", "residual_out"), norm.output
        elif node.op_type == "TokenLink":  # and the padding that the layer after it sees
            names, results = (*names, "left"), [*results, next(paddings)]
        place = dict(zip((*face.inputs, *extra), edges, strict=False))
        given = {
            name: specs[edge] if edge in specs else turned(specs[edge.removesuffix(".turned")])
            for name, edge in place.items()
        }
        calls = face.calls(given, given_attributes)
        for index, call in enumerate(calls):
            place |= {name: f"{node.name}/{index}/{name}" for name in call.outputs}
            place |= {
                name: edge for name, edge in zip(names, results, strict=True)
                if name in call.outputs
            }
            inputs = [place[name] for name in call.kernel.inputs if name in call.inputs]
            outputs = [place[name] for name in call.kernel.outputs]
            launches.append((f"{node.name}/{index}/{call.kernel.name}", call, inputs, outputs))
    return launches


def turned(spec):
    """The constant stored the other way."""
    return Spec(spec.shape[::-1], spec.dtype)


def expected_product(node, makers, constants):
    """x and weight of a product with a constant, and how the weight is stored."""
    if len(node.input) != 2 or node.input[1] not in constants:
        return None
    x, weight = node.input
    turned = {"turned": True, "flat": False}
    if node.op_type == "MatMul":
        return (x, f"{weight}.turned"), turned
    if node.op_type == "Gemm" and makers[x].op_type == "Gather":
        kept = attributes(node)["transB"] == 1
        tokens = makers[x].input[0]  # one a row
        return (tokens, weight if kept else f"{weight}.turned"), {**turned, "flat": True}
    return None


# --- nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_op_becomes_its_launches(lowered, name, form):
    """Exactly those that the op's face gives, in the graph's order, on the right edges."""
    found = lowered(name)
    source = onnx.load(found.source).graph
    expected = expected_launches(source, found.case.max_batch, form)
    graph = onnx.load(getattr(found, form)).graph
    nodes = [n for n in graph.node if n.domain == DOMAIN]
    assert [(n.name, list(n.input), list(n.output)) for n in nodes] == [
        (name, inputs, outputs) for name, _, inputs, outputs in expected
    ]
    kernels = Counter(call.kernel.name for _, call, _, _ in expected)
    own = {kernel: n for kernel, n in kernels.items() if not kernel.startswith("linear")}
    assert own == found.counts and found.counts["ssd_chunk_scan"] == found.case.layers
    if form == "launcher":  # projections, the last of one token, and the head
        products = 2 * found.case.layers + 1
        few = 0 if found.case.logits == "all" else 2
        assert (kernels["linear"], kernels["linear_few"]) == (products - few, few)
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output, *graph.value_info)
    }
    for node, (_, call, _, _) in zip(nodes, expected, strict=True):
        for edge, kernels_name in zip(node.output, call.kernel.outputs, strict=True):
            batch, *rest = shapes[edge]  # an open one may go by several names
            assert batch == 1 if found.case.max_batch == 1 else isinstance(batch, str)
            assert tuple(rest) == call.outputs[kernels_name].shape[1:]
        fields = attributes(node)
        assert fields["plugin_namespace"] == DOMAIN and fields["plugin_version"] == "1"
        if form == "quick":
            absent = [f"_without_{n}" for n in call.kernel.inputs if n not in call.inputs]
            assert node.op_type == call.kernel.name + "".join(absent)
            assert call_from_json(fields["call"]) == call
            assert fields["aot"] == PLUGIN_ATTRIBUTES["aot"]
        else:
            check_launcher_fields(node, fields, call)


def test_scans_fill_the_gpu_that_is_there(lowered, tmp_path):
    """On one of few multiprocessors a program a head does, and no chunk's state is written."""
    found = lowered("utrc")
    with compiling_once():
        counts = {
            n: lower(found.source, tmp_path / f"{n}.onnx", "quick", SM, multiprocessors=n)
            for n in (2, 300)
        }
    assert counts[2]["ssd_scan"] == counts[2]["ssd_steps"] == 2 and not counts[2]["ssd_pass"]
    assert counts[300] == found.counts


def test_the_scan_in_ptx_where_it_gets_scratch_memory(tmp_path):
    """The launcher plugin passes it, TensorRT passes none to quick plugins; and not every driver
    reads the code."""
    source = export(tmp_path, Case(dtype="float16", published=True))
    counts = lowered_for_hopper(source, tmp_path)
    scans = {
        form: {name: n for name, n in found.items() if name.startswith("ssd_scan")}
        for form, found in counts.items()
    }
    assert scans["quick"] == scans["older"] == {"ssd_scan": 2}
    assert scans["launcher"] == {"ssd_scan_hopper": 1, "ssd_scan_hopper_scored": 1}
    nodes = [attributes(n) for n in onnx.load(tmp_path / "launcher.onnx").graph.node]
    scratch = {n["kernel"]: n["scratch"] for n in nodes if n.get("kernel") in scans["launcher"]}
    assert scratch == {"ssd_scan_hopper": 256, "ssd_scan_hopper_scored": 384}
    assert {n["block"] for n in nodes if n.get("kernel") in scratch} == {384}


def lowered_for_hopper(source, folder):
    """Kernels of both forms where two multiprocessors are filled by eight heads, and of the
    launcher's with a driver that does not read all PTX ("older")."""
    drivers = {"launcher": True, "quick": True, "older": False}
    with compiling_once():
        return {
            name: lower(
                source, folder / f"{name}.onnx", "quick" if name == "quick" else "launcher", 90,
                multiprocessors=2, descriptors=reads,
            )
            for name, reads in drivers.items()
        }


# Layers of which the scan does the gate: none of whose rows one goes on, or whose groups are
# normalised apart. And of which of them it also sums up what importance is made of.
@pytest.mark.parametrize(
    ("case", "gated", "scored"),
    [
        (Case("none", logits="all"), (0, 1), 0), (Case("none"), (0,), 0),
        (Case(logits="all"), (0, 1), 1), (Case("none", logits="all", groups=2), (), 0),
    ],
    ids=["dense", "last token", "importance", "groups"],
)
def test_the_gate_of_a_norm(tmp_path, case, gated, scored):
    """A norm between a scan and a product is half of each, where nothing else wants it, and where
    the scan's kernel can gate; what comes out is what it was."""
    case = case._replace(dtype="float16", published=True, tied=False)
    source = export(tmp_path, case)
    counts = lowered_for_hopper(source, tmp_path)
    norms = sum(n for k, n in counts["quick"].items() if k.startswith("gated_rms_norm"))
    assert norms == sum(n for k, n in counts["older"].items() if k.startswith("gated_rms_norm"))
    found = counts["launcher"]
    assert found["ssd_scan_hopper_scored"] == found["token_importance"] == scored
    assert counts["quick"]["gated_rms_norm_scores"] == scored
    assert found["ssd_scan_hopper_gated"] + scored == len(gated) == norms - sum(
        n for k, n in found.items() if k.startswith("gated_rms_norm")
    )
    assert found["ssd_scan_hopper"] == 2 - len(gated)
    graph = onnx.load(tmp_path / "launcher.onnx").graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    products = [n for n in graph.node if n.name.endswith("/linear") and len(n.input) == 3]
    assert [n.input[2].split("/")[-1] for n in products] == ["squares"] * len(gated)
    for layer, node in zip(gated, products, strict=True):
        weight, _, norm = node.input[1].partition(".turned.")
        assert norm == f"model.layers.{layer}.gate_norm_weight" and norm not in weights
        wide = before[weight].astype(np.float32).T * before[norm].astype(np.float32)
        np.testing.assert_array_equal(weights[node.input[1]], wide.astype(np.float16))
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": random.integers(0, 61, (1, case.length), dtype=np.int32),
        "prompt_len": np.array([case.length - 5], np.int32),
    }
    joined, plain = run_lowered(
        tmp_path, [(tmp_path / f"{form}.onnx", tmp_path / "quick.onnx", feeds)
                   for form in ("launcher", "quick")]
    )  # fmt: skip
    assert list(joined) == list(plain)
    for name, value in plain.items():
        error = np.linalg.norm(joined[name].astype(float) - value)
        # About ten roundings that differ, 2^-11 over the root of 3 each, add up to 9e-4.
        assert error <= 1.2e-3 * np.linalg.norm(value.astype(float)), name


def find(graph, op_type):
    """The first node of a kind."""
    return next(node for node in graph.node if node.op_type == op_type)


def through(graph, node, index):
    """Put an Identity before one input of a node; its output's name."""
    copy = helper.make_node("Identity", [node.input[index]], ["copied"], name="copy")
    node.input[index] = "copied"
    graph.node.insert(list(graph.node).index(node), copy)
    kinds = {v.name: v.type for v in (*graph.value_info, *graph.input, *graph.output)}
    value = onnx.ValueInfoProto(name="copied")
    if copy.input[0] in kinds:
        value.type.CopyFrom(kinds[copy.input[0]])
    else:
        (weight,) = (t for t in graph.initializer if t.name == copy.input[0])
        value = helper.make_tensor_value_info("copied", weight.data_type, weight.dims)
    graph.value_info.append(value)


def norm_first(graph):
    """The norm comes before the gate."""
    (said,) = (a for a in find(graph, "GatedRmsNorm").attribute if a.name == "norm_before_gate")
    said.i = 1


def handed_out(op_type, index):
    """What a node gives is an output of the graph too."""

    def change(graph):
        name = find(graph, op_type).output[index]
        graph.output.append(next(v for v in graph.value_info if v.name == name))

    return change


def read_twice(op_type, index):
    """Something else in the graph reads it."""

    def change(graph):
        name = find(graph, op_type).output[index]
        graph.node.append(helper.make_node("Identity", [name], ["twice"], name="twice"))
        value = onnx.ValueInfoProto()
        value.CopyFrom(next(v for v in graph.value_info if v.name == name))
        value.name = "twice"
        graph.output.append(value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        read_twice("SsdScan", 0), read_twice("GatedRmsNorm", 0), norm_first,
        handed_out("SsdScan", 0), handed_out("GatedRmsNorm", 0),
        lambda graph: through(graph, find(graph, "GatedRmsNorm"), 1),
        lambda graph: through(graph, find(graph, "GatedRmsNorm"), 2),
        lambda graph: through(graph, find(graph, "GatedRmsNorm"), 0),
    ],
    ids=["y is read twice", "the norm is read twice", "norm first", "y is wanted",
         "the norm is wanted", "another z", "no constant", "another y"],
)
def test_gates_that_stay_with_the_norm(tmp_path, change):
    """Where something else needs what would not be written, or it is not the same."""
    source = export(tmp_path, Case("none", dtype="float16", published=True))
    before = lowered_for_hopper(source, tmp_path)["launcher"]
    model = onnx.load(source)
    change(model.graph)
    onnx.save(model, source)
    after = lowered_for_hopper(source, tmp_path)["launcher"]
    assert (before["ssd_scan_hopper_gated"], after["ssd_scan_hopper_gated"]) == (1, 0)
    assert after["gated_rms_norm"] == before["gated_rms_norm"] + 1 == 2
    assert before.total() + 1 == after.total()


@pytest.mark.parametrize(
    "change", [read_twice("SsdScan", 0), handed_out("SsdScan", 0), norm_first],
    ids=["y is read twice", "y is wanted", "norm first"],
)
def test_importance_that_stays_with_the_norm(tmp_path, change):
    """Where the scan must write y, or cannot gate it; the norm reads every row of it."""
    source = export(tmp_path, Case(logits="all", dtype="float16", published=True))
    before = lowered_for_hopper(source, tmp_path)["launcher"]
    model = onnx.load(source)
    change(model.graph)
    onnx.save(model, source)
    after = lowered_for_hopper(source, tmp_path)["launcher"]
    assert (before["ssd_scan_hopper_scored"], after["ssd_scan_hopper_scored"]) == (1, 0)
    assert (before["token_importance"], after["token_importance"]) == (1, 0)
    assert (before["gated_rms_norm_scores"], after["gated_rms_norm_scores"]) == (0, 1)


def test_importance_beside_two_norms(tmp_path):
    """One of them leaves it."""
    source = export(tmp_path, Case())
    model = onnx.load(source)
    norm = find(model.graph, "GatedRmsNorm")
    twin = onnx.NodeProto()
    twin.CopyFrom(norm)
    twin.name, twin.output[0] = "twin", "twin"
    model.graph.node.insert(list(model.graph.node).index(norm) + 1, twin)
    value = onnx.ValueInfoProto()
    value.CopyFrom(next(v for v in model.graph.value_info if v.name == norm.output[0]))
    value.name = "twin"
    model.graph.output.append(value)
    onnx.save(model, source)
    with compiling_once():
        counts = lower(source, tmp_path / "kernels.onnx", "quick", SM)
    assert (counts["gated_rms_norm_scores"], counts["gated_rms_norm"]) == (1, 2)
    assert counts["token_importance"] == 0


def test_gates_of_few_tokens(tmp_path):
    """Another kernel multiplies them, which divides nothing."""
    counts = {}
    for length in (16, 17):
        folder = tmp_path / str(length)
        folder.mkdir()
        source = export(folder, Case("none", dtype="float16", published=True, length=length))
        counts[length] = lowered_for_hopper(source, folder)["launcher"]["ssd_scan_hopper_gated"]
    assert counts == {16: 0, 17: 1}


def test_what_a_gated_norm_adds_to_its_squares(tmp_path):
    """Its epsilon is in the code of the product."""
    source = export(tmp_path, Case("none", dtype="float16", published=True))
    model = onnx.load(source)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "GatedRmsNorm" and attribute.name == "eps":
                attribute.f = 0.1875
    onnx.save(model, source)
    lowered_for_hopper(source, tmp_path)
    (product,) = (
        n for n in onnx.load(tmp_path / "launcher.onnx").graph.node
        if n.name.endswith("/linear") and len(n.input) == 3
    )
    assert "0f3E400000" in attributes(product)["ptx"]  # 0.1875


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["utrc-half-untied", "utrc-sites-open"])
def test_padding_after_sites(lowered, name, form):
    """What links says it: of the graph's own nodes those are left that say where the prompt and
    the kept positions begin."""
    found = lowered(name)
    sites = found.case.layers - 1
    for file, more in ((found.source, sites), (getattr(found, form), 0)):
        kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
        assert (kinds["Sub"], kinds["Max"]) == (2 + more, 1 + more)


def another(index, number):
    """The padding after a site is computed with another number."""

    def change(graph):
        floor = find(graph, "Max")
        difference = next(n for n in graph.node if n.output[0] == floor.input[0])
        node = (difference, floor)[index]
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.int32), "number"))
        node.input[1] = "number"

    return change


def of_another(graph):
    """It is that of something else."""
    difference = next(n for n in graph.node if n.output[0] == find(graph, "Max").input[0])
    difference.input[0] = "prompt_len"


def read_before(graph):
    """A node before the site reads it too."""
    nodes = [n for n in graph.node if find(graph, "Max").input[0] in n.output]
    nodes.append(find(graph, "Max"))
    find(graph, "TokenSplit").input[1] = nodes[-1].output[0]
    for node in nodes:
        graph.node.remove(node)
    for node in reversed(nodes):
        graph.node.insert(1, node)


@pytest.mark.parametrize(
    "change", [another(0, 9), another(1, 1), of_another, read_before],
    ids=["other tokens", "another floor", "of another", "read before"],
)
def test_padding_that_stays_with_the_graph(tmp_path, change):
    """Where it is not what the kernel says, or is wanted earlier."""
    source = export(tmp_path, Case())
    model = onnx.load(source)
    change(model.graph)
    onnx.save(model, source)
    with compiling_once():
        lower(source, tmp_path / "kernels.onnx", "quick", SM)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "kernels.onnx").graph.node)
    assert (kinds["Sub"], kinds["Max"]) == (3, 2)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_norms_that_stay_with_the_match(tmp_path, index):
    """Where tokens come after the split, or it is not both of its halves that are matched."""
    source = export(tmp_path, Case())
    model = onnx.load(source)
    through(model.graph, find(model.graph, "TokenMatch"), index)
    onnx.save(model, source)
    with compiling_once():
        counts = lower(source, tmp_path / "kernels.onnx", "quick", SM)
    assert (counts["token_norm"], counts["token_split"], counts["token_split_norm"]) == (1, 1, 0)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_norms_that_stay_apart_from_their_site(tmp_path, form, index):
    """Where a merged branch is wanted as it is."""
    source = export(tmp_path, Case())
    model = onnx.load(source)
    handed_out("TokenReduce", index)(model.graph)
    onnx.save(model, source)
    with compiling_once():
        counts = lower(source, tmp_path / "kernels.onnx", form, SM)
    assert counts["token_reduce"] == 1 and counts["add_rms_norm"] == 2
    assert not counts["token_reduce_norm"]


def test_products_that_would_leave_the_range_of_float16(tmp_path):
    """The norm's weight and the product's are in range, what both make is not: they stay apart."""
    source = export(tmp_path, Case("none", dtype="float16", published=True))
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        value = {"model.layers.0.gate_norm_weight": 60000}.get(tensor.name)
        value = 2 if list(tensor.dims) == [512, 256] else value  # out_proj
        if value is not None:
            changed = np.full(tensor.dims, value, np.float16)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, source)
    found = lowered_for_hopper(source, tmp_path)["launcher"]
    assert not found["ssd_scan_hopper_gated"] and found["gated_rms_norm"] == 2


def check_launcher_fields(node, fields, call):
    """What the C++ plugin reads: this launch, and machine code for it."""
    assert node.op_type == "KernelLaunch" and fields["kernel"] == call.kernel.name
    assert fields["target"] == SM and f".target sm_{SM}" in fields["ptx"]
    assert f".entry {fields['entry']}(" in fields["ptx"]
    assert tuple(fields["grid"]) == call.grid
    assert fields["block"] % 32 == 0 and fields["shared"] >= 0 == fields["scratch"]
    given = [call.inputs[n] for n in call.kernel.inputs if n in call.inputs]
    assert fields["input_types"].split() == given and len(given) == len(node.input)
    assert [int(n) for n in fields["extras"].split()] == [
        call.extras[n] for n in call.kernel.extras
    ]
    made = [call.outputs[n] for n in call.kernel.outputs]
    assert fields["output_types"].split() == [spec.dtype for spec in made]
    dims = iter(fields.get("output_dims", ()))
    for rank, spec in zip(fields["output_ranks"], made, strict=True):
        assert tuple(next(dims) for _ in range(rank)) == spec.shape[1:]
    assert not list(dims)


def interface(path):
    """Inputs and outputs: name, dtype and shape, an open size by its name."""
    graph = onnx.load(path).graph
    return [
        (v.name, v.type.tensor_type.elem_type,
         [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim])
        for v in (*graph.input, *graph.output)
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_interface_and_opset(lowered, name, form):
    """Inputs and outputs as before, no functions, and nothing but standard ops and launches."""
    found = lowered(name)
    path = getattr(found, form)
    assert interface(path) == interface(found.source)
    assert all(
        isinstance(shape[0], str) == (found.case.max_batch > 1) for _, _, shape in interface(path)
    )
    model = onnx.load(path)
    opset = {"quick": 18, "launcher": 17}[form]
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, DOMAIN: 1}
    assert not model.functions
    onnx.checker.check_model(model)  # attributes and inputs of standard ops suit their opset
    names = {tensor.name for tensor in model.graph.initializer}
    assert names <= {edge for node in model.graph.node for edge in node.input}
    if form == "launcher":
        kinds = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
        assert kinds == {"KernelLaunch"}
        assert "Gemm" not in {node.op_type for node in model.graph.node}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            assert node.domain == "" and onnx.defs.get_schema(node.op_type, opset)
    assert [node.name for node, _ in kernel_nodes(ir.load(path))] == [
        node.name for node in model.graph.node if node.domain == DOMAIN
    ]


# --- values --------------------------------------------------------------------------------------


# Case, form, prompt lengths.
RUNS = [
    ("utrc-open-untied", "quick", (41, 17, 0)),
    ("utrc-open-untied", "launcher", (36, 41)),
    ("utrc", "launcher", (33,)),
    ("dense-long", "launcher", (250,)),
    ("evit-all-open", "quick", (12, 41)),
    ("pumer", "launcher", (40,)),
    ("utrc-sites-open", "launcher", (41, 30, 3)),
    ("utrc-sites-open", "quick", (36, 41)),
    ("utrc-long", "quick", (140,)),
]


@pytest.fixture(scope="module")
def computed(lowered, tmp_path_factory):
    """Run -> (what the lowered file computes, what ONNX Runtime makes of the exported one)."""
    jobs, expected = [], []
    random = np.random.default_rng(0)
    for name, form, lengths in RUNS:
        found = lowered(name)
        shape = (len(lengths), found.case.length)
        feeds = {
            "input_ids": random.integers(0, 61, shape, dtype=np.int32),
            "prompt_len": np.array(lengths, np.int32),
        }
        session = onnxruntime.InferenceSession(str(found.source))
        names = [output.name for output in session.get_outputs()]
        expected.append(dict(zip(names, session.run(None, feeds), strict=True)))
        jobs.append((getattr(found, form), found.quick, feeds))
    found = run_lowered(tmp_path_factory.mktemp("runs"), jobs)
    return dict(zip(RUNS, zip(found, expected, strict=True), strict=True))


def run_lowered(folder, runs):
    """What each (kernel-level file, "quick" file of the same graph, inputs) computes."""
    jobs = []
    for index, (file, quick, feeds) in enumerate(runs):
        np.savez(folder / f"feeds-{index}.npz", **feeds)
        jobs.append({
            "calls": str(quick), "feeds": str(folder / f"feeds-{index}.npz"),
            "file": str(file), "out": str(folder / f"{index}.npz"),
        })  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, WORKER, folder / "jobs.json"], env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(job["out"])) for job in jobs]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def test_lowered_graph_computes_the_same(computed, run):
    """All outputs of the exported file: choices exactly, values to float32."""
    found, expected = computed[run]
    assert list(found) == list(expected)
    sizes = {name: np.linalg.norm(value.astype(np.float64)) for name, value in expected.items()}
    assert sizes["logits"] > 1 and sizes["present.ssm_state.1"] > 1
    for name, value in expected.items():
        assert_same(name, found[name], value)


def test_split_by_search(tmp_path, monkeypatch):
    """What splits where sequences are many or long leaves the same norms and halves."""
    from tokred_plugins.token_split import kernel

    monkeypatch.setattr(kernel, "MOST_PAIRS", 0)
    source = export(tmp_path, Case())
    with compiling_once():
        counts = lower(source, tmp_path / "quick.onnx", "quick", SM)
    assert (counts["token_split_search_norm"], counts["token_norm"]) == (1, 0)
    feeds = {
        "input_ids": np.random.default_rng(3).integers(0, 61, (1, 41), dtype=np.int32),
        "prompt_len": np.array([37], np.int32),
    }
    (found,) = run_lowered(tmp_path, [(tmp_path / "quick.onnx", tmp_path / "quick.onnx", feeds)])
    session = onnxruntime.InferenceSession(str(source))
    for output, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        assert_same(output.name, found[output.name], value)


def assert_same(name, found, expected):
    """Integers exactly, floats to float32."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    if expected.dtype != np.float32:
        np.testing.assert_array_equal(found, expected, err_msg=name)
    else:
        size = max(float(np.linalg.norm(expected)), 1e-6)
        assert np.linalg.norm(found - expected) / size < 1e-4, name


# --- code and weights ----------------------------------------------------------------------------


def test_equal_kernels_are_compiled_once(lowered, tmp_path, monkeypatch):
    """Layers share their kernels' code; nodes of equal code carry the same."""
    found, asked = lowered("utrc"), []
    compile_call = aot.compile_call
    monkeypatch.setattr(
        aot, "compile_call", lambda call, sm: asked.append(call) or compile_call(call, sm)
    )
    lower(found.source, tmp_path / "again.onnx", "launcher", SM)
    keys = [aot.compile_key(call) for call in asked]
    assert len(keys) == len(set(keys))
    quick, launcher = (
        [attributes(node) for node in onnx.load(path).graph.node if node.domain == DOMAIN]
        for path in (found.quick, tmp_path / "again.onnx")
    )
    launcher = [fields for fields in launcher if not fields["kernel"].startswith("linear")]
    keys = [key for key in keys if "linear" not in key.split(",")[0]]
    codes = {}
    for wanted, fields in zip(quick, launcher, strict=True):
        key = aot.compile_key(call_from_json(wanted["call"]))
        codes.setdefault(key, set()).add(fields["ptx"])
    assert codes.keys() == set(keys) and len(keys) < len(quick)
    assert {len(texts) for texts in codes.values()} == {1}


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An exported file with its weights beside it."""
    monkeypatch.setattr(emit, "EXTERNAL_ABOVE", 1000)
    (tmp_path / "large").mkdir()
    return export(tmp_path / "large", Case("none"))


def weights(path):
    """Where every large initializer's value lies: offset and length in the external file."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    found = {t.name: {e.key: e.value for e in t.external_data} for t in tensors}
    return {name: place for name, place in found.items() if place}


def assert_weights_kept(path, source):
    """The weights of ``source`` lie where they lay, in the file of the same name."""
    kept = weights(source)
    assert kept.keys() >= {"model.embedding.weight", "model.layers.0.conv_weight"}
    assert weights(path) == {name: kept[name] for name in weights(path)}
    assert {name for name in kept if name.startswith("model.")} <= weights(path).keys()


def test_large_weights_are_linked(tmp_path, large):
    """Gigabytes are not copied, and the source can be read meanwhile; a second time is fine."""
    target = tmp_path / "lowered" / "kernels.onnx"
    target.parent.mkdir()
    for _ in range(2):
        lower(large, target, "quick", SM)
        data = target.with_name("graph.onnx.data")
        assert data.is_symlink() and data.samefile(large.with_name("graph.onnx.data"))
        assert sorted(p.name for p in target.parent.iterdir()) == ["graph.onnx.data", target.name]
    assert_weights_kept(target, large)
    onnx.checker.check_model(str(large), full_check=True)


def test_weights_of_products_are_turned(tmp_path, large):
    """The launcher's products read [N, K]: written anew, others as they were."""
    target = tmp_path / "lowered" / "kernels.onnx"
    target.parent.mkdir()
    for _ in range(2):
        lower(large, target, "launcher", SM)
        written = sorted(p.name for p in target.parent.iterdir())
        assert written == [target.name, f"{target.name}.data"]
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (large, target)
    )
    products = [
        node.input[1] for node in onnx.load(target, load_external_data=False).graph.node
        if node.name.endswith(("/linear", "/linear_few"))
    ]
    turned = {name for name in products if name.endswith(".turned")}
    assert len(turned) == len(products) - 1  # the head multiplies with the embedding as it is
    for name in turned:
        np.testing.assert_array_equal(after[name], before[name.removesuffix(".turned")].T)
        assert name.removesuffix(".turned") not in after
    for name in after.keys() & before.keys():
        np.testing.assert_array_equal(after[name], before[name])
    assert len(after.keys() & before.keys()) > 5


def test_large_weights_beside_the_source(large):
    """A target in the source's own folder leaves the source as it is."""
    data = large.with_name("graph.onnx.data")
    before = large.read_bytes(), data.read_bytes()
    lower(large, large.with_name("kernels.onnx"), "quick", SM)
    assert_weights_kept(large.with_name("kernels.onnx"), large)
    assert not data.is_symlink() and (large.read_bytes(), data.read_bytes()) == before


def test_large_weights_where_no_link_can_be_made(tmp_path, large, monkeypatch):
    """Then they are copied, over what an earlier export may have left."""

    def refuse(link, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    target = tmp_path / "lowered" / "kernels.onnx"
    target.parent.mkdir()
    target.with_name("graph.onnx.data").write_bytes(b"of an earlier export")
    lower(large, target, "quick", SM)
    copy, data = (path.with_name("graph.onnx.data") for path in (target, large))
    assert not copy.samefile(data) and copy.read_bytes() == data.read_bytes()
    assert_weights_kept(target, large)


# --- what is refused -----------------------------------------------------------------------------


def test_ops_without_kernels(tmp_path):
    """A method whose ops have no kernels is refused by name, as a failed build."""
    source = export(tmp_path, Case("utrc-code"))
    said = r"tokred::Token\w+ has no GPU kernel.*--method"
    with pytest.raises(BuildFailed, match=said) as caught:
        lower(source, tmp_path / "kernels.onnx", "quick", SM)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "kernels.onnx").exists()


def test_unknown_gpu(lowered, tmp_path):
    """A compute capability that kernels cannot be compiled for is named."""
    with pytest.raises(BuildFailed, match=r"does not compile.*compute capability 7\.5"):
        lower(lowered("utrc").source, tmp_path / "kernels.onnx", "launcher", 75)


@pytest.mark.parametrize(
    ("error", "said"),
    [(aot.DoesNotFit("too much shared memory"), "too much"), (RuntimeError("scratch"), "scratch")],
)
def test_kernel_that_does_not_compile(lowered, tmp_path, monkeypatch, error, said):
    """The kernel is named, with the compiler's reason."""

    def fail(call, sm):
        raise error

    monkeypatch.setattr(aot, "compile_call", fail)
    with pytest.raises(BuildFailed, match=rf"embed_rms_norm does not compile: {said}"):
        lower(lowered("utrc").source, tmp_path / "kernels.onnx", "launcher", SM)


def test_without_triton(lowered, tmp_path, monkeypatch):
    """A machine without Triton is told what to install."""
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EnvironmentUnable, match="pip install triton"):
        lower(lowered("utrc").source, tmp_path / "kernels.onnx", "quick", SM)


@pytest.mark.parametrize("harm", ["no shape", "open length", "float64"])
def test_tensors_that_no_kernel_takes(lowered, tmp_path, harm):
    """A tensor of unknown shape or of another dtype is named with its node."""
    model = onnx.load(lowered("utrc").source)
    node = next(n for n in model.graph.node if n.op_type == "CausalConv1dSilu")
    value = next(v for v in model.graph.value_info if v.name == node.input[0])
    tensor = value.type.tensor_type
    if harm == "no shape":
        model.graph.value_info.remove(value)
    elif harm == "open length":
        tensor.shape.dim[1].dim_param = "length"
    else:
        tensor.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "graph.onnx")
    said = rf"input {node.input[0]} of {node.name} is .*export the model again"
    with pytest.raises(BuildFailed, match=said):
        lower(tmp_path / "graph.onnx", tmp_path / "kernels.onnx", "quick", SM)
