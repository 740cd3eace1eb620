"""The matrix products of a graph, each as an ONNX file of its own.

Timing a product is what a TensorRT build spends its time on, and a build that is killed keeps
none of it. So the distinct products are built alone first, one after another, and the timing
cache is kept after each; the whole graph then finds its products there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

_PRODUCTS = ("MatMul",)


class Product(NamedTuple):
    """x [B, rows, inner] times a constant [inner, columns]."""

    rows: int
    inner: int
    columns: int
    dtype: ir.DataType
    batch: int | None  # None where it is open


def products_of(model: ir.Model) -> list[Product]:
    """The distinct products of a graph, in order of first use."""
    found = {}
    for node in model.graph:
        if node.domain or node.op_type not in _PRODUCTS:
            continue
        x, weight = node.inputs
        if weight.const_value is None or len(x.shape) != 3 or len(weight.shape) != 2:
            continue
        batch = x.shape[0] if isinstance(x.shape[0], int) else None
        product = Product(
            int(x.shape[1]), int(weight.shape[0]), int(weight.shape[1]), x.dtype, batch
        )
        found.setdefault(product)
    return list(found)


def write_products(lowered: Path, folder: Path) -> tuple[str, ...]:
    """Write one file a distinct product; the paths, in order."""
    folder.mkdir()
    paths = []
    for index, product in enumerate(products_of(ir.load(lowered))):
        path = folder / f"product-{index}-{product.rows}x{product.inner}x{product.columns}.onnx"
        ir.save(_model_of(product), path)
        paths.append(str(path))
    return tuple(paths)


def _model_of(product: Product) -> ir.Model:
    """A graph of one product, of random weights."""
    batch = product.batch if product.batch is not None else "batch"
    random = np.random.default_rng(0).standard_normal((product.inner, product.columns))
    weight = ir.Value(
        name="weight", const_value=ir.tensor(
            (random / product.inner**0.5).astype(product.dtype.numpy()), name="weight"
        ), shape=ir.Shape([product.inner, product.columns]), type=ir.TensorType(product.dtype),
    )
    x = ir.Value(
        name="x", shape=ir.Shape([batch, product.rows, product.inner]),
        type=ir.TensorType(product.dtype),
    )
    node = ir.node("MatMul", [x, weight])
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(product.dtype)
    y.shape = ir.Shape([batch, product.rows, product.columns])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[weight], opset_imports={"": 17}, name="product"
    )
    return ir.Model(graph, ir_version=8)
