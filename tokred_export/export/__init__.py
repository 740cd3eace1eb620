"""Model -> torch.export program -> ONNX file: three stages, one call.

    capture.py     model            -> ExportedProgram, strictly, static in L
    emit.py        ExportedProgram  -> onnx_ir.Model with opaque tokred nodes -> file
    translate.py   torch custom op  -> one node
    functions.py   opaque nodes     -> nodes with a function body each
"""

from __future__ import annotations

from pathlib import Path

import torch

from tokred_export.export.capture import capture_prefill
from tokred_export.export.emit import OPSET, save, to_onnx
from tokred_export.model import Mamba2

__all__ = ["OPSET", "export_prefill"]


def export_prefill(model: Mamba2, length: int, max_batch: int, path: Path) -> list[Path]:
    """Write the prefill graph of ``model`` to ``path``.

    Args:
        model: eager, in eval mode, on the custom ops, with its schedule.
        length: L, static.
        max_batch: 1 gives a static batch of one, more a dynamic batch up to that.
        path: the .onnx file; above 1 GB the weights go to ``path``.data.

    Returns:
        The files written.

    Raises:
        BuildFailed: capture, translation or the ONNX checker refused the model.
    """
    program, names = capture_prefill(model, length, max_batch)
    dtype = model.embedding.weight.dtype
    return save(to_onnx(program, names, torch.float32 if dtype == torch.float64 else dtype), path)
