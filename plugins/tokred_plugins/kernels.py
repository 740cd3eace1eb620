"""What a GPU kernel is, and one launch of it: the one description that everything else reads.

A :class:`Kernel` has its parameters in the order that TensorRT's quick plugins fix: input
pointers, int32 extras, output pointers. What a graph decides for good (row strides, sizes of a
row, epsilon) is a compile-time constant; token counts are extras, so that layers of different
length share one compiled kernel. Nothing else is passed, no float scalars; but kernels that make
tensor descriptors are handed scratch memory for them.
An intermediate between two kernels is an output of the first and an input of the second.

A :class:`Call` is a kernel with all of that decided for given shapes. The same calls are
launched directly on torch tensors (:func:`run`), compiled ahead of time (``aot.py``), and
handed to TensorRT. Importing this module needs neither torch nor Triton.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokred_plugins import ptx

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Constant = int | float | bool | str

# How a matrix product of float32 operands runs: three TF32 products, near float32 precision
# on the tensor cores. Plain float32 ("ieee") spills tens of kilobytes of registers here.
# 16-bit operands multiply exactly; the setting has no effect on them.
PRECISION = {"fp32": "tf32x3", "fp16": "tf32", "bf16": "tf32"}


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and its dtype in Triton's spelling (fp32, fp16, bf16, i32, i1)."""

    shape: tuple[int, ...]
    dtype: str


ANY = 999  # above every compute capability


@dataclass(frozen=True)
class Tactic:
    """One way to run a kernel: block sizes and launch options, with the same result.

    Attributes:
        blocks: compile-time constants by name.
        num_warps: warps of a block.
        num_stages: depth of software pipelines.
        since: least compute capability, times ten, that it is for.
        until: last one that it is for.
        ptx: the kernel writes the code of it, which Triton could not.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    since: int = 0
    until: int = ANY
    ptx: bool = False

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Written:
    """PTX that did not come from Triton, with the entry's parameters as Triton lays them out.

    Attributes:
        ptx: the code; its entry also takes Triton's two pointers of its own, last.
        entry: name of the function.
        shared: bytes of dynamic shared memory.
        scratch: bytes of global memory for each block, aligned to 128, at the first of the two.
    """

    ptx: str
    entry: str
    shared: int
    scratch: int


@dataclass(frozen=True)
class Kernel:
    """A Triton function whose parameters are inputs, extras, outputs, then constants.

    Attributes:
        name: unique among all kernels.
        fn: the ``triton.jit`` function; its parameters carry the names below. None where all
            code is written.
        inputs: pointers read; the first has the batch as its first dimension.
        extras: int32 scalars.
        outputs: pointers written, every element of them.
        tactics: candidates; the first suits 16-bit tensors of every shape that the kernel takes.
        write: the code of a call whose tactic is PTX.
    """

    name: str
    fn: Any
    inputs: tuple[str, ...]
    extras: tuple[str, ...]
    outputs: tuple[str, ...]
    tactics: tuple[Tactic, ...]
    write: Callable[[Call], Written] | None = None

    @property
    def code(self) -> str:
        """Changes with the source of what runs, the functions that it calls included."""
        sources = [] if self.write is None else [*_modules_of(self.write), ptx]
        written = "".join(map(inspect.getsource, sources))
        compiled = "" if self.fn is None else self.fn.cache_key
        return compiled + hashlib.sha256(written.encode()).hexdigest()


def _modules_of(function: Callable) -> list[ModuleType]:
    """The function's module, and those inside it where it is a package."""
    name = function.__module__
    found = [n for n in sys.modules if n == name or n.startswith(f"{name}.")]
    return [sys.modules[n] for n in sorted(found)]


@dataclass(frozen=True)
class Call:
    """One launch of a kernel with everything but the pointers decided.

    Attributes:
        kernel: what runs.
        inputs: dtype of each input; an optional input that is absent has no entry, and the
            compiled kernel has no parameter for it.
        extras: value of each int32 extra.
        outputs: full shape and dtype of each output; the first dimension is the batch.
        constants: the compile-time constants that the model decides.
        tactic: the chosen block sizes and launch options.
        grid: blocks along x and y; z is the batch.
    """

    kernel: Kernel
    inputs: Mapping[str, str]
    extras: Mapping[str, int]
    outputs: Mapping[str, Spec]
    constants: Mapping[str, Constant]
    tactic: Tactic
    grid: tuple[int, int]
    constexprs: Mapping[str, Constant | None] = field(init=False)

    def __post_init__(self) -> None:
        absent = {name: None for name in self.kernel.inputs if name not in self.inputs}
        merged = {**absent, **self.constants, **self.tactic.blocks}
        object.__setattr__(self, "constexprs", merged)


def launch(call: Call, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run one call on contiguous CUDA tensors, or on CPU tensors in Triton's interpreter.

    Returns:
        The outputs by name, freshly allocated.
    """
    import torch

    kernel = call.kernel
    first = tensors[kernel.inputs[0]]
    dtypes = torch_dtypes()
    made = {
        name: torch.empty(spec.shape, dtype=dtypes[spec.dtype], device=first.device)
        for name, spec in call.outputs.items()
    }
    launch_into(call, tensors, made)
    return made


def launch_into(call: Call, tensors: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """:func:`launch` into tensors that exist already."""
    kernel = call.kernel
    given = [tensors[name] if name in call.inputs else None for name in kernel.inputs]
    made = [outputs[name] for name in kernel.outputs]
    if call.tactic.ptx:
        from tokred_plugins.driver import launch_ptx

        return launch_ptx(call, [x for x in given if x is not None], made)
    extras = [call.extras[name] for name in kernel.extras]
    constants = {k: v for k, v in call.constexprs.items() if v is not None}
    if call.tactic.since >= 90:
        _give_scratch(given[0].device)
    kernel.fn[(*call.grid, given[0].shape[0])](
        *given, *extras, *made, **constants,
        num_warps=call.tactic.num_warps, num_stages=call.tactic.num_stages,
    )


def _give_scratch(device: torch.device) -> None:
    """Let Triton take the scratch memory that tensor descriptors are built in from torch."""
    import torch
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def run(calls: Sequence[Call], tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Run calls in order, outputs of earlier ones being inputs of later ones.

    Args:
        calls: what an op's ``kernel.calls`` returned for these tensors.
        tensors: the op's inputs by name; None where an optional one is absent.

    Returns:
        Every tensor that a kernel wrote, by name.
    """
    values = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    made: dict[str, Tensor] = {}
    for call in calls:
        made |= launch(call, values | made)
    return made


def torch_dtypes() -> dict[str, Any]:
    """Triton's dtype name -> torch dtype."""
    import torch

    return {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
        "i32": torch.int32, "i1": torch.bool,
    }


def spec_of(tensor: Tensor) -> Spec:
    """The Spec of a torch tensor.

    Raises:
        TypeError: a dtype that no kernel takes.
    """
    for name, dtype in torch_dtypes().items():
        if tensor.dtype == dtype:
            return Spec(tuple(tensor.shape), name)
    raise TypeError(
        f"the GPU kernels take float32, float16, bfloat16, int32 and bool, found {tensor.dtype}; "
        "run other dtypes on the CPU"
    )


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def choose(kernel: Kernel, tactics: Mapping[str, Tactic] | None, default: Tactic) -> Tactic:
    """The tactic asked for by kernel name, or the default."""
    return (tactics or {}).get(kernel.name, default)
