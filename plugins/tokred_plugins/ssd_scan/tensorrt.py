"""The GPU face: several kernels; with or without an initial state."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; the kernels have a chunk size of their own."""
    from tokred_plugins.ssd_scan import launches

    return launches.calls(
        specs["xbc"], specs["zxbcdt"], specs["dt_bias"], specs["a_log"], specs["d"],
        specs["pads"], specs.get("initial_state"), int(attributes["n_groups"]),
        int(attributes["d_state"]), float(attributes["dt_min"]), float(attributes["dt_max"]),
    )


FACE = KernelFace(
    ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads", "initial_state"), ("y", "state"), calls
)
