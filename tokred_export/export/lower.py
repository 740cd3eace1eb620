"""From custom ops to kernels: what a TensorRT that runs our plugins is given.

A node of a custom op becomes one node a kernel launch, because a TensorRT plugin is one kernel.
Two forms of the same graph come out:

    quick      TensorRT >= 10.15: nodes ``tokred::<kernel>`` whose attribute ``call`` says all
               that the kernel's quick plugin needs to compile it inside the build
    launcher   TensorRT 8.6 to 10.14: nodes ``tokred::KernelLaunch`` that carry the PTX itself
               for the C++ plugin in ``plugins/launcher``, opset 17, and products with constants
               as kernels too. Where a scan's kernel can gate, a gated norm between it and a
               product is no kernel: the product divides by the root mean square of what the scan
               has gated, and its constant holds the norm's weight. Importance that is asked for
               of the scan's y is then that of its heads' means

In both the norm after a reduction site is part of the kernel that merges, the padding that is left
after it is said by the kernel that links, and norms of tokens are computed beside the split of a
sequence, which leaves most of the GPU idle.

No function bodies are left: a TensorRT that lacks the plugin refuses the file instead of
quietly running something slower.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
from onnx_ir.passes import common as passes
from tokred_plugins.kernel_faces import FACES, LINEAR, ONNX_NAMES
from tokred_plugins.kernels import Call, Spec
from tokred_plugins.names import DOMAIN, PLUGIN_ATTRIBUTES, VERSION

from tokred_export.errors import BuildFailed, EnvironmentUnable
from tokred_export.export.neighbours import Join, Neighbours, find_neighbours
from tokred_export.export.opset17 import to_opset_17
from tokred_export.export.products import find_product, turned

if TYPE_CHECKING:
    from tokred_plugins.aot import Compiled

Form = Literal["quick", "launcher"]
LAUNCH = "KernelLaunch"

_DTYPES = {
    ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT32: "i32", ir.DataType.BOOL: "i1",
}
_IR_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

Tune = Callable[[Call], Call]
WriteNode = Callable[[Call, list[ir.Value], list[ir.Value]], ir.Node]


def lower(
    source: Path, target: Path, form: Form, sm: int, batch: int = 1, tune: Tune | None = None,
    multiprocessors: int | None = None, descriptors: bool = False,
) -> Counter[str]:
    """Write the kernel-level form of an exported ONNX file.

    Args:
        source: a file of this tool's export, custom ops as nodes.
        target: the file to write. Weights go beside it as ``<name>.data``; for "quick" they are
            linked under the name they have beside the source, if they lie there.
        form: see above.
        sm: compute capability times ten that the PTX is for ("launcher"), and that block sizes
            are fitted to.
        batch: that splits over the GPU are decided for, where the graph's batch is open.
        tune: gives a call with its best tactic ("launcher"); None takes each kernel's default,
            or the first tactic that fits the GPU.
        multiprocessors: how many the GPU has, for splits over it; None for a large one.
        descriptors: the driver reads the PTX of kernels that make tensor descriptors in scratch
            memory ("launcher"); those that are ``tune``'s to choose do not depend on it.

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
    write = _quick_node if form == "quick" else _Launcher(sm, tune)
    gpu = {"target": sm, "scratch": descriptors and form == "launcher"}
    gpu |= {"multiprocessors": multiprocessors} if multiprocessors else {}
    # In the quick form products are TensorRT's.
    beside = find_neighbours(model.graph, products=form == "launcher")
    done = {*beside.scored.values(), *beside.norms.values()}
    scales, inverse = {}, {}
    for node in list(model.graph):
        if node.domain != DOMAIN or node in done:
            continue
        along = _along(node, beside, inverse.get(node))
        calls, values = _replace(model.graph, node, write, batch, gpu, along)
        counts.update(call.kernel.name for call in calls)
        if "gated" in values:
            done.add(along.norm)
            done.discard(along.scores)
            join = beside.joins[node]
            scales[join.product] = values["squares"], join
        if node in beside.matches:
            inverse[beside.matches[node]] = values["inverse"]
    model.functions.clear()
    if form == "launcher":
        for node in list(model.graph):
            calls = _replace_product(model.graph, node, write, batch, *scales.get(node, ()))
            counts.update(call.kernel.name for call in calls)
        to_opset_17(model)
    passes.RemoveUnusedNodesPass()(model)
    data = source.with_name(f"{source.name}.data")
    if form == "quick" and data.is_file():
        _link(data, target.with_name(data.name))
        ir.save(model, target)
    else:
        name = f"{target.name}.data"
        ir.save(model, target, external_data=name, size_threshold_bytes=1024)
    return counts


def _link(data: Path, beside: Path) -> None:
    """Weights stay where they are, and are linked, not copied, where that is possible.

    Large ones are gigabytes, and only TensorRT's own parser reads this file, which takes links.
    A symbolic one: readers of ONNX files refuse data with more than one hard link, and the source
    would have two for as long as this file lives.
    """
    if not (beside.exists() and beside.samefile(data)):
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(data.resolve())
        except OSError:  # a file system without links
            shutil.copyfile(data, beside)


