"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec, cdiv


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.causal_conv1d import kernel

    return kernel.calls(
        specs["zxbcdt"], specs["weight"], specs["bias"], specs["pads"], int(attributes["offset"])
    )


def grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """Pieces of channels by pieces of tokens."""
    return cdiv(sizes["C"], sizes["BLOCK"]), cdiv(sizes["length"], sizes["ROWS"])


FACE = KernelFace(
    ("zxbcdt", "weight", "bias", "pads"), ("y", "state"), calls,
    {"causal_conv1d": Tuning(("ROWS", "BLOCK"), grid)},
)
