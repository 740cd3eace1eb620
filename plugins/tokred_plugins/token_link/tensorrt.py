"""The GPU face: one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, KernelFace
from tokred_plugins.kernels import Call, Spec

INPUTS = ("similarity", "target", "lower", "upper", "pads")


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.token_link import kernel

    return kernel.calls(
        *(specs[name] for name in INPUTS), int(attributes["removed"]),
        int(attributes["prune_permille"]),
    )


FACE = KernelFace(INPUTS, ("src", "dst", "merge", "keep"), calls)
