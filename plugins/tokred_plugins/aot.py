"""Ahead-of-time compilation: a Call becomes PTX and the facts needed to launch it, with no GPU.

The parameters of the PTX entry are the kernel's inputs, int32 extras and outputs, in that
order, and nothing else. Triton appends two pointers of its own (global and profile scratch).
They are taken out of the entry, since TensorRT passes only what it knows; only a kernel that
builds tensor descriptors keeps the first. ``strip=False`` leaves both in: then the caller passes
them, null where no scratch memory is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tokred_plugins.kernels import ANY, Call, Spec

# Lowest PTX version that knows the target. A driver refuses newer PTX than its own, and those
# of JetPack 6 and of the first CUDA 12 releases read 8.2.
PTX_VERSIONS = {
    80: 82, 86: 82, 87: 82, 89: 82, 90: 82, 100: 86, 103: 88, 110: 90, 120: 87, 121: 88,
}
# Tensor descriptors are made with instructions of PTX 8.3; but for all before 8.6
# Triton counts strides in units of 16 bytes, and the compiler of today's drivers in bytes.
DESCRIPTORS_SINCE = 86
DESCRIPTORS_DRIVER = 12070  # CUDA 12.7 is the first to read it
# Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities).
SHARED_LIMITS = {
    80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448,
    103: 232_448, 110: 232_448, 120: 101_376, 121: 101_376,
}
HIDDEN_POINTERS = 2


class DoesNotFit(ValueError):
    """A tactic needs what the GPU has not: more shared memory in a block, or newer units."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a PTX entry.

    Attributes:
        name: as in the kernel.
        role: "input" and "output" are pointers aligned to 16 bytes, "extra" is an int32.
        dtype: of the tensor behind a pointer; "i32" for an extra.
        value: of an extra.
        shape: of an output, the batch first.
    """

    name: str
    role: str
    dtype: str
    value: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Compiled:
    """A kernel as TensorRT or the driver takes it.

    Attributes:
        name: of the kernel.
        tactic: the block sizes and launch options inside the PTX, to be read by people.
        target: compute capability times ten; from 90 on the code runs on that one alone.
        ptx_version: what the driver must read, times ten.
        entry: name of the function in the PTX.
        grid: blocks along x and y; z is the batch.
        block: threads in a block, exactly.
        shared: bytes of dynamic shared memory. Above 49152 the launcher must ask the driver
            for it (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
        hidden: Triton's own pointers after the parameters; those of them that nothing reads
            are stripped.
        scratch: bytes of global memory for each block of the grid, aligned to 128; the first
            hidden pointer is where they begin, null where there are none.
        parameters: in the entry's order.
        ptx: the code.
    """

    name: str
    tactic: str
    target: int
    ptx_version: int
    entry: str
    grid: tuple[int, int]
    block: int
    shared: int
    hidden: int
    parameters: tuple[Parameter, ...]
    ptx: str
    scratch: int = 0

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Compiled:
        """What :meth:`to_json` wrote."""
        fields = json.loads(text)
        parameters = tuple(
            Parameter(**{**p, "shape": p["shape"] if p["shape"] is None else tuple(p["shape"])})
            for p in fields["parameters"]
        )
        return cls(**{**fields, "grid": tuple(fields["grid"]), "parameters": parameters})


def compile_call(call: Call, target: int, strip: bool = True) -> Compiled:
    """Compile one call for one GPU generation.

    Args:
        call: shapes, dtypes and tactic, from an op's ``calls``.
        target: compute capability times ten, a key of ``PTX_VERSIONS``.
        strip: take Triton's two hidden pointers out of the entry.

    Raises:
        ValueError: an unknown target.
        DoesNotFit: a tactic that needs more shared memory than the target has, or a newer GPU.
        ImportError: Triton is not installed.
        RuntimeError: Triton made a kernel that cannot be launched by its parameters alone.
    """
    if target not in PTX_VERSIONS:
        known = ", ".join(map(str, PTX_VERSIONS))
        raise ValueError(f"no kernels for compute capability {target / 10}; choose from {known}")
    since, until = call.tactic.since, call.tactic.until
    if not since <= target <= until:
        last = " and later" if until == ANY else "" if until == since else f" to {until / 10}"
        raise DoesNotFit(
            f"{call.kernel.name} with {call.tactic} is for compute capability {since / 10}{last}, "
            f"not {target / 10}"
        )
    ptx, metadata = _to_ptx(call, target)
    limit = SHARED_LIMITS[target]
    if metadata["shared"] > limit:
        raise DoesNotFit(
            f"{call.kernel.name} with {call.tactic} needs {metadata['shared']} bytes of shared "
            f"memory, and a block of sm_{target} has at most {limit}; choose a smaller tactic"
        )
    if metadata.get("profile_scratch_size") or metadata.get("global_scratch_align", 1) > 128:
        raise RuntimeError(f"{call.kernel.name} needs scratch memory of a kind that nobody passes")
    parameters = _parameters(call)
    compiled = Compiled(
        name=call.kernel.name, tactic=str(call.tactic), target=target,
        ptx_version=_written_version(ptx), entry=metadata["name"], grid=call.grid,
        block=_block_size(ptx), shared=metadata["shared"], hidden=HIDDEN_POINTERS,
        parameters=parameters, ptx=ptx, scratch=metadata.get("global_scratch_size") or 0,
    )
    found = len(_entry_parameters(compiled))
    if found != len(parameters) + HIDDEN_POINTERS:
        raise RuntimeError(
            f"{compiled.entry} has {found} parameters, expected {len(parameters)} and Triton's "
            f"{HIDDEN_POINTERS}; this Triton release lays kernels out differently"
        )
    return strip_hidden(compiled) if strip else compiled


def compile_key(call: Call) -> str:
    """Equal for calls that compile to the same code: extras, grid and lengths are not in it."""
    dtypes = [*call.inputs.items(), *((n, spec.dtype) for n, spec in call.outputs.items())]
    return repr((call.kernel.name, dtypes, sorted(call.constants.items()), str(call.tactic)))


def strip_hidden(compiled: Compiled) -> Compiled:
    """The same kernel without the trailing pointers that it never reads.

    Raises:
        RuntimeError: the code does read one of them.
    """
    declared = _entry_parameters(compiled)
    ptx = compiled.ptx
    head, body = ptx[: ptx.index(")")], ptx[ptx.index(")") :]
    hidden = 1 if compiled.scratch else 0
    kept = len(declared) - compiled.hidden + hidden
    for name in declared[kept:]:
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise RuntimeError(f"{compiled.entry} reads {name}, which nobody passes")
    opening = head.rindex("(")
    lines = [line.rstrip(", \n") for line in head[opening + 1 :].split("\n") if line.strip()]
    head = head[: opening + 1] + "\n" + ",\n".join(lines[:kept]) + "\n"
    return replace(compiled, hidden=hidden, ptx=head + body)


def source_of(call: Call) -> Any:  # noqa: ANN401  Triton is imported late
    """Triton's description of the call: signature, constants, 16-byte aligned pointers."""
    from triton.compiler import ASTSource

    kernel = call.kernel
    types = {name: "*" + dtype for name, dtype in call.inputs.items()}
    types |= {name: "i32" for name in kernel.extras}
    types |= {name: "*" + spec.dtype for name, spec in call.outputs.items()}
    names = kernel.fn.arg_names
    return ASTSource(
        fn=kernel.fn,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(call.constexprs),
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names) if types.get(name, "").startswith("*")
        },
    )


