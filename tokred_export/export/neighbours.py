"""What a node's kernel can do along of the nodes beside it, found in an exported graph.

Only what the kernel's op says in its README.md: the file that :mod:`tokred_export.export.lower`
writes computes what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from tokred_plugins.kernel_faces import ONNX_NAMES
from tokred_plugins.names import DOMAIN

from tokred_export.export.products import find_product


class Join(NamedTuple):
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


@dataclass(frozen=True)
class Neighbours:
    """By the node whose kernel does it along.

    Attributes:
        scored: GatedRmsNorm -> the TokenImportance of its ``y``.
        joins: SsdScan -> the gated norm after it.
        norms: TokenReduce -> the AddRmsNorm after it.
        left: TokenLink -> the padding that is left after it.
        matches: TokenSplit -> the TokenMatch that needs norms.
    """

    scored: Mapping[ir.Node, ir.Node]
    joins: Mapping[ir.Node, Join]
    norms: Mapping[ir.Node, ir.Node]
    left: Mapping[ir.Node, ir.Value]
    matches: Mapping[ir.Node, ir.Node]


def find_neighbours(graph: ir.Graph, products: bool) -> Neighbours:
    """All of a graph.

    Args:
        graph: as exported.
        products: products become kernels too; without, nothing joins a scan.
    """
    scored = _scored_norms(graph)
    place = {node: i for i, node in enumerate(graph)}
    return Neighbours(
        scored, _joins(graph, scored) if products else {}, _norms_after_sites(graph),
        _pads_after_sites(graph, place), _matches(graph, place),
    )


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
                break  # one is enough
    return found


def _joins(graph: ir.Graph, scored: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, Join]:
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
            and product is not None and product.op_type == "MatMul" and find_product(product)
            and norm.inputs[2].const_value is not None
            and _in_range(product.inputs[1], norm.inputs[2])
            and _tokens(norm.outputs[0]) > FEW  # for a few tokens there is another kernel
        ):
            found[scan] = Join(norm, product, norm.inputs[2], said["eps"])
    return found


def _in_range(weight: ir.Value, by: ir.Value) -> bool:
    """Whether a constant times another is sure to stay in the range of its type."""
    if weight.dtype != ir.DataType.FLOAT16:
        return True
    largest = [float(np.abs(v.const_value.numpy().astype(np.float32)).max()) for v in (weight, by)]
    return largest[0] * largest[1] <= float(np.finfo(np.float16).max)


def _tokens(value: ir.Value) -> int:
    """Of each sequence; 0 where that is open, which lowering refuses."""
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


def _pads_after_sites(
    graph: ir.Graph, place: Mapping[ir.Node, int]
) -> dict[ir.Node, ir.Value]:
    """TokenLink nodes -> how much padding is left after their site: their kernel says it along,
    where TensorRT would launch a kernel for the difference and another for the maximum."""
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


def _matches(graph: ir.Graph, place: Mapping[ir.Node, int]) -> dict[ir.Node, ir.Node]:
    """TokenSplit nodes -> the TokenMatch of both halves, where its tokens are there before."""
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
