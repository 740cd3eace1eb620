"""What backends do to an ONNX file before they build from it: hash, inline, compare shapes.

Graphs are read without their external data, so that a model of many gigabytes costs no memory.
The data is copied beside a rewritten graph, not linked: readers refuse links of either kind as
a way to reach files elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, inliner, shape_inference

from tokred_export.disk import hash_file, resolve_inside
from tokred_export.errors import BuildFailed, InvalidRequest
from tokred_export.runtime.ort import open_session

Shape = tuple[int | str | None, ...]
Shapes = Mapping[str, Shape | None]  # None: not even the rank is known
STANDARD_DOMAINS = {"", "ai.onnx"}
_PLUGIN_ATTRIBUTES = {"plugin_namespace", "plugin_version", "aot"}


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data.

    Raises:
        InvalidRequest: there is no such file.
        BuildFailed: it is not an ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path} does not exist, expected an ONNX file") from error
    except DecodeError as error:
        raise BuildFailed(f"{path} is not an ONNX file ({error}): export it again") from error
    if not model.graph.node:
        raise BuildFailed(f"{path} holds no node, expected a graph: export it again")
    return model


def data_files(model: onnx.ModelProto) -> list[str]:
    """Names of the external data files that a graph refers to, relative to it."""
    tensors = [*model.graph.initializer]
    for node in walk_nodes(model.graph):
        tensors += [a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    return sorted(
        {
            external_data_helper.ExternalDataInfo(tensor).location
            for tensor in tensors
            if external_data_helper.uses_external_data(tensor)
        }
    )


def hash_sources(path: Path, model: onnx.ModelProto) -> dict[str, str]:
    """Hex sha256 by name of the ONNX file and of its external data.

    Raises:
        BuildFailed: an external data file is missing or lies outside the graph's folder.
    """
    for name in data_files(model):
        try:
            data = resolve_inside(path.parent, name)
        except ValueError as error:
            raise BuildFailed(f"{path.name} keeps weights elsewhere ({error}), expected them "
                              "beside it: export it again") from error
        if not data.is_file():
            raise BuildFailed(
                f"{path.name} keeps weights in {name}, which is not beside it: copy both files "
                "together, or export again"
            )
    names = [path.name, *data_files(model)]
    return {name: hash_file(path.parent / name).sha256 for name in names}


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
            for subgraph in (*inner, *attribute.graphs):
                yield from walk_nodes(subgraph)


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every call of a model-local function by its body; only standard ops remain.

    Raises:
        BuildFailed: a node of another domain is left, for it has no function body.
    """
    inlined = inliner.inline_local_functions(model)
    for node in walk_nodes(inlined.graph):
        if node.domain not in STANDARD_DOMAINS:
            raise BuildFailed(
                f"node {node.name or node.output[0]!r} is a {node.domain}::{node.op_type}, which "
                "has no function body in the file, expected standard ops only: export the op "
                "with its body"
            )
        keep = [a for a in node.attribute if a.name not in _PLUGIN_ATTRIBUTES]
        if len(keep) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(keep)
    standard = [entry for entry in inlined.opset_import if entry.domain in STANDARD_DOMAINS]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    del inlined.functions[:]
    return inlined


def save_with_data(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Write a rewritten graph of ``source`` to ``target``, and its data unless it is there."""
    onnx.save(model, target)
    for name in data_files(model):
        copy = target.parent / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / name, copy)


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that declares shapes for its inputs only, so that all others must be inferred."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    return bare


def infer_shapes(path: Path) -> Shapes:
    """Output shapes by name as onnx infers them; ``path`` should declare none.

    Raises:
        BuildFailed: the graph contradicts itself.
    """
    inferred = path.with_name(f"inferred-{path.name}")
    try:
        shape_inference.infer_shapes_path(
            path, inferred, check_type=True, strict_mode=True, data_prop=True
        )
    except shape_inference.InferenceError as error:
        raise BuildFailed(f"shapes of {path.name} contradict each other: {error}") from error
    return declared_shapes(load_graph(inferred))


def ort_shapes(path: Path) -> Shapes:
    """Output shapes by name as ONNX Runtime infers them; ``path`` should declare none.

    Raises:
        EnvironmentUnable, BuildFailed: as `open_session`.
    """
    session = open_session(path, threads=1, level="none")
    # An empty shape is a scalar's or an unknown one's; ONNX Runtime does not say which.
    return {value.name: tuple(value.shape) or None for value in session.get_outputs()}


def declared_shapes(model: onnx.ModelProto) -> Shapes:
    """Output shapes by name as the file declares them."""
    return {value.name: _shape(value) for value in model.graph.output}


def fill_open_sizes(inferred: Shapes, declared: Shapes) -> Shapes:
    """``inferred``, with sizes that inference left open taken from ``declared``."""
    filled = {}
    for name, shape in inferred.items():
        other = declared.get(name)
        if shape is None or other is None or len(shape) != len(other):
            filled[name] = other if shape is None else shape
        else:
            filled[name] = tuple(a if _fixed(a) else b for a, b in zip(shape, other, strict=True))
    return filled


def compare_shapes(who: str, found: Shapes, whom: str, expected: Shapes) -> None:
    """Raise unless two sets of outputs agree in names, ranks and every fixed size.

    A size that either side leaves open (a name, None, or -1) fits anything, and so does an
    unknown shape (None).

    Raises:
        BuildFailed: names the first output that differs.
    """
    if found.keys() != expected.keys():
        raise BuildFailed(f"{who} sees the outputs {sorted(found)}, {whom} sees {sorted(expected)}")
    for name, shape in found.items():
        other = expected[name]
        if shape is None or other is None:
            continue
        pairs = zip(shape, other, strict=False)
        if len(shape) != len(other) or any(_fixed(a) and _fixed(b) and a != b for a, b in pairs):
            raise BuildFailed(
                f"{who} gives output {name} the shape {list(shape)}, {whom} gives it "
                f"{list(other)}: the file means different things to them; export it again"
            )


def _fixed(size: int | str | None) -> bool:
    return isinstance(size, int) and size >= 0


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    dim = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dim)
