"""The GPU face: one kernel, for few rows or for many."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Constant, Spec, cdiv


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launch for tensors of these shapes; see the kernel's own ``calls``."""
    from tokred_plugins.linear import kernel

    return kernel.calls(
        specs["x"], specs["weight"], bool(attributes["turned"]), bool(attributes["flat"]),
        squares=specs.get("squares"), eps=float(attributes.get("eps", 0.0)),
    )


def grid(sizes: Mapping[str, Constant], now: Grid) -> Grid | None:
    """Tiles of the result, or the programs that stay for all tiles."""
    if sizes["PROGRAMS"]:
        from tokred_plugins.linear.kernel import described

        return (sizes["PROGRAMS"], 1) if described(sizes, sizes["CLUSTER"]) else None
    tiles = cdiv(sizes["length"], sizes["BLOCK_M"]) * cdiv(sizes["N"], sizes["BLOCK_N"])
    return tiles, 1


def few_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """Pieces of the columns."""
    return cdiv(sizes["N"], sizes["BLOCK_N"]), 1


BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
FACE = KernelFace(
    ("x", "weight", "squares"), ("y",), calls,
    {
        "linear": Tuning((*BLOCKS, "GROUP", "PROGRAMS", "CLUSTER"), grid, ("PROGRAMS",)),
        "linear_few": Tuning(BLOCKS, few_grid),
    },
)
