"""The GPU face: two kernels."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec, cdiv


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; with norms of ``hidden``, if that is there."""
    from tokred_plugins.token_split import kernel

    return kernel.calls(
        specs["scores"], specs["pads"], int(attributes["count"]), int(attributes["protect"]),
        hidden=specs.get("hidden"),
    )


def rank_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """A few tokens a program."""
    return cdiv(sizes["length"], sizes["MINE"]), 1


def place_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """More tokens a program."""
    return cdiv(sizes["length"], sizes["TOKENS"]), 1


def place_norm_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """The same, and then a few rows a program."""
    return place_grid(sizes, now)[0] + cdiv(sizes["length"], sizes["ROWS"]), 1


def search_norm_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """One program, and then a few rows a program."""
    return 1 + cdiv(sizes["length"], sizes["ROWS"]), 1


FACE = KernelFace(
    ("scores", "pads"), ("lower", "upper"), calls,
    {
        "token_split_rank": Tuning(("MINE", "OTHERS"), rank_grid),
        "token_split": Tuning(("TOKENS", "OTHERS"), place_grid),
        "token_split_norm": Tuning(("TOKENS", "OTHERS", "ROWS", "PIECE"), place_norm_grid),
        "token_split_search_norm": Tuning(("ROWS", "PIECE"), search_norm_grid),
    },
)
