"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import ROW_TUNING, Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; ``scores`` adds the importance of ``y``."""
    from tokred_plugins.gated_rms_norm import kernel

    return kernel.calls(
        specs["y"], specs["zxbcdt"], specs["weight"], int(attributes["group_size"]),
        float(attributes["eps"]), bool(attributes["norm_before_gate"]),
        scores=bool(attributes.get("scores", False)),
    )


FACE = KernelFace(
    ("y", "zxbcdt", "weight"), ("out",), calls,
    {"gated_rms_norm": ROW_TUNING, "gated_rms_norm_scores": ROW_TUNING},
)