def _replace_product(
    graph: ir.Graph, node: ir.Node, write: WriteNode, batch: int,
    squares: ir.Value | None = None, join: Join | None = None,
) -> tuple[Call, ...]:
    """Put a kernel in the place of a product with a constant; other nodes stay as they are.

    TensorRT 8's own 16-bit products sum in float16 (see the op's README.md). With ``squares``, sums
    of squares of the rows of x, it also does what is left of the norm of ``join``.
    """
    found = find_product(node)
    if found is None:
        return ()
    x, weight, attributes = found
    if not attributes["turned"]:
        by = None if join is None else join.weight
        weight, attributes = turned(graph, weight, by), {**attributes, "turned": True}
    inputs = {"x": x, "weight": weight}
    if join is not None:
        inputs["squares"], attributes = squares, {**attributes, "eps": join.eps}
    (call,) = LINEAR.calls({n: _spec(node, v, batch) for n, v in inputs.items()}, attributes)
    (spec,) = call.outputs.values()
    made = write(call, list(inputs.values()), [_value(f"{node.name}/0/y", spec, node)])
    made.name = f"{node.name}/0/{call.kernel.name}"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [made], list(node.outputs), list(made.outputs)
    )
    return (call,)


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise EnvironmentUnable(
            "Triton is not installed, and TensorRT's plugins are Triton kernels: "
            "pip install triton (Linux)"
        ) from error


@dataclass(frozen=True)
class _Along:
    """What the launches of one node have to do with others.

    Attributes:
        scores: the TokenImportance node that a GatedRmsNorm's kernel does along, or that a scan's
            can prepare if it does the gate.
        norm: the norm after it: its kernel does the gate of a GatedRmsNorm if it can, or all of an
            AddRmsNorm.
        left: what a TokenLink's kernel says along of the padding.
        tensors: that the launches take besides the node's own, by name.
    """

    scores: ir.Node | None
    norm: ir.Node | None
    left: ir.Value | None
    tensors: Mapping[str, ir.Value]


def _along(node: ir.Node, beside: Neighbours, inverse: ir.Value | None) -> _Along:
    """Of one node; ``inverse`` are norms that another node's launches have left for it."""
    join, match = beside.joins.get(node), beside.matches.get(node)
    tensors = {} if match is None else {"hidden": match.inputs[0]}
    if inverse is not None:
        tensors["inverse"] = inverse
    return _Along(
        scores=beside.scored.get(node if join is None else join.norm),
        norm=beside.norms.get(node) if join is None else join.norm,
        left=beside.left.get(node),
        tensors=tensors,
    )


def _replace(
    graph: ir.Graph, node: ir.Node, write: WriteNode, batch: int, gpu: Mapping[str, int],
    along: _Along,
) -> tuple[tuple[Call, ...], dict[str, ir.Value]]:
    """Put the launches of one custom-op node in its place.

    Args:
        graph: is changed.
        node: a custom op.
        write: makes the node of one launch.
        batch: where the graph's is open.
        gpu: what faces know of it.
        along: what its launches do besides.

    Returns:
        The launches, and every tensor of them by name.
    """
    name = ONNX_NAMES.get(node.op_type)
    if name is None:
        raise BuildFailed(
            f"{DOMAIN}::{node.op_type} has no GPU kernel, expected one of {', '.join(ONNX_NAMES)}: "
            "build with another --method, or for another backend"
        )
    face = FACES[name]
    tensors = {n: v for n, v in zip(face.inputs, node.inputs, strict=False) if v is not None}
    tensors |= along.tensors
    scores, norm = along.scores, along.norm
    specs = {n: _spec(node, v, batch) for n, v in tensors.items()}
    attributes = {n: a.value for n, a in node.attributes.items()} | gpu
    gates = norm is not None and norm.op_type == "GatedRmsNorm"
    if scores is not None:
        attributes["scored" if gates else "scores"] = True
    whole = norm is not None and norm.op_type == "AddRmsNorm"
    if whole:
        tensors["weight"], attributes["eps"] = norm.inputs[2], norm.attributes["eps"].value
        specs["weight"] = _spec(norm, tensors["weight"], batch)
    elif gates:
        attributes["gated"] = True
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
    old, outputs = [node], list(node.outputs)
    if whole:
        old, outputs, values["hidden_out"] = [node, norm], list(norm.outputs), values["normed"]
    elif "gated" in values:  # in the place of y, which only the norm would read
        old, outputs, values["y"] = [node, norm], [*norm.outputs, *outputs[1:]], values["gated"]
        if scores is not None:  # the mean over heads of what is a mean over a head
            scores.replace_input_with(0, values["relus"])
    results = [values[n] for n in face.results]
    if scores is not None and not gates:
        results.append(values["scores"])
        old.append(scores)
        outputs += scores.outputs
    if along.left is not None:
        results.append(values["left"])
        old.append(along.left.producer())
        outputs.append(along.left)
    ir.convenience.replace_nodes_and_values(graph, node, old, made, outputs, results)
    return calls, values


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

    def __init__(self, sm: int, tune: Tune | None) -> None:
        self._sm, self._tune = sm, tune
        self._compiled: dict[str, Compiled] = {}

    def __call__(self, call: Call, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Node:
        call = self._tune(call) if self._tune is not None else call
        compiled, call = self._compile(call)
        return ir.node(
            LAUNCH, inputs, launch_attributes(compiled, call), domain=DOMAIN, version=VERSION,
            outputs=outputs,
        )

    def _compile(self, call: Call) -> tuple[Compiled, Call]:
        from tokred_plugins.aot import DoesNotFit, compile_call, compile_key
        from tokred_plugins.retune import candidates

        failure: Exception | None = None
        for candidate in candidates(call):  # the call's own tactic first
            key = compile_key(candidate)
            try:
                if key not in self._compiled:
                    self._compiled[key] = compile_call(candidate, self._sm)
                return self._compiled[key], candidate
            except DoesNotFit as error:  # a smaller GPU may take a smaller tactic
                failure = failure or error
            except (ValueError, RuntimeError) as error:
                failure = error
                break
        raise BuildFailed(
            f"the kernel {call.kernel.name} does not compile: {failure}"
        ) from failure


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
        "scratch": compiled.scratch,
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
