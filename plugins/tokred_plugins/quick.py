"""TensorRT's quick plugins (>= 10.15): our kernels inside an engine, with no library and no Python.

One plugin serves all nodes of a kernel variant; a node's attribute ``call`` says the rest. While
TensorRT builds, it asks a plugin for its outputs (``describe``), for candidates to time (``tune``)
and for the code and launch of each (``code``). The engine then holds the PTX, and attributes
and this module are not needed to run it.

:func:`register` is called before the ONNX file is parsed, with the calls that
``quick_file.read_calls`` finds in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from tokred_plugins.aot import PTX_VERSIONS, Compiled, DoesNotFit, compile_call, compile_key
from tokred_plugins.kernels import Call
from tokred_plugins.names import DOMAIN
from tokred_plugins.quick_file import ATTRIBUTE, parse_call
from tokred_plugins.retune import candidates

# Our dtype -> TensorRT's own, and how an AutoTuneCombination spells it.
_DTYPES = {
    "fp32": ("float32", "FP32"), "fp16": ("float16", "FP16"), "bf16": ("bfloat16", "BF16"),
    "i32": ("int32", "INT32"), "i1": ("bool", "BOOL"),
}
# Plugin -> the target its kernels are compiled for. TensorRT's registry is one a process and
# keeps what it is given, so this has to be one too.
_registered: dict[str, int] = {}
_compiled: dict[tuple[str, int], Compiled | DoesNotFit] = {}


def register(calls: Iterable[Call], target: int) -> None:
    """Register one plugin a kernel variant; again changes nothing.

    Args:
        calls: any call of each variant; it says what the inputs and outputs are.
        target: compute capability times ten of the GPU that the engine is built on.

    Raises:
        ValueError: a GPU that kernels cannot be compiled for, or plugins that this process has
            registered for another one.
        ImportError: TensorRT or Triton is not installed.
    """
    from tokred_plugins.registry import variant_name

    if target not in PTX_VERSIONS:
        known = ", ".join(map(str, PTX_VERSIONS))
        raise ValueError(f"no kernels for compute capability {target / 10}; choose from {known}")
    for call in calls:
        name = variant_name(call)
        before = _registered.get(name)
        if before is None:
            _register_variant(name, call, target)
            _registered[name] = target
        elif before != target:
            raise ValueError(
                f"{DOMAIN}::{name} is registered for sm_{before} in this process, expected "
                f"sm_{target}; build for each GPU in a process of its own"
            )


def choices(call: Call, target: int) -> tuple[Call, ...]:
    """The call with each tactic that fits the target's shared memory, its own first.

    Raises:
        ValueError: none fits.
    """
    fitting = tuple(c for c in candidates(call) if isinstance(_compile(c, target), Compiled))
    if not fitting:
        raise ValueError(f"no tactic fits: {_compile(call, target)}")
    return fitting


def _compile(call: Call, target: int) -> Compiled | DoesNotFit:
    """Layers of one model share their kernels: each is compiled once a process."""
    key = (compile_key(call), target)
    if key not in _compiled:
        try:
            compiled = compile_call(call, target)
            if compiled.scratch:
                raise DoesNotFit(f"{call.kernel.name} with {call.tactic} wants scratch memory, "
                                 "and TensorRT hands quick plugins none")
            _compiled[key] = compiled
        except DoesNotFit as error:
            _compiled[key] = error
    return _compiled[key]


def _register_variant(name: str, call: Call, target: int) -> None:
    """One plugin: TensorRT calls the three functions below with its own descriptions of tensors."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    @cache
    def chosen(text: str) -> tuple[Call, ...]:
        return choices(parse_call(text, name, len(call.inputs)), target)

    def describe(*tensors: Any, **attributes: str) -> tuple[Any, ...]:  # noqa: ANN401
        return _describe(trt, trtp, parse_call(attributes[ATTRIBUTE], name, len(tensors)), tensors)

    def tune(*values: Any) -> list[Any]:  # noqa: ANN401
        *_, text, _outputs = values
        return [_combination(trtp, chosen(text))]

    def code(*values: Any) -> tuple[str, str, Any, Any]:  # noqa: ANN401
        first, *_, text, _outputs, number = values
        # 0 is TensorRT's number for "no choice was offered".
        mine = chosen(text)[max(number - 1, 0)]
        return _code(trtp, mine, _compile(mine, target), first.shape_expr[0])

    identity = f"{DOMAIN}::{name}"
    given = {n: trtp.TensorDesc for n in call.inputs} | {ATTRIBUTE: str}
    made = {"outputs": tuple[(trtp.TensorDesc,) * len(call.outputs)]}
    launch = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(identity)(_signed(describe, given, made["outputs"]))
    trtp.autotune(identity)(_signed(tune, given | made, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(identity)(_signed(code, given | made | {"tactic": int}, launch))


def _signed(function: Callable, parameters: Mapping[str, Any], returns: object) -> Callable:
    """The function with the signature that NVIDIA's decorators read a plugin's form from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=t) for name, t in parameters.items()],
        return_annotation=returns,
    )
    return function


def _describe(
    trt: ModuleType, trtp: ModuleType, call: Call, tensors: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The outputs: only the batch is open, and it is the first input's."""
    batch = tensors[0].shape_expr[0]
    return tuple(
        trtp.from_shape_expr((batch, *spec.shape[1:]), getattr(trt, _DTYPES[spec.dtype][0]))
        for spec in call.outputs.values()
    )


def _combination(trtp: ModuleType, fitting: tuple[Call, ...]) -> Any:  # noqa: ANN401
    """One combination of dtypes, row-major, and its tactics numbered from 1."""
    call = fitting[0]
    dtypes = [*call.inputs.values(), *(spec.dtype for spec in call.outputs.values())]
    return trtp.AutoTuneCombination(
        ", ".join(_DTYPES[dtype][1] for dtype in dtypes), "LINEAR",
        list(range(1, len(fitting) + 1)),
    )


def _code(
    trtp: ModuleType, call: Call, compiled: Compiled, batch: Any  # noqa: ANN401
) -> tuple[str, str, Any, Any]:
    """Entry, PTX, launch and extras. Only the code is ``compiled``'s: that is shared with calls
    of other lengths."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = call.grid
    launch.grid_z = batch
    launch.block_x = compiled.block
    launch.shared_mem = compiled.shared
    values = [call.extras[name] for name in call.kernel.extras]
    extras = trtp.SymIntExprs(len(values))
    for i, value in enumerate(values):
        # TensorRT refuses any other class here, the one that an int becomes by itself included.
        extras[i] = trtp.SymInt32(value)
    return compiled.entry, compiled.ptx, launch, extras
