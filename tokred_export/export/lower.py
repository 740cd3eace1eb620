"""From custom ops to kernels: what a TensorRT that runs our plugins is given.

A node of a custom op becomes one node a kernel launch, because a TensorRT plugin is one kernel.
Two forms of the same graph come out:

    quick      TensorRT >= 10.15: nodes ``tokred::<kernel>`` whose attribute ``call`` says all
               that the kernel's quick plugin needs to compile it inside the build
    launcher   TensorRT 8.6 to 10.14: nodes ``tokred::KernelLaunch`` that carry the PTX itself
               for the C++ plugin in ``plugins/launcher``, and opset 17

No function bodies are left: a TensorRT that lacks the plugin refuses the file instead of
quietly running something slower.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
from onnx_ir.passes import common as passes
from tokred_plugins.body import DOMAIN, PLUGIN_ATTRIBUTES, VERSION
from tokred_plugins.kernel_faces import FACES, ONNX_NAMES
from tokred_plugins.kernels import Call, Spec

from tokred_export.errors import BuildFailed, EnvironmentUnable
from tokred_export.export.opset17 import to_opset_17

if TYPE_CHECKING:
    from tokred_plugins.aot import Compiled

Form = Literal["quick", "launcher"]
LAUNCH = "KernelLaunch"

_DTYPES = {
    ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT32: "i32", ir.DataType.BOOL: "i1",
}
_IR_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

WriteNode = Callable[[Call, list[ir.Value], list[ir.Value]], ir.Node]


def lower(source: Path, target: Path, form: Form, sm: int, batch: int = 1) -> Counter[str]:
    """Write the kernel-level form of an exported ONNX file.

    Args:
        source: a file of this tool's export, custom ops as nodes.
        target: the file to write; weights go beside it as ``<name>.data``, or under the name
            they have beside the source.
        form: see above.
        sm: compute capability times ten that the PTX is for ("launcher"), and that block sizes
            are fitted to.
        batch: that splits over the GPU are decided for, where the graph's batch is open.

    Returns:
        How many nodes of each kernel the file holds.

    Raises:
        BuildFailed: an op without kernels, an unknown shape or dtype, or a kernel that cannot
            be compiled for ``sm``.
        EnvironmentUnable: Triton is not installed.
    """
    _require_triton()
    model = ir.load(source)
    counts: Counter[str] = Counter()
    write = _quick_node if form == "quick" else _Launcher(sm)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            counts.update(call.kernel.name for call in _replace(model.graph, node, write, batch))
    model.functions.clear()
    if form == "launcher":
        _stand_alone_head(model)
        to_opset_17(model)
    passes.RemoveUnusedNodesPass()(model)
    _save(model, source, target)
    return counts


def _save(model: ir.Model, source: Path, target: Path) -> None:
    """Write the graph; weights beside the source are linked, not copied, where that is possible.

    Large ones are gigabytes, and only TensorRT's own parser reads this file, which takes links.
    A symbolic one: readers of ONNX files refuse data with more than one hard link, and the source
    would have two for as long as this file lives.
    """
    data = source.with_name(f"{source.name}.data")
    if not data.is_file():
        ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)
        return
    beside = target.with_name(data.name)
    if not (beside.exists() and beside.samefile(data)):
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(data.resolve())
        except OSError:  # a file system without links
            shutil.copyfile(data, beside)
    ir.save(model, target)


def _stand_alone_head(model: ir.Model) -> None:
    """Make a Gemm of one token a row a product of three dimensions, like all other products.

    TensorRT 8.6 fuses a Gemm with whatever stands near it into a region of its own making, whose
    products accumulate in float16; a product between plugins stays a layer, with a choice of
    tactics (see tensorrt_tactics).
    """
    for node in list(model.graph):
        if node.domain or node.op_type != "Gemm" or len(node.inputs) != 2:
            continue
        plain = all(
            name not in node.attributes or node.attributes[name].value == value
            for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        )
        taken = node.inputs[0].producer()
        if not plain or taken is None or taken.op_type != "Gather":
            continue
        tokens = taken.inputs[0]  # [B, 1, D], the last token alone
        axis = taken.attributes["axis"].value if "axis" in taken.attributes else 0
        if tokens.shape is None or len(tokens.shape) != 3 or axis != 1 or tokens.shape[1] != 1:
            continue
        _replace_head(model.graph, node, tokens)


def _replace_head(graph: ir.Graph, gemm: ir.Node, tokens: ir.Value) -> None:
    out = gemm.outputs[0]
    made = []
    weight = gemm.inputs[1]
    if "transB" in gemm.attributes and gemm.attributes["transB"].value:
        turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{gemm.name}/transpose")
        weight = turn.outputs[0]
        made.append(turn)
    product = ir.node("MatMul", [tokens, weight], name=gemm.name)
    axis = ir.Value(name=f"{gemm.name}/axis", const_value=ir.tensor([1], dtype=ir.DataType.INT64))
    axis.shape, axis.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    graph.register_initializer(axis)
    flat = ir.node("Squeeze", [product.outputs[0], axis], name=f"{gemm.name}/squeeze")
    for node in (*made, product, flat):
        value = node.outputs[0]
        value.name, value.type = f"{node.name}/out", out.type
    flat.outputs[0].shape = out.shape
    product.outputs[0].shape = ir.Shape([out.shape[0], 1, out.shape[1]])
    ir.convenience.replace_nodes_and_values(
        graph, gemm, [gemm], [*made, product, flat], [out], [flat.outputs[0]]
    )


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise EnvironmentUnable(
            "Triton is not installed, and TensorRT's plugins are Triton kernels: "
            "pip install triton (x86-64 Linux)"
        ) from error


def _replace(
    graph: ir.Graph, node: ir.Node, write: WriteNode, batch: int
) -> tuple[Call, ...]:
    """Put the launches of one custom-op node in its place."""
    name = ONNX_NAMES.get(node.op_type)
    if name is None:
        raise BuildFailed(
            f"{DOMAIN}::{node.op_type} has no GPU kernel, expected one of {', '.join(ONNX_NAMES)}: "
            "build with another --method, or for another backend"
        )
    face = FACES[name]
    tensors = {n: v for n, v in zip(face.inputs, node.inputs, strict=False) if v is not None}
    specs = {n: _spec(node, v, batch) for n, v in tensors.items()}
    attributes = {n: a.value for n, a in node.attributes.items()}
    try:
        calls = face.calls(specs, attributes)
    except ValueError as error:
        raise BuildFailed(f"no kernel for node {node.name}: {error}") from error
    values: dict[str, ir.Value] = dict(tensors)
    made = []
    for index, call in enumerate(calls):
        outputs = [
            _value(f"{node.name}/{index}/{n}", spec, node) for n, spec in call.outputs.items()
        ]
        now = write(call, [values[n] for n in call.inputs], outputs)
        now.name = f"{node.name}/{index}/{call.kernel.name}"
        values |= dict(zip(call.outputs, outputs, strict=True))
        made.append(now)
    results = [values[n] for n in face.results]
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], made, list(node.outputs), results
    )
    return calls


def _spec(node: ir.Node, value: ir.Value, batch: int) -> Spec:
    known = value.shape is not None and all(isinstance(d, int) for d in value.shape[1:])
    if not known or value.dtype not in _DTYPES:
        raise BuildFailed(
            f"input {value.name} of {node.name} is {value.dtype} of shape {value.shape}, expected "
            "a shape that is known but for the batch, of float32, float16, bfloat16, int32 or "
            "bool: export the model again"
        )
    return Spec(
        tuple(d if isinstance(d, int) else batch for d in value.shape), _DTYPES[value.dtype]
    )


def _value(name: str, spec: Spec, node: ir.Node) -> ir.Value:
    """An output of a launch; its batch is that of the op's first input."""
    batch = node.inputs[0].shape[0]
    return ir.Value(
        name=name, shape=ir.Shape([batch, *spec.shape[1:]]), type=ir.TensorType(
            _IR_DTYPES[spec.dtype]
        ),
    )


