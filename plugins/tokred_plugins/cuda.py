"""On CUDA tensors the torch ops run their Triton kernels, once :func:`register` was called.

Importing this module needs no Triton; registering does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

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
        made = run(face.calls(specs, given), tensors)
        results = tuple(made[name] for name in face.results)
        return results if len(results) > 1 else results[0]

<<<<<<< HEAD
    return on_cuda
=======
def _gated_rms_norm(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, group_size: int, eps: float, norm_before_gate: bool
) -> Tensor:
    from tokred_plugins.gated_rms_norm.kernel import calls
    from tokred_plugins.kernels import run, spec_of

    given = {"y": y, "zxbcdt": zxbcdt, "weight": weight}
    specs = map(spec_of, given.values())
    return run(calls(*specs, group_size, eps, norm_before_gate), given)["out"]


def _causal_conv1d(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, pads: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    from tokred_plugins.causal_conv1d.kernel import calls
    from tokred_plugins.kernels import run, spec_of

    given = {"zxbcdt": zxbcdt, "weight": weight, "bias": bias, "pads": pads}
    made = run(calls(*map(spec_of, given.values()), offset), given)
    return made["y"], made["state"]


def _ssd_scan(
    xbc: Tensor, zxbcdt: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor, pads: Tensor,
    initial_state: Tensor | None, n_groups: int, d_state: int, chunk_size: int,
    dt_min: float, dt_max: float,
) -> tuple[Tensor, Tensor]:
    # chunk_size is a matter of speed only, and the kernels have their own.
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.ssd_scan.launches import calls

    given = {
        "xbc": xbc, "zxbcdt": zxbcdt, "dt_bias": dt_bias, "a_log": a_log, "d": d, "pads": pads,
        "initial_state": initial_state,
    }
    specs = [x if x is None else spec_of(x) for x in given.values()]
    major, minor = torch.cuda.get_device_capability(xbc.device)
    target = 10 * major + minor
    made = run(calls(*specs, n_groups, d_state, dt_min, dt_max, target=target), given)
    return made["y"], made["state"]


def _token_importance(y: Tensor) -> Tensor:
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.token_importance.kernel import calls

    return run(calls(spec_of(y)), {"y": y})["scores"]


def _token_split(
    scores: Tensor, pads: Tensor, count: int, protect: int
) -> tuple[Tensor, Tensor]:
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.token_split.kernel import calls

    given = {"scores": scores, "pads": pads}
    made = run(calls(spec_of(scores), spec_of(pads), count, protect), given)
    return made["lower"], made["upper"]


def _token_match(hidden: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.token_match.kernel import calls

    given = {"hidden": hidden, "lower": lower, "upper": upper}
    made = run(calls(*map(spec_of, given.values())), given)
    return made["similarity"], made["target"]


def _token_link(
    similarity: Tensor, target: Tensor, lower: Tensor, upper: Tensor, pads: Tensor,
    removed: int, prune_permille: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.token_link.kernel import calls

    given = {
        "similarity": similarity, "target": target, "lower": lower, "upper": upper, "pads": pads
    }
    made = run(calls(*map(spec_of, given.values()), removed, prune_permille), given)
    return made["src"], made["dst"], made["merge"], made["keep"]


def _token_reduce(
    hidden: Tensor, residual: Tensor, keep: Tensor, src: Tensor, dst: Tensor, merge: Tensor
) -> tuple[Tensor, Tensor]:
    from tokred_plugins.kernels import run, spec_of
    from tokred_plugins.token_reduce.kernel import calls

    given = {
        "hidden": hidden, "residual": residual, "keep": keep, "src": src, "dst": dst,
        "merge": merge,
    }
    made = run(calls(*map(spec_of, given.values())), given)
    return made["hidden_out"], made["residual_out"]


# Op name in tokred_plugins.opset.OpSet -> what runs it on CUDA.
FUNCTIONS = {
    "add_rms_norm": _add_rms_norm,
    "gated_rms_norm": _gated_rms_norm,
    "causal_conv1d": _causal_conv1d,
    "ssd_scan": _ssd_scan,
    "token_importance": _token_importance,
    "token_split": _token_split,
    "token_match": _token_match,
    "token_link": _token_link,
    "token_reduce": _token_reduce,
}
>>>>>>> kernels
