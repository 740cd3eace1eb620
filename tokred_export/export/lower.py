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
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from tokred_plugins.kernel_faces import FACES, LINEAR, ONNX_NAMES
from tokred_plugins.kernels import Call, Spec
from tokred_plugins.names import DOMAIN, PLUGIN_ATTRIBUTES, VERSION

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
    scored = _scored_norms(model.graph)
    gpu = {"target": sm, "scratch": descriptors and form == "launcher"}
    gpu |= {"multiprocessors": multiprocessors} if multiprocessors else {}
    # Elsewhere products are TensorRT's.
    joins = _joins(model.graph, scored) if form == "launcher" else {}
    after_sites = _norms_after_sites(model.graph)
    left, matches = _pads_after_sites(model.graph), _matches(model.graph)
    more = {split: {"hidden": match.inputs[0]} for split, match in matches.items()}
    norms = after_sites | {scan: join.norm for scan, join in joins.items()}
    done, scales = {*scored.values(), *after_sites.values()}, {}
    for node in list(model.graph):
        if node.domain != DOMAIN or node in done:
            continue
        join, norm = joins.get(node), norms.get(node)
        scores = scored.get(node if join is None else norm)
        calls, values = _replace(
            model.graph, node, write, batch, gpu, scores, norm, left.get(node), more.get(node, {})
        )
        counts.update(call.kernel.name for call in calls)
        if "gated" in values:
            done.add(norm)
            done.discard(scores)
            scales[join.product] = values["squares"], join
        if node in matches:
            more[matches[node]] = {"inverse": values["inverse"]}
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


