"""What a kernel-level ONNX file asks of the quick plugins: its nodes' calls, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokred_plugins.kernels import Call
from tokred_plugins.names import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

ATTRIBUTE = "call"


def read_calls(path: Path) -> dict[str, list[Call]]:
    """The calls in a file that ``lower(..., form="quick")`` wrote, by the name of their plugin.

    Weights are not read.

    Raises:
        ValueError: a node that no kernel of this version serves, or whose inputs and outputs
            are not those of its call; it names the node.
    """
    import onnx_ir as ir

    found: dict[str, list[Call]] = {}
    for node in ir.load(path).graph:
        if node.domain == DOMAIN:
            call = _call_of(node, f"node {node.name} of {path.name}")
            found.setdefault(node.op_type, []).append(call)
    return found


def parse_call(text: str, name: str, inputs: int) -> Call:
    """The call in a node's attribute, for the plugin ``name`` with so many inputs.

    Args:
        text: as TensorRT's ONNX parser hands it over: its trailing NUL is no part of it.
        name: of the plugin; see ``registry.variant_name``.
        inputs: how many tensors the node takes.

    Raises:
        ValueError: a call that is not readable or is another plugin's, or a wrong number of inputs.
    """
    from tokred_plugins.registry import KERNELS, call_from_json, variant_name

    try:
        call = call_from_json(text.rstrip("\0"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{DOMAIN}::{name} has an attribute {ATTRIBUTE} that no kernel of this version reads "
            f"({type(error).__name__}: {error}), expected one of {', '.join(KERNELS)}: export "
            "again with this version"
        ) from error
    if variant_name(call) != name:
        raise ValueError(
            f"{DOMAIN}::{name} is given the call of {variant_name(call)}, expected its own"
        )
    if inputs != len(call.inputs):
        raise ValueError(
            f"{DOMAIN}::{name} has {inputs} inputs, expected {len(call.inputs)}: "
            f"{', '.join(call.inputs)}"
        )
    return call


def _call_of(node: ir.Node, where: str) -> Call:
    attribute = node.attributes.get(ATTRIBUTE)
    if attribute is None:
        raise ValueError(
            f"{where} is {DOMAIN}::{node.op_type} without an attribute {ATTRIBUTE}; expected a "
            'file that lower(..., form="quick") wrote'
        )
    try:
        call = parse_call(attribute.as_string(), node.op_type, len(node.inputs))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(node.outputs) != len(call.outputs):
        raise ValueError(
            f"{where} has {len(node.outputs)} outputs, expected {len(call.outputs)}: "
            f"{', '.join(call.outputs)}"
        )
    return call
