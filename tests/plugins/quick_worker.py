"""Plays TensorRT's builder for the quick plugins of kernel-level files, and prints what it got.

``test_quick.py`` runs this where NVIDIA's plugin module can be imported (nvidia_arrange.py).
Nodes go through NVIDIA's registry, creator and template class in the order that TensorRT does:
output dtypes, output shapes, supported combinations, tactics, and code and launch of each.

    quick_worker.py SM FILE.onnx ...   the exported files; one line of JSON comes out
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import onnx_ir as ir
import tensorrt as trt
import tensorrt.plugin as trtp
from kernel_shapes import MODELS, Model, cases
from nvidia_dimensions import DimsExprs, ExprBuilder, IDimensionExpr, LaunchParams, SymExprs
from tensorrt_bindings.plugin._lib import PluginDef
from tokred_plugins import quick
from tokred_plugins.aot import Compiled, compile_call, compile_key
from tokred_plugins.kernels import Call, Spec, Tactic
from tokred_plugins.quick_file import read_calls
from tokred_plugins.registry import call_from_json, call_to_json, variant_name
from tokred_plugins.retune import candidates

from tokred_export.export.lower import kernel_nodes, lower

BATCHES = (1, 3)
SMALL_TARGET = 86  # a block has 99 KB of shared memory there
IR_DTYPES = {
    "FLOAT": trt.float32, "FLOAT16": trt.float16, "BFLOAT16": trt.bfloat16, "INT32": trt.int32,
    "BOOL": trt.bool,
}
DTYPES = {"fp16": trt.float16, "fp32": trt.float32, "i32": trt.int32}


@dataclass(frozen=True)
class Node:
    """One plugin node: name of the plugin, its call, and the dtypes and shapes of its tensors."""

    name: str
    text: str
    inputs: list[tuple[object, list[int | None]]]
    outputs: list[tuple[object, list[int | None]]]


@dataclass(frozen=True)
class Handed:
    """All that an engine knows of one kernel; ``shapes`` and ``grid`` are a list a batch."""

    entry: str
    ptx: str
    grid: list[list[int]]
    block: list[int]
    shared: int
    extras: list[int]


def nodes_of(path: Path) -> Iterator[Node]:
    """The plugin nodes of a kernel-level file."""
    for node, attributes in kernel_nodes(ir.load(path)):
        inputs, outputs = (
            [(IR_DTYPES[v.dtype.name], [d if isinstance(d, int) else None for d in v.shape])
             for v in values] for values in (node.inputs, node.outputs)
        )
        yield Node(node.op_type, attributes["call"], inputs, outputs)


def nodes_beside() -> Iterator[Node]:
    """What the files have no node of: the scan that continues from a state, in both ways that a
    scan is launched, the walk from zero, importance where the gated norm does not give it, the
    split of many tokens, and one without the norms of what is matched."""
    small = Model("small", width=32, heads=4, head_dim=16, states=12)
    ops = {"ssd_scan", "token_importance", "token_split", "token_split_norm", "token_match"}
    scan, importance, split, normed, match = cases(small, 1, 300, "fp16", ops)
    state = Spec((1, small.heads, small.head_dim, small.states), "fp32")
    from_state = replace(scan, inputs={**scan.inputs, "initial_state": state})
    launches = [importance.launches(), match.launches(), scan.launches(segments=1)]
    launches += [split.launches(), *(x.launches(search=True) for x in (split, normed))]
    launches += [from_state.launches(segments=n) for n in (1, 2)]
    for calls in launches:
        known = {**from_state.inputs, **importance.inputs, **normed.inputs, **match.inputs}
        known |= {name: spec for call in calls for name, spec in call.outputs.items()}
        for call in calls:
            # The batch is open; so is, for simplicity, the first dimension of d, which has none.
            inputs = [(DTYPES[known[n].dtype], [None, *known[n].shape[1:]]) for n in call.inputs]
            outputs = [(DTYPES[s.dtype], [None, *s.shape[1:]]) for s in call.outputs.values()]
            yield Node(variant_name(call), call_to_json(call), inputs, outputs)


def create(name: str, text: str) -> trt.IPluginV3:
    """As TensorRT's ONNX parser creates a node's plugin: a string attribute ends in NUL."""
    creator = trt.get_plugin_registry().get_creator(name, "1", "tokred")
    assert creator is not None, f"{name} is not in NVIDIA's registry"
    field = trt.PluginField("call", text.encode() + b"\0", trt.PluginFieldType.CHAR)
    return creator.create_plugin(
        name, "tokred", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )


def described(dtype: object, shape: list[int | None]) -> trt.DynamicPluginTensorDesc:
    """A tensor as the builder describes it while tuning; an open batch is -1."""
    made = trt.DynamicPluginTensorDesc()
    made.desc.dims = tuple(-1 if d is None else d for d in shape)
    made.desc.type = dtype
    made.desc.format = trt.TensorFormat.LINEAR
    for limit in ("min", "opt", "max"):
        setattr(made, limit, tuple(BATCHES[-1] if d is None else d for d in shape))
    return made


def drive(node: Node) -> dict:
    """One node through NVIDIA's template class, and what the file says of it."""
    plugin = create(node.name, node.text)
    types = plugin.get_output_data_types(
        [dtype for dtype, _ in node.inputs], [len(shape) for _, shape in node.inputs]
    )
    dims = [DimsExprs(len(shape)) for _, shape in node.inputs]
    for made, (_, shape) in zip(dims, node.inputs, strict=True):
        made[:] = map(IDimensionExpr, shape)
    shapes = plugin.get_output_shapes(dims, [], ExprBuilder())
    inputs = [described(*tensor) for tensor in node.inputs]
    outputs = [described(*tensor) for tensor in node.outputs]
    combination = plugin.get_supported_format_combinations([*inputs, *outputs], len(inputs))
    plugin.configure_plugin(inputs, outputs)
    tactics = plugin.get_valid_tactics()
    return {
        "name": node.name,
        "types": names_of(types),
        "shapes": [[d.at(batch) for d in shape] for batch in BATCHES for shape in shapes],
        "combination": names_of(desc.type for desc in combination),
        "formats": sorted({desc.format.name for desc in combination}),
        "tactics": tactics,
        "handed": [asdict(handed(plugin, t, dims, inputs, outputs)) for t in tactics],
        "file": {
            "types": names_of(dtype for dtype, _ in node.outputs),
            "shapes": [
                [batch if d is None else d for d in shape]
                for batch in BATCHES for _, shape in node.outputs
            ],
            "combination": names_of(dtype for dtype, _ in (*node.inputs, *node.outputs)),
        },
    }


