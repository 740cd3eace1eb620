"""The GPU face: one kernel, with the norm after it or without."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec

INPUTS = ("hidden", "residual", "keep", "src", "dst", "merge")


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; a ``weight`` adds the norm that reads both."""
    from tokred_plugins.token_reduce import kernel

    return kernel.calls(
        *(specs[name] for name in INPUTS), weight=specs.get("weight"),
        eps=float(attributes.get("eps", 0.0)),
    )


TUNING = Tuning(free=("BLOCK", "TARGETS", "SOURCES"))
FACE = KernelFace(
    INPUTS, ("hidden_out", "residual_out"), calls,
    {"token_reduce": TUNING, "token_reduce_norm": TUNING},
)