def _to_ptx(call: Call, target: int) -> tuple[str, dict]:
    """Triton's own stages up to PTX: ``triton.compile`` would go on to ptxas, which need not
    know the target here, and which takes longer than all the rest."""
    if call.tactic.ptx:
        written = call.kernel.write(call)
        return written.ptx, {
            "name": written.entry, "shared": written.shared,
            "global_scratch_size": written.scratch,
        }
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    options = backend.parse_options({
        "num_warps": call.tactic.num_warps, "num_stages": call.tactic.num_stages,
        "ptx_version": _ptx_version(call, target), "enable_fp_fusion": True,
    })
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = source_of(call)
    metadata = {"target": gpu, **vars(options)}
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    made = source.make_ir(
        gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    for name, stage in stages.items():
        if name == "cubin":
            break
        made = stage(made, metadata)
    return made, metadata


def _ptx_version(call: Call, target: int) -> int:
    """What the call is compiled to, times ten."""
    least = DESCRIPTORS_SINCE if call.tactic.since >= 90 else 0
    return max(PTX_VERSIONS[target], least)


def _parameters(call: Call) -> tuple[Parameter, ...]:
    inputs = [Parameter(n, "input", call.inputs[n]) for n in call.kernel.inputs if n in call.inputs]
    extras = [Parameter(n, "extra", "i32", value=call.extras[n]) for n in call.kernel.extras]
    made: Mapping[str, Spec] = call.outputs
    outputs = [
        Parameter(n, "output", made[n].dtype, shape=made[n].shape) for n in call.kernel.outputs
    ]
    return (*inputs, *extras, *outputs)


def _entry_parameters(compiled: Compiled) -> list[str]:
    """Names of the entry's parameters."""
    entry = re.search(rf"\.entry\s+{re.escape(compiled.entry)}\s*\(([^)]*)\)", compiled.ptx)
    if entry is None:
        raise RuntimeError(f"no entry {compiled.entry} in the PTX that Triton wrote")
    return re.findall(r"\.param\s[^,\n]*?(\w+)\s*(?:,|$)", entry[1], flags=re.MULTILINE)


def _written_version(ptx: str) -> int:
    major, minor = re.search(r"^\.version (\d+)\.(\d+)", ptx, flags=re.MULTILINE).groups()
    return int(major) * 10 + int(minor)


def _block_size(ptx: str) -> int:
    """Threads that the code insists on; warp-specialised kernels have more than their warps."""
    return int(re.search(r"^\.reqntid (\d+)", ptx, flags=re.MULTILINE)[1])