def names_of(dtypes: Iterable[trt.DataType]) -> list[str]:
    return [dtype.name for dtype in dtypes]


def handed(
    plugin: trt.IPluginV3, tactic: int, dims: list[DimsExprs], inputs: list, outputs: list
) -> Handed:
    """What the builder is given for one tactic."""
    plugin.set_tactic(tactic)
    launch, extras = LaunchParams(), SymExprs()
    plugin.get_launch_params(
        dims, [*inputs, *outputs], len(inputs), launch, extras, ExprBuilder()
    )
    entry, ptx = plugin.get_kernel([d.desc for d in inputs], [d.desc for d in outputs])
    grid = (launch.grid_x, launch.grid_y, launch.grid_z)
    assert all(e.dtype == trt.PluginArgDataType.INT32 for e in extras.values.values())
    return Handed(
        entry, digest(ptx.decode()), [[g.expr.at(b) for g in grid] for b in BATCHES],
        [constant(b) for b in (launch.block_x, launch.block_y, launch.block_z)],
        constant(launch.shared_mem),
        [constant(extras.values[i]) for i in range(extras.nbSymExprs)],
    )


def constant(value: trt.ISymExpr) -> int:
    return value.expr.get_constant_value()


def digest(ptx: str) -> str:
    """A PTX in short; the whole of it is compared."""
    return f"{len(ptx)} bytes {sha256(ptx.encode()).hexdigest()}"


