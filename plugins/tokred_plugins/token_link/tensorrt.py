"""The GPU face: two kernels."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec, cdiv

INPUTS = ("similarity", "target", "lower", "upper", "pads")


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes."""
    from tokred_plugins.token_link import kernel

    return kernel.calls(
        *(specs[name] for name in INPUTS), int(attributes["removed"]),
        int(attributes["prune_permille"]),
    )


def rank_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """A few tokens of the lower half a program."""
    return cdiv(sizes["n_lower"], sizes["MINE"]), 1


def place_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """A few tokens of each half a program."""
    return cdiv(max(sizes["n_lower"], sizes["n_upper"]), sizes["TOKENS"]), 1


FACE = KernelFace(
    INPUTS, ("src", "dst", "merge", "keep"), calls,
    {
        "token_link_rank": Tuning(("MINE", "OTHERS"), rank_grid),
        "token_link": Tuning(("TOKENS", "OTHERS"), place_grid),
    },
)