def _scored_norms(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Gated norms whose kernel can leave the importance of its ``y`` too -> that other node.

    The norm has every row of ``y`` at hand, so that no kernel need read it again.
    """
    found = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type != "TokenImportance":
            continue
        for use in node.inputs[0].uses():
            norm = use.node
            if norm.domain != DOMAIN or norm.op_type != "GatedRmsNorm" or use.idx != 0:
                continue
            if norm.attributes["group_size"].value == norm.attributes["inner"].value:
                found[norm] = node
    return found


class _Join(NamedTuple):
    """A gated norm between a scan and a product.

    Attributes:
        norm: its node.
        product: the node of the product.
        weight: of the norm.
        eps: of the norm.
    """

    norm: ir.Node
    product: ir.Node
    weight: ir.Value
    eps: float


def _joins(graph: ir.Graph, scored: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, _Join]:
    """Scans that may gate what they write -> the gated norm of which that is the first half.

    Where nothing but importance reads y too, nothing else what the norm gives, and the norm is one
    over the whole row, of what is gated already: then it is a number a row, which the product can
    apply to its sums, if its constant can take the norm's weight in.
    """
    from tokred_plugins.linear.kernel import FEW

    found = {}
    for norm in graph:
        if norm.domain != DOMAIN or norm.op_type != "GatedRmsNorm":
            continue
        said = {name: attribute.value for name, attribute in norm.attributes.items()}
        scan, product = norm.inputs[0].producer(), _only_reader(graph, norm.outputs[0])
        if (
            said["group_size"] == said["inner"] and not said["norm_before_gate"]
            and scan is not None and ONNX_NAMES.get(scan.op_type) == "ssd_scan"
            and scan.inputs[1] is norm.inputs[1] and norm.inputs[0] not in graph.outputs
            and {u.node for u in norm.inputs[0].uses()} <= {norm, scored.get(norm)}
            and product is not None and product.op_type == "MatMul" and _product(product)
            and norm.inputs[2].const_value is not None
            and _in_range(product.inputs[1], norm.inputs[2])
            and _tokens(norm.outputs[0]) > FEW  # for a few tokens there is another kernel
        ):
            found[scan] = _Join(norm, product, norm.inputs[2], said["eps"])
    return found


def _in_range(weight: ir.Value, by: ir.Value) -> bool:
    """Whether a constant times another is sure to stay in the range of its type."""
    if weight.dtype != ir.DataType.FLOAT16:
        return True
    largest = [float(np.abs(v.const_value.numpy().astype(np.float32)).max()) for v in (weight, by)]
    return largest[0] * largest[1] <= float(np.finfo(np.float16).max)


def _tokens(value: ir.Value) -> int:
    """Of each sequence; 0 where that is open, which :func:`_spec` refuses."""
    tokens = 0 if value.shape is None else value.shape[1]
    return tokens if isinstance(tokens, int) else 0


def _norms_after_sites(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """TokenReduce nodes -> the norm that alone reads what they give: their kernel does it along."""
    found = {}
    for norm in graph:
        site = norm.inputs[0].producer() if norm.op_type == "AddRmsNorm" else None
        if site is not None and site.op_type == "TokenReduce" and all(
            value is out and _only_reader(graph, out) is norm
            for value, out in zip(norm.inputs[:2], site.outputs, strict=True)
        ):
            found[site] = norm
    return found


def _pads_after_sites(graph: ir.Graph) -> dict[ir.Node, ir.Value]:
    """TokenLink nodes -> how much padding is left after their site: their kernel says it along,
    where TensorRT would launch a kernel for the difference and another for the maximum."""
    place = {node: i for i, node in enumerate(graph)}
    left = {}
    for node in graph:
        first, taken = _difference(node.outputs[0])
        if taken:
            left[first, taken] = node.outputs[0]
    found = {}
    for link in graph:
        if link.domain == DOMAIN and link.op_type == "TokenLink":
            first, taken = _difference(link.inputs[4])
            value = left.get((first, taken + link.attributes["removed"].value))
            if value is not None and all(place[u.node] > place[link] for u in value.uses()):
                found[link] = value
    return found


def _matches(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """TokenSplit nodes -> the TokenMatch of both halves, where its tokens are there before."""
    place = {node: i for i, node in enumerate(graph)}
    found = {}
    for match in graph:
        if match.domain != DOMAIN or match.op_type != "TokenMatch":
            continue
        split, made = match.inputs[1].producer(), match.inputs[0].producer()
        if (
            split is not None and split.op_type == "TokenSplit"
            and list(match.inputs[1:3]) == list(split.outputs)
            and (made is None or place[made] < place[split])
        ):
            found[split] = match
    return found


def _difference(value: ir.Value) -> tuple[ir.Value, int]:
    """x and n, if the value is max(x - n, 0); else itself and 0."""
    whole = value.producer()
    part = whole.inputs[0].producer() if whole is not None and whole.op_type == "Max" else None
    if part is None or part.op_type != "Sub" or len(whole.inputs) != 2:
        return value, 0
    floor, taken = (node.inputs[1].const_value for node in (whole, part))
    if any(c is None or c.size != 1 or c.numpy().dtype != np.int32 for c in (floor, taken)):
        return value, 0
    return (part.inputs[0], taken.numpy().item()) if not floor.numpy().any() else (value, 0)


def _only_reader(graph: ir.Graph, value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, if nothing else does."""
    uses = [use.node for use in value.uses()]
    return uses[0] if len(uses) == 1 and value not in graph.outputs else None


def _replace_product(
    graph: ir.Graph, node: ir.Node, write: WriteNode, batch: int,
    squares: ir.Value | None = None, join: _Join | None = None,
) -> tuple[Call, ...]:
    """Put a kernel in the place of a product with a constant; other nodes stay as they are.

    TensorRT 8's own 16-bit products sum in float16 (see the op's README.md). With ``squares``, sums
    of squares of the rows of x, it also does what is left of the norm of ``join``.
    """
    found = _product(node)
    if found is None:
        return ()
    x, weight, attributes = found
    if not attributes["turned"]:
        by = None if join is None else join.weight
        weight, attributes = _turned(graph, weight, by), {**attributes, "turned": True}
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


def _product(node: ir.Node) -> tuple[ir.Value, ir.Value, dict[str, bool]] | None:
    """x [B, L, K], the constant, and how it is stored, if the node is such a product."""
    if node.domain or len(node.inputs) != 2 or node.inputs[1].const_value is None:
        return None
    x, weight = node.inputs
    if node.op_type == "MatMul" and len(x.shape) == 3 and len(weight.shape) == 2:
        return x, weight, {"turned": False, "flat": False}
    taken = x.producer()
    if node.op_type != "Gemm" or taken is None or taken.op_type != "Gather":
        return None
    values = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    values |= {name: attribute.value for name, attribute in node.attributes.items()}
    tokens = taken.inputs[0]  # the last token of each row, alone
    axis = taken.attributes["axis"].value if "axis" in taken.attributes else 0
    plain = (values["alpha"], values["beta"], values["transA"]) == (1.0, 1.0, 0)
    if not plain or axis != 1 or len(tokens.shape) != 3 or tokens.shape[1] != 1:
        return None
    return tokens, weight, {"turned": bool(values["transB"]), "flat": True}


def _turned(graph: ir.Graph, weight: ir.Value, by: ir.Value | None = None) -> ir.Value:
    """The constant [K, N] as [N, K], made when it is written; columns times the numbers of ``by``.

    The kernel reads both operands along K then: see the op's README.md.
    """
    name, constant = f"{weight.name}.turned", weight.const_value
    if by is not None:
        name = f"{name}.{by.name}"
    if name not in graph.initializers:
        shape = ir.Shape(reversed(weight.shape))

        def turn() -> ir.Tensor:
            turned = np.ascontiguousarray(constant.numpy().T)
            if by is not None:
                wide = turned.astype(np.float32) * by.const_value.numpy().astype(np.float32)
                turned = wide.astype(turned.dtype)
            return ir.Tensor(turned, dtype=weight.dtype, shape=shape)

        graph.register_initializer(ir.Value(
            name=name, shape=shape, type=ir.TensorType(weight.dtype),
            const_value=ir.LazyTensor(turn, weight.dtype, shape, name=name),
        ))
    return graph.initializers[name]


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise EnvironmentUnable(
            "Triton is not installed, and TensorRT's plugins are Triton kernels: "
            "pip install triton (Linux)"
        ) from error


def _replace(
    graph: ir.Graph, node: ir.Node, write: WriteNode, batch: int, gpu: Mapping[str, int],
    scores: ir.Node | None, norm: ir.Node | None, left: ir.Value | None,
    more: Mapping[str, ir.Value],
) -> tuple[tuple[Call, ...], dict[str, ir.Value]]:
    """Put the launches of one custom-op node in its place.

    Args:
        graph: is changed.
        node: a custom op.
        write: makes the node of one launch.
        batch: where the graph's is open.
        gpu: what faces know of it.
        scores: the TokenImportance node that a GatedRmsNorm's kernel does along, or that a scan's
            can prepare if it does the gate.
        norm: the norm after it: its kernel does the gate of a GatedRmsNorm if it can, or all of an
            AddRmsNorm.
        left: what a TokenLink's kernel says along of the padding.
        more: tensors that the launches take besides the node's own.

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
    tensors |= more
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
    if left is not None:
        results.append(values["left"])
        old.append(left.producer())
        outputs.append(left)
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