class Descriptions:
    """Kernel descriptions by ``compile_call``, apart from the plugins' own; each made once."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._made: dict[str, Compiled] = {}

    def handed(self, call: Call, batches: list[int]) -> Handed:
        """The facts that the plugin must hand over for a call."""
        key = compile_key(call)
        if key not in self._made:
            self._made[key] = compile_call(call, self._target)
        made = self._made[key]
        extras = [call.extras[p.name] for p in made.parameters if p.role == "extra"]
        return Handed(
            made.entry, digest(made.ptx), [[*call.grid, b] for b in batches], [made.block, 1, 1],
            made.shared, extras,
        )


def of_launcher_node(attributes: dict, batches: list[int]) -> Handed:
    """The same facts from a node of the form for older TensorRT."""
    return Handed(
        attributes["entry"], digest(attributes["ptx"]),
        [[*attributes["grid"], b] for b in batches], [attributes["block"], 1, 1],
        attributes["shared"], list(map(int, attributes["extras"].split())),
    )


def file_facts(source: Path, target: int, descriptions: Descriptions) -> dict:
    """Everything about the nodes of one exported file."""
    quick_file = source.with_suffix(".quick.onnx")
    launcher_file = source.with_suffix(".launcher.onnx")
    lower(source, quick_file, "quick", target)
    lower(source, launcher_file, "launcher", target)
    found = read_calls(quick_file)
    for _ in range(2):  # the second time changes nothing
        quick.register([calls[0] for calls in found.values()], target)
    nodes = list(nodes_of(quick_file))
    launchers = [
        attributes for _, attributes in kernel_nodes(ir.load(launcher_file))
        if not attributes["kernel"].startswith("linear")  # TensorRT's own in this form
    ]
    facts = []
    for node, attributes in zip(nodes, launchers, strict=True):
        batches = [IDimensionExpr(node.inputs[0][1][0]).at(b) for b in BATCHES]
        facts.append(drive(node) | described_by_call(node, batches, descriptions))
        facts[-1]["launcher"] = asdict(of_launcher_node(attributes, batches))
    return {"names": list(found), "nodes": facts}


def described_by_call(node: Node, batches: list[int], descriptions: Descriptions) -> dict:
    """What the node's call says by itself, and what the kernel descriptions are."""
    call = call_from_json(node.text)
    return {
        "kernel": call.kernel.name,
        "inputs": list(call.inputs), "outputs": list(call.outputs),
        "in_kernel_order": [n for n in call.kernel.inputs if n in call.inputs],
        "expected": [
            asdict(descriptions.handed(candidate, batches)) for candidate in candidates(call)
        ],
    }


def continued_facts(target: int, descriptions: Descriptions) -> list[dict]:
    """Everything about the nodes that are in no file."""
    facts = []
    for node in nodes_beside():
        quick.register([call_from_json(node.text)], target)
        facts.append(drive(node) | described_by_call(node, list(BATCHES), descriptions))
    return facts


def refusal(action: Callable, *arguments: object) -> str:
    """What an action says that must fail."""
    try:
        action(*arguments)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def refusals(target: int) -> dict[str, str]:
    """Calls that are not this plugin's, GPUs that are not this process's."""
    (call,) = next(iter(cases(MODELS["130m"], 1, 2048, "fp16", {"add_rms_norm"}))).launches()
    text = call_to_json(call)
    dtypes, ranks = [trt.float16, trt.float32, trt.float16], [3, 3, 1]

    def types(text: str, inputs: int = 3) -> None:
        create("add_rms_norm", text).get_output_data_types(dtypes[:inputs], ranks[:inputs])

    return {
        "unknown kernel": refusal(types, text.replace("add_rms_norm", "add_layer_norm")),
        "call of another": refusal(types, text.replace("add_rms_norm", "token_norm")),
        "two inputs": refusal(types, text, 2),
        "no call": refusal(types, "{"),
        "another GPU": refusal(quick.register, [call], 80 if target != 80 else 90),
        "unknown GPU": refusal(quick.register, [call], 75),
    }


def fits(target: int) -> dict[str, object]:
    """The scan of a large model on a GPU with little shared memory: what is left of its tactics."""
    case = next(iter(cases(MODELS["2.7b"], 1, 2048, "fp16", {"ssd_scan"})))
    deep = Tactic({"Q": 64, "HEADS": 1}, 4, 6)
    call = case.launches({"ssd_scan": deep}, segments=1)[-1]
    alone = replace(call, kernel=replace(call.kernel, tactics=(deep,)))
    return {
        "own": str(deep),
        "offered": [str(choice.tactic) for choice in quick.choices(call, target)],
        "none": refusal(quick.choices, alone, target),
    }


def definitions() -> dict[str, list]:
    """What NVIDIA's module has read off our functions: inputs, attributes and output count."""
    return {
        name: [made.input_tensor_names, list(made.input_attrs), made.num_outputs]
        for name, made in vars(trtp.op.tokred).items() if isinstance(made, PluginDef)
    }


def main() -> None:
    target, sources = int(sys.argv[1]), list(map(Path, sys.argv[2:]))
    descriptions = Descriptions(target)
    facts = {
        "version": trt.__version__,
        "files": {path.stem: file_facts(path, target, descriptions) for path in sources},
        "continued": continued_facts(target, descriptions),
        "refusals": refusals(target),
        "fits": fits(SMALL_TARGET),
        "definitions": definitions(),
        "creators": sorted(
            creator.name for creator in trt.get_plugin_registry().all_creators
            if creator.plugin_namespace == "tokred"
        ),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
