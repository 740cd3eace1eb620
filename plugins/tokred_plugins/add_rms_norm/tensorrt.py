"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import ROW_TUNING, Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.add_rms_norm import kernel

    return kernel.calls(
        specs["hidden"], specs["residual"], specs["weight"], float(attributes["eps"])
    )


FACE = KernelFace(
    ("hidden", "residual", "weight"), ("normed", "residual_out"), calls,
    {"add_rms_norm": ROW_TUNING},
)
