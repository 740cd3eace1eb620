"""What an op's ``tensorrt.py`` says: how the op becomes kernel launches.

TensorRT takes one kernel a plugin, so a node of an op that needs several becomes several nodes
(:mod:`tokred_export.export.lower`); eager PyTorch on CUDA runs the same launches (``cuda.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokred_plugins.kernels import Call, Constant, Spec, cdiv

Attribute = int | float | bool
MULTIPROCESSORS = 132  # of an H100 and an H200
Grid = tuple[int, int]


@dataclass(frozen=True)
class Tuning:
    """Which other tactics can take a call's place in a graph that is already decided.

    A tactic that changes an extra or the shape of an intermediate changes other kernels' calls
    too, and cannot. Without a Tuning, only tactics of equal block sizes can.

    Attributes:
        free: block sizes that no other kernel depends on.
        grid: (constants, extras and block sizes by name, the call's grid) -> the grid with these
            block sizes, or None where they do not suit the call. Left out where no block size
            shows in the grid.
        programs: block sizes that say how many programs stay, for a GPU of ``MULTIPROCESSORS``.
    """

    free: tuple[str, ...]
    grid: Callable[[Mapping[str, Constant], Grid], Grid | None] = lambda sizes, grid: grid
    programs: tuple[str, ...] = ()


def row_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """A few whole rows a program."""
    return cdiv(sizes["length"], sizes["ROWS"]), now[1]


# What may be tuned about a kernel that walks along rows (row_tiles.py).
ROW_TUNING = Tuning(("ROWS", "BLOCK"), row_grid)


@dataclass(frozen=True)
class KernelFace:
    """How one op runs on a GPU.

    Attributes:
        inputs: names of the op's tensors, in its own order; an optional one may be absent.
        results: names of the kernels' outputs that are the op's results, in its own order.
        calls: (spec of each tensor that is there, attributes by name) -> the launches. It reads
            attributes that the torch op and the ONNX node have in common, and where they are known
            "target", the GPU's compute capability times ten, and "multiprocessors", their number;
            "scratch" is true where whoever launches passes scratch memory; and it imports Triton.
        tunings: kernel name -> what may be tuned about its launch alone.
    """

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    calls: Callable[[Mapping[str, Spec], Mapping[str, Attribute]], tuple[Call, ...]]
    tunings: Mapping[str, Tuning] = field(default_factory=dict)
