"""Norms that the products around them do along, so that no kernel of their own reads a row again.

    MatMul -> AddRmsNorm -> MatMul

The first product adds to the residual stream where its sums still are in registers, and sums the
squares of what comes out. A norm divides a row by its root mean square, and a product with a
constant does not mind whether that comes before it or after: the second divides.

Both must be kernels of ours, and nothing else may read their rows: at a reduction site, and where
only the last token counts, they stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir
from tokred_plugins.body import DOMAIN


class Between(NamedTuple):
    """A norm between two products.

    Attributes:
        norm: the AddRmsNorm whose hidden comes from the one product.
        taker: the other, which multiplies the normed rows.
    """

    norm: ir.Node
    taker: ir.Node


def norms_between_products(
    graph: ir.Graph, suits: Callable[[ir.Node], bool]
) -> dict[ir.Node, Between]:
    """The first product -> the norm that it can do, and the second product.

    Args:
        graph: an exported graph, not lowered yet; is not changed.
        suits: whether a node is a product with a constant whose kernel should do a norm along.
    """
    found = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type != "AddRmsNorm":
            continue
        hidden, normed = node.inputs[0], node.outputs[0]
        maker, taker = hidden.producer(), _only_reader(normed)
        if maker is None or taker is None or _only_reader(hidden) is not node:
            continue
        if taker.inputs[0] is normed and suits(maker) and suits(taker):
            found[maker] = Between(node, taker)
    return found


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value, if there is one and nothing else."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
