"""On CUDA tensors the torch ops run their kernels, once :func:`register` was called.

Importing this module needs no Triton; registering does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tokred_plugins.driver import reads_descriptors
from tokred_plugins.faces import KernelFace
from tokred_plugins.kernel_faces import FACES
from tokred_plugins.kernels import run, spec_of


@cache
def register() -> None:
    """Make the ops dispatch to the kernels for CUDA tensors.

    Raises:
        ImportError: Triton is not installed.
    """
    import triton  # noqa: F401  before anything is registered

    from tokred_plugins import opset

    for name, face in FACES.items():
        names = tuple(inspect.signature(getattr(opset.PLAIN, name)).parameters)
        getattr(opset.CUSTOM, name).register_kernel("cuda", _launcher(face, names))


def known_of(device: torch.device) -> dict[str, int]:
    """What launches are chosen for: a GPU's compute capability times ten, and how many
    multiprocessors it has, by the names that faces know."""
    gpu = torch.cuda.get_device_properties(device)
    return {
        "target": 10 * gpu.major + gpu.minor, "multiprocessors": gpu.multi_processor_count
    }


def _launcher(face: KernelFace, names: tuple[str, ...]) -> Callable:
    """The op over its kernels: takes what the op takes, by position, and returns what it returns.

    Args:
        face: of the op.
        names: of the op's parameters, in order.
    """

    def on_cuda(*values: object) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        tensors = {name: given.pop(name) for name in face.inputs}
        specs = {name: spec_of(x) for name, x in tensors.items() if x is not None}
        given |= known_of(tensors[face.inputs[0]].device) | {"scratch": reads_descriptors()}
        made = run(face.calls(specs, given), tensors)
        results = tuple(made[name] for name in face.results)
        return results if len(results) > 1 else results[0]

    return on_cuda
