"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import ROW_TUNING, Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.embed_rms_norm import kernel

    return kernel.calls(
        specs["input_ids"], specs["table"], specs["weight"], float(attributes["eps"]),
        bool(attributes["residual_in_fp32"]),
    )


FACE = KernelFace(
    ("input_ids", "table", "weight"), ("normed", "residual"), calls,
    {"embed_rms_norm": ROW_TUNING},
)
