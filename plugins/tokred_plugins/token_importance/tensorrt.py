"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import ROW_TUNING, Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.token_importance import kernel

    return kernel.calls(specs["y"])


FACE = KernelFace(("y",), ("scores",), calls, {"token_importance": ROW_TUNING})
