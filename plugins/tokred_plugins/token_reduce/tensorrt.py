"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec

INPUTS = ("hidden", "residual", "keep", "src", "dst", "merge")


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.token_reduce import kernel

    return kernel.calls(*(specs[name] for name in INPUTS))


FACE = KernelFace(
    INPUTS, ("hidden_out", "residual_out"), calls,
    {"token_reduce": Tuning(free=("BLOCK", "TARGETS", "SOURCES"))},
)
