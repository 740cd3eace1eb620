"""What an op's ``tensorrt.py`` says: how the op becomes kernel launches.

TensorRT takes one kernel a plugin, so a node of an op that needs several becomes several nodes
(:mod:`tokred_export.export.lower`); eager PyTorch on CUDA runs the same launches (``cuda.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokred_plugins.kernels import Call, Spec

Attribute = int | float | bool


@dataclass(frozen=True)
class KernelFace:
    """How one op runs on a GPU.

    Attributes:
        inputs: names of the op's tensors, in its own order; an optional one may be absent.
        results: names of the kernels' outputs that are the op's results, in its own order.
        calls: (spec of each tensor that is there, attributes by name) -> the launches. It reads
            attributes that the torch op and the ONNX node have in common, and imports Triton.
    """

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    calls: Callable[[Mapping[str, Spec], Mapping[str, Attribute]], tuple[Call, ...]]
