"""The GPU face: several kernels."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import MULTIPROCESSORS, ROW_TUNING, Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec, cdiv


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; none for norms where ``inverse`` is among them."""
    from tokred_plugins.token_match import kernel

    processors = int(attributes.get("multiprocessors", MULTIPROCESSORS))
    return kernel.calls(
        specs["hidden"], specs["lower"], specs["upper"], programs=kernel.EACH * processors,
        inverse=specs.get("inverse"), target=attributes.get("target"),
    )


def match_grid(sizes: Mapping[str, int], now: Grid) -> Grid | None:
    """Pieces of the lower half by parts of the upper, which must be whole tiles."""
    if sizes["share"] % sizes["BLOCK_B"]:
        return None
    return cdiv(sizes["n_lower"], sizes["BLOCK_A"]), now[1]


def best_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """Pieces of the lower half."""
    return cdiv(sizes["n_lower"], sizes["BLOCK"]), 1


FACE = KernelFace(
    ("hidden", "lower", "upper"), ("similarity", "target"), calls,
    {
        "token_norm": ROW_TUNING,
        "token_match": Tuning(("BLOCK_A", "BLOCK_B", "BLOCK_D"), match_grid),
        "token_match_best": Tuning(("BLOCK",), best_grid),
    },
)