def _quick_node(call: Call, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Node:
    from tokred_plugins.registry import call_to_json, variant_name

    attributes = {**PLUGIN_ATTRIBUTES, "call": call_to_json(call)}
    return ir.node(
        variant_name(call), inputs, attributes, domain=DOMAIN, version=VERSION, outputs=outputs
    )


class _Launcher:
    """Writes nodes with PTX inside; equal kernels are compiled once."""

    def __init__(self, sm: int) -> None:
        self._sm = sm
        self._compiled: dict[str, Compiled] = {}

    def __call__(self, call: Call, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Node:
        return ir.node(
            LAUNCH, inputs, launch_attributes(self._compile(call), call), domain=DOMAIN,
            version=VERSION, outputs=outputs,
        )

    def _compile(self, call: Call) -> Compiled:
        from tokred_plugins.aot import compile_call, compile_key

        key = compile_key(call)
        if key not in self._compiled:
            try:
                self._compiled[key] = compile_call(call, self._sm)
            except (ValueError, RuntimeError) as error:
                raise BuildFailed(f"the kernel {call.kernel.name} does not compile: {error}"
                                  ) from error
        return self._compiled[key]


def launch_attributes(compiled: Compiled, call: Call) -> dict[str, str | int | list[int]]:
    """The launcher plugin's fields: the kernel description, flat; see plugins/launcher/README.md.

    Args:
        compiled: of an equal call up to extras, grid and lengths.
        call: this one.
    """
    shapes = [spec.shape[1:] for spec in call.outputs.values()]
    return {
        "plugin_namespace": DOMAIN,
        "plugin_version": "1",
        "kernel": compiled.name,
        "target": compiled.target,
        "ptx": compiled.ptx,
        "entry": compiled.entry,
        "grid": list(call.grid),
        "block": compiled.block,
        "shared": compiled.shared,
        "input_types": " ".join(call.inputs.values()),
        "extras": " ".join(str(call.extras[name]) for name in call.kernel.extras),
        "output_types": " ".join(spec.dtype for spec in call.outputs.values()),
        "output_ranks": [len(shape) for shape in shapes],
        "output_dims": [n for shape in shapes for n in shape],
    }


def kernel_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, Mapping[str, object]]]:
    """Nodes of a lowered file and their attributes."""
    for node in model.graph:
        if node.domain == DOMAIN:
            yield node, {name: attribute.value for name, attribute in node.attributes.items()}
