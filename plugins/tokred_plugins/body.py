"""Writing an op's ONNX function body: standard ops only, one level, no nesting.

A body is shared by every node of its op in a file, so it may not depend on a node's sequence
length except through ``Shape``. Attributes on which all nodes agree are constants in the body;
the others are references to the node's attribute, which are allowed one level deep only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tokred_plugins.names import DOMAIN

# TensorRT's TopK refuses a larger k.
TOPK_LIMIT = 3840

Number = int | float


class Body:
    """An imperative writer of standard-op nodes.

    Args:
        attributes: the values on which every node of this op agrees.
        varying: names of the integer attributes on which nodes differ.
        dtype: the model's tensor dtype (float32, float16 or bfloat16).
        lengths: every token count this body will meet in its file; a body may leave out what
            none of them needs (padding to whole chunks), and is right for those counts only.
    """

    def __init__(
        self,
        attributes: Mapping[str, Number],
        varying: Mapping[str, int],
        dtype: ir.DataType,
        lengths: frozenset[int] = frozenset(),
    ) -> None:
        self._tape = ir.tape.Tape()
        self.lengths = lengths
        self._attributes = attributes
        self._varying = varying
        self.dtype = dtype

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes written so far, in order."""
        return self._tape.nodes

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        """One standard-op node with one output."""
        return self._tape.op(op_type, inputs, attributes)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        """``x`` cut along ``axis`` into pieces of literal ``sizes``."""
        return self._tape.op_multi_out(
            "Split", [x, self.ints(sizes)], {"axis": axis}, num_outputs=len(sizes)
        )

    def topk_values(self, x: ir.Value, k: ir.Value, largest: bool) -> ir.Value:
        """The ``k`` (int64 [1]) extreme values along axis 1, sorted; indices are not used."""
        values, _ = self._tape.op_multi_out(
            "TopK", [x, k], {"axis": 1, "largest": int(largest), "sorted": 1}, num_outputs=2
        )
        return values

    def literal(self, name: str) -> Number:
        """An attribute's value, where the body's structure depends on it.

        Raises:
            ValueError: nodes of this op disagree on it, so no single body can serve them.
        """
        if name not in self._attributes:
            raise ValueError(f"attribute {name} differs between nodes, expected one value a file")
        return self._attributes[name]

    def attribute(self, name: str) -> ir.Value:
        """An integer attribute as an int64 [1] value: a constant, or the node's own."""
        if name not in self._varying:
            return self.ints([int(self.literal(name))])
        reference = ir.RefAttr("value_int", name, ir.AttributeType.INT)
        scalar = self._tape.op("Constant", [], {"value_int": reference})
        return self.op("Reshape", scalar, self.ints([1]))

    def largest(self, name: str) -> int:
        """The largest value an integer attribute takes on any node."""
        return self._varying[name] if name in self._varying else int(self.literal(name))

    def constant(self, value: np.ndarray) -> ir.Value:
        """A literal tensor."""
        return self._tape.op("Constant", [], {"value": ir.tensor(value)})

    def ints(self, values: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.asarray(value, dtype=np.float32))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``x`` in another dtype."""
        return self.op("Cast", x, to=int(dtype))

    def wide(self, x: ir.Value) -> ir.Value:
        """``x`` in float32 (no node when the model is float32 already)."""
        return x if self.dtype == ir.DataType.FLOAT else self.cast(x, ir.DataType.FLOAT)

    def narrow(self, x: ir.Value) -> ir.Value:
        """A float32 ``x`` back in the model's dtype."""
        return x if self.dtype == ir.DataType.FLOAT else self.cast(x, self.dtype)

    def int64(self, x: ir.Value) -> ir.Value:
        """``x`` as int64, the type of ONNX indices."""
        return self.cast(x, ir.DataType.INT64)

    def int32(self, x: ir.Value) -> ir.Value:
        """``x`` as int32, the type of every integer output."""
        return self.cast(x, ir.DataType.INT32)

    def dim(self, x: ir.Value, axis: int) -> ir.Value:
        """One dimension of ``x`` as an int64 [1] value."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def shape(self, *parts: ir.Value | int) -> ir.Value:
        """A shape of literal ints (0 copies, -1 infers) and int64 [1] values."""
        if all(isinstance(part, int) for part in parts):
            return self.ints(parts)
        values = [self.ints([part]) if isinstance(part, int) else part for part in parts]
        return self.op("Concat", *values, axis=0)

    def reshape(self, x: ir.Value, *parts: ir.Value | int) -> ir.Value:
        """``x`` in another shape."""
        return self.op("Reshape", x, self.shape(*parts))

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        """``x`` with a new axis of size one."""
        return self.op("Unsqueeze", x, self.ints([axis]))

    def slice(self, x: ir.Value, axis: int, start: int | ir.Value, end: int | ir.Value) -> ir.Value:
        """``x[start:end]`` along ``axis``."""
        start, end = (self.ints([v]) if isinstance(v, int) else v for v in (start, end))
        return self.op("Slice", x, start, end, self.ints([axis]))

    def range(self, end: ir.Value) -> ir.Value:
        """int64 0, 1, .. up to an int64 [1] ``end``."""
        scalar = self.op("Squeeze", end, self.ints([0]))
        zero, one = (self.constant(np.asarray(v, dtype=np.int64)) for v in (0, 1))
        return self.op("Range", zero, scalar, one)

    def sum(self, x: ir.Value, axis: int, keepdims: int = 1) -> ir.Value:
        """Sum along one axis."""
        return self.op("ReduceSum", x, self.ints([axis]), keepdims=keepdims)

    def mean(self, x: ir.Value, axis: int, keepdims: int = 1) -> ir.Value:
        """Mean along one axis."""
        return self.op("ReduceMean", x, self.ints([axis]), keepdims=keepdims)

    def sigmoid_times(self, x: ir.Value) -> ir.Value:
        """SiLU: x * sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))


@dataclass(frozen=True)
class OnnxOp:
    """How one custom op stands in an ONNX file.

    Attributes:
        name: op type in domain ``tokred``; never a standard op's name, because TensorRT's
            parser looks standard ops up by type alone.
        inputs, outputs: names, in order.
        attributes: name -> int or float.
        body: writes the function body; takes the Body and the inputs, returns the outputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    body: Callable[..., Sequence[ir.Value]]


def function_for(
    op: OnnxOp,
    attributes: Mapping[str, Number],
    varying: Mapping[str, int],
    dtype: ir.DataType,
    lengths: frozenset[int],
    opset: int,
) -> ir.Function:
    """The model-local function of ``op``.

    Args:
        op: the op.
        attributes: values on which all its nodes agree.
        varying: integer attributes on which they differ -> the largest value.
        dtype: the model's tensor dtype.
        lengths: the token counts its nodes see.
        opset: the model's opset; a body must import the same.
    """
    body = Body(attributes, varying, dtype, lengths)
    inputs = [ir.Value(name=name) for name in op.inputs]
    outputs = list(op.body(body, *inputs))
    for name, value in zip(op.outputs, outputs, strict=True):
        value.name = name
    # A function declares every attribute its nodes carry; only references matter to the body.
    declared = [
        ir.Attr(name, ir.AttributeType.INT if kind is int else ir.AttributeType.FLOAT, None)
        for name, kind in op.attributes.items()
    ]
    graph = ir.Graph(
        inputs, outputs, nodes=body.nodes, opset_imports={"": opset}, name=op.name
    )
    return ir.Function(DOMAIN, op.name, "", graph=graph, attributes=declared)
