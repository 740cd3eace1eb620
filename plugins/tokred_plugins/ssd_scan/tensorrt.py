"""The GPU face: several kernels; with or without an initial state."""

from __future__ import annotations

from collections.abc import Mapping

from tokred_plugins.faces import MULTIPROCESSORS, Attribute, Grid, KernelFace, Tuning
from tokred_plugins.kernels import Call, Spec, cdiv


def calls(specs: Mapping[str, Spec], attributes: Mapping[str, Attribute]) -> tuple[Call, ...]:
    """The launches for tensors of these shapes; the kernels have a chunk size of their own."""
    from tokred_plugins.ssd_scan import launches

    known = attributes.get("multiprocessors", MULTIPROCESSORS)
    return launches.calls(
        specs["xbc"], specs["zxbcdt"], specs["dt_bias"], specs["a_log"], specs["d"],
        specs["pads"], specs.get("initial_state"), int(attributes["n_groups"]),
        int(attributes["d_state"]), float(attributes["dt_min"]), float(attributes["dt_max"]),
        target=attributes.get("target"), multiprocessors=int(known),
        **{name: bool(attributes.get(name, False)) for name in ("scratch", "gated", "scored")},
    )


def steps_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """Pieces of heads by chunks."""
    return cdiv(sizes["H"], sizes["BLOCK"]), now[1]


def scan_grid(sizes: Mapping[str, int], now: Grid) -> Grid | None:
    """Heads a program, which share a group's B and C."""
    if (sizes["H"] // sizes["G"]) % sizes["HEADS"]:
        return None
    return sizes["H"] // sizes["HEADS"], now[1]


def walk_grid(sizes: Mapping[str, int], now: Grid) -> Grid | None:
    """Programs that walk heads, some sharing walks."""
    from tokred_plugins.ssd_scan.launches import walk_programs

    programs = walk_programs(sizes["H"], sizes["G"], sizes)
    return (programs, now[1]) if programs else None


def chunk_scan_grid(sizes: Mapping[str, int], now: Grid) -> Grid | None:
    """Heads a program by pieces of the sequence, a chunk being whole pieces."""
    if (sizes["H"] // sizes["G"]) % sizes["HEADS"] or sizes["Q"] % sizes["ROWS"]:
        return None
    return sizes["H"] // sizes["HEADS"], cdiv(sizes["length"], sizes["ROWS"])


def pass_grid(sizes: Mapping[str, int], now: Grid) -> Grid:
    """Heads by pieces of the state."""
    return now[0], cdiv(sizes["P"] * sizes["N"], sizes["BLOCK"])


# The chunk Q is in the shapes of the tensors between the kernels: it stays.
FACE = KernelFace(
    ("xbc", "zxbcdt", "dt_bias", "a_log", "d", "pads", "initial_state"), ("y", "state"), calls,
    {
        "ssd_steps": Tuning(("BLOCK",), steps_grid),
        "ssd_scan": Tuning(("HEADS",), scan_grid),
        "ssd_scan_hopper": Tuning(("HEADS", "WALKS", "SPLIT"), walk_grid),
        "ssd_scan_hopper_gated": Tuning(("HEADS", "WALKS", "SPLIT"), walk_grid),
        "ssd_scan_hopper_scored": Tuning(("HEADS", "WALKS", "SPLIT"), walk_grid),
        "ssd_pass": Tuning(("BLOCK", "AHEAD"), pass_grid),
        "ssd_chunk_scan": Tuning(("ROWS", "HEADS"), chunk_scan_grid),
    },
)
