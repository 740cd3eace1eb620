"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.causal_conv1d import kernel

    return kernel.calls(
        specs["zxbcdt"], specs["weight"], specs["bias"], specs["pads"], int(attributes["offset"])
    )


FACE = KernelFace(("zxbcdt", "weight", "bias", "pads"), ("y", "state"), calls)
