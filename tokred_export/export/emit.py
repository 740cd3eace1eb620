"""Stage 2 of the export: an ExportedProgram becomes an ONNX model, and the model a file."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from tokred_export.errors import BuildFailed
from tokred_export.export.capture import Names
from tokred_export.export.functions import add_functions, tokred_nodes
from tokred_export.export.translate import translation_table

OPSET = 18
# A protobuf file cannot exceed 2 GiB; weights go beside it well before that.
EXTERNAL_ABOVE = 1 << 30


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about absent torchvision and its own deprecations on every call."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def to_onnx(program: torch.export.ExportedProgram, names: Names, dtype: torch.dtype) -> ir.Model:
    """The ONNX model with every custom op as a node and one level of function body.

    Raises:
        BuildFailed: the exporter failed, lost a custom op, or ignored the opset.
    """
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translation_table(),
                input_names=list(names.inputs),
                output_names=list(names.outputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise BuildFailed(f"torch.onnx could not translate the program: {error}") from error
    model = onnx_program.model
    add_functions(model, ir.DataType[_ONNX_DTYPES[dtype]])
    _check(program, model, names)
    passes.RemoveUnusedNodesPass()(model)
    _drop_traces(model)
    _copy_views(model)
    model.producer_name = "tokred-export"
    return model


_ONNX_DTYPES = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
}


def _check(program: torch.export.ExportedProgram, model: ir.Model, names: Names) -> None:
    """No custom op lost, the opset as asked, the contract's names: the exporter says nothing."""
    expected = sum(
        1 for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("tokred.")
    )
    found = sum(len(nodes) for nodes in tokred_nodes(model).values())
    if found != expected:
        raise BuildFailed(f"the ONNX graph holds {found} custom ops, expected {expected}")
    if model.opset_imports.get("") != OPSET:
        raise BuildFailed(f"the exporter wrote opset {model.opset_imports.get('')}, not {OPSET}")
    outputs = tuple(value.name for value in model.graph.outputs)
    if outputs != names.outputs:
        raise BuildFailed(f"the ONNX graph returns {outputs}, expected {names.outputs}")


def _drop_traces(model: ir.Model) -> None:
    """The exporter stores stack traces, with paths of this machine, on every node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _copy_views(model: ir.Model) -> None:
    """Let initializers that are strided views be copied, one at a time, when they are written.

    The exporter folds the transpose of a weight into a view of it, and numpy writes a view element
    by element: 0.2 GB/s, where a copy runs at 1 and writing that at 5 (two cores).
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
        if isinstance(raw, np.ndarray) and not raw.flags.c_contiguous:
            value.const_value = ir.LazyTensor(
                partial(_copied, tensor), tensor.dtype, tensor.shape, name=tensor.name
            )


def _copied(tensor: ir.Tensor) -> ir.Tensor:
    """A tensor with memory of its own; torch transposes faster than numpy, but not bfloat16's."""
    bits = torch.from_numpy(tensor.raw.view(f"i{tensor.raw.itemsize}")).contiguous().numpy()
    return ir.Tensor(bits.view(tensor.raw.dtype), tensor.dtype, name=tensor.name)


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write ``path`` and, above 1 GB of weights, ``path``.data beside it.

    Returns:
        The files written.

    Raises:
        BuildFailed: the written file does not pass the full ONNX checker.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    files = [path]
    if size > EXTERNAL_ABOVE:
        ir.save(model, path, external_data=path.name + ".data")
        files.append(path.with_name(path.name + ".data"))
    else:
        ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildFailed(f"the ONNX checker refuses {path.name}: {error}") from error
    return files
