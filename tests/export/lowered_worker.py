"""Runs kernel-level files without TensorRT: kernels in Triton's interpreter, the rest by onnx.

``test_lower.py`` starts this with TRITON_INTERPRET=1, which counts for a whole process. What runs
is the file node by node, in its order, by the names on its edges; nothing of ``lower`` is used.
A scan in PTX is done by Triton's kernel for the same, and its gate by numpy.

    lowered_worker.py JOBS.json     a list of {"calls", "feeds", "file", "out"}, all paths

The calls of the kernels of ``file`` are read from ``calls``, a "quick" file of the same graph, by
node name: a "launcher" file carries machine code, which only a GPU runs. Its products, and what
importance is made of in the scan, have no node there; calls are made anew from the shapes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))

from gpu_cases import require_kernels
from tokred_plugins.kernels import Call, Spec, launch
from tokred_plugins.linear import kernel as linear
from tokred_plugins.registry import call_from_json
from tokred_plugins.token_importance import kernel as token_importance


def run_file(path: str, calls: Mapping[str, Call], feeds: Mapping[str, np.ndarray]) -> dict:
    """The graph's outputs by name."""
    model = onnx.load(path)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | dict(feeds)
    for node in model.graph.node:
        given = [values[name] for name in node.input]
        if node.domain == "tokred":
            scan, _, kernel = node.name.partition("/0/ssd_scan_hopper")
            if scan != node.name:
                steps, walk = calls[f"{scan}/0/ssd_steps"], calls[f"{scan}/1/ssd_scan"]
                made = walk_in_ptx(steps, walk, kernel, *given)
            else:
                made = run_kernel(calls.get(node.name) or new_call(node, calls, *given), given)
        else:
            made = run_standard(node, given, model)
        values.update(zip(node.output, made, strict=True))
    return {value.name: values[value.name] for value in model.graph.output}


def walk_in_ptx(
    steps: Call, walk: Call, form: str, xbc: np.ndarray, z: np.ndarray, dt_bias: np.ndarray,
    a_log: np.ndarray, d: np.ndarray, pads: np.ndarray,
) -> list[np.ndarray]:
    """What the scan in PTX gives: y, or what goes through the gate and the sums of its squares,
    and the means of what of y is positive."""
    (made,) = run_kernel(steps, [z, dt_bias, a_log, pads])
    y, state = run_kernel(walk, [xbc, d, pads, made])
    if not form:
        return [y, state]
    z = z[:, :, : y.shape[2]].astype(np.float32)
    gated = y.astype(np.float32) * z / (1 + np.exp(-z))
    heads, parts = (
        x.reshape(*y.shape[:2], int(walk.constants["H"]), -1) for x in (gated, y.astype(np.float32))
    )
    relus = {"_gated": [], "_scored": [np.maximum(parts, 0).mean(3)]}[form]
    return [gated.astype(y.dtype), (heads**2).sum(3), *relus, state]


def new_call(node: onnx.NodeProto, calls: Mapping[str, Call], *given: np.ndarray) -> Call:
    """The call of a kernel that has no node of the same name in a "quick" file: a product, or
    importance, which the gated norm gives there."""
    if not node.name.endswith("/token_importance"):
        return product_call(node, calls, *given)
    (call,) = token_importance.calls(Spec(given[0].shape, "fp32"))
    return call


def product_call(
    node: onnx.NodeProto, calls: Mapping[str, Call], x: np.ndarray, weight: np.ndarray,
    squares: np.ndarray | None = None,
) -> Call:
    """The call of a product, which only a "launcher" file has as a kernel."""
    fields = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert fields["kernel"].decode().startswith("linear")
    # No width here is a depth too, so that the shapes tell how the weight is stored.
    turned = weight.shape[0] != x.shape[2]
    kinds = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16"}
    specs = [Spec(array.shape, kinds[array.dtype]) for array in (x, weight)]
    options = {}
    if squares is not None:
        norm = next(c for c in calls.values() if c.kernel.name.startswith("gated_rms_norm"))
        options |= {"squares": Spec(squares.shape, "fp32"), "eps": norm.constants["EPS"]}
    (call,) = linear.calls(*specs, turned, list(fields["output_ranks"]) == [1], **options)
    return call


def run_kernel(call: Call, given: list[np.ndarray]) -> list[np.ndarray]:
    """One launch, at the batch of its first input."""
    shapes = {
        name: dataclasses.replace(spec, shape=(len(given[0]), *spec.shape[1:]))
        for name, spec in call.outputs.items()
    }
    names = [name for name in call.kernel.inputs if name in call.inputs]
    tensors = {n: torch.from_numpy(a.copy()) for n, a in zip(names, given, strict=True)}
    made = launch(dataclasses.replace(call, outputs=shapes), tensors)
    return [made[name].numpy() for name in call.kernel.outputs]


def run_standard(
    node: onnx.NodeProto, given: list[np.ndarray], model: onnx.ModelProto
) -> list[np.ndarray]:
    """One node of a standard op, at the file's opset."""
    if node.op_type == "GatherElements":  # onnx's own refuses 64 elements and more
        axis = next(a.i for a in node.attribute if a.name == "axis")
        return [np.take_along_axis(given[0], given[1].astype(np.int64), axis)]
    ins = [helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    ) for name, array in zip(node.input, given, strict=True)]  # fmt: skip
    outs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    alone = helper.make_model(
        helper.make_graph([node], "node", list({i.name: i for i in ins}.values()), outs),
        opset_imports=[o for o in model.opset_import if not o.domain],
    )
    return ReferenceEvaluator(alone).run(None, dict(zip(node.input, given, strict=True)))


def calls_of(path: str) -> dict[str, Call]:
    """The call of every kernel node of a "quick" file, by the node's name."""
    return {
        node.name: call_from_json(attribute.s.decode())
        for node in onnx.load(path, load_external_data=False).graph.node
        for attribute in node.attribute if attribute.name == "call"
    }


def main() -> None:
    require_kernels()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with np.load(job["feeds"]) as arrays:
            np.savez(job["out"], **run_file(job["file"], calls_of(job["calls"]), dict(arrays)))


if __name__ == "__main__":
    main()
