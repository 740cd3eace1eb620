"""Which of the scan's kernels run, and how, for given shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tokred_plugins.kernels import (
    PRECISION,
    Call,
    Kernel,
    Spec,
    Tactic,
    cdiv,
    choose,
    power_of_two,
)
from tokred_plugins.ssd_scan.kernel import ssd_scan_kernel, ssd_state_kernel, ssd_steps_kernel

# A large GPU's multiprocessors: one program each with three stages of loads, two with two.
MULTIPROCESSORS = 132

SSD_STEPS = Kernel(
    "ssd_steps", ssd_steps_kernel,
    ("zxbcdt", "dt_bias", "a_log", "pads"), ("length", "chunks"), ("steps",),
    tuple(Tactic({"BLOCK": block}, warps) for block, warps in ((16, 4), (32, 4), (16, 2), (8, 2))),
)
SSD_STATE = Kernel(
    "ssd_state", ssd_state_kernel,
    ("xbc", "zxbcdt", "dt_bias", "a_log", "pads"), ("length", "chunks", "segment"),
    ("steps", "added", "decay"),
    tuple(Tactic({}, warps, stages) for warps, stages in ((4, 3), (4, 2), (4, 1))),
)
SSD_SCAN = Kernel(
    "ssd_scan", ssd_scan_kernel,
    ("xbc", "d", "pads", "initial_state", "steps", "added", "decay"),
    ("length", "chunks", "segment"), ("y", "state"),
    tuple(
        Tactic({"Q": q, "HEADS": heads}, warps, stages)
        for q, heads, warps, stages in (
            (64, 1, 4, 3), (64, 1, 4, 2), (64, 2, 4, 2), (128, 1, 8, 2), (64, 1, 4, 1),
        )
    ),
)


def fitted(tactic: Tactic, heads_per_group: int) -> Tactic:
    """The tactic with as many heads a program as divide a group."""
    heads = math.gcd(tactic.blocks["HEADS"], heads_per_group)
    return Tactic({**tactic.blocks, "HEADS": heads}, tactic.num_warps, tactic.num_stages)


def count_segments(programs: int, length: int, chunk: int) -> int:
    """How many segments fill the GPU, with at least two chunks in each; their states cost
    another pass over x and B, which pays where half of the GPU would idle."""
    if 2 * programs >= MULTIPROCESSORS:
        return 1
    return max(1, min(cdiv(2 * MULTIPROCESSORS, programs), length // (2 * chunk)))


def scan_tactic(dtype: str, programs: int) -> Tactic:
    """Three stages of loads, or two where one wave then holds all programs; one for float32,
    whose stages are twice as large."""
    if dtype == "fp32":
        return SSD_SCAN.tactics[-1]
    return SSD_SCAN.tactics[MULTIPROCESSORS < programs <= 2 * MULTIPROCESSORS]


def calls(
    xbc: Spec, zxbcdt: Spec, dt_bias: Spec, a_log: Spec, d: Spec, pads: Spec,
    initial_state: Spec | None, n_groups: int, d_state: int, dt_min: float, dt_max: float,
    tactics: Mapping[str, Tactic] | None = None, segments: int | None = None,
) -> tuple[Call, ...]:
    """The launches of :func:`tokred_plugins.ssd_scan.op.ssd_scan`.

    Args:
        xbc, zxbcdt, dt_bias, a_log, d, pads, initial_state: the op's inputs.
        n_groups, d_state, dt_min, dt_max: the op's attributes.
        tactics: kernel name -> tactic, where not the default; the scan's decides the chunk.
        segments: how many pieces of the sequence run side by side; by default as many as fill
            a large GPU with the batch given here.

    Raises:
        ValueError: a sequence whose projection has 2^31 elements or more.
    """
    batch, length, channels = xbc.shape
    heads = dt_bias.shape[0]
    head_dim = (channels - 2 * n_groups * d_state) // heads
    if length * zxbcdt.shape[2] >= 2**31:
        raise ValueError(
            f"a sequence of {length} tokens x {zxbcdt.shape[2]} columns is too long for the "
            "scan's 32-bit offsets; split it"
        )
    default = scan_tactic(xbc.dtype, batch * heads)
    scan = fitted(choose(SSD_SCAN, tactics, default), heads // n_groups)
    chunk = scan.blocks["Q"]
    if segments is None:
        segments = count_segments(batch * heads // scan.blocks["HEADS"], length, chunk)
    chunks = cdiv(length, chunk)
    segment = cdiv(chunks, segments)  # in chunks
    segments = cdiv(chunks, segment)

    dtypes = {
        "xbc": xbc.dtype, "zxbcdt": zxbcdt.dtype, "dt_bias": dt_bias.dtype,
        "a_log": a_log.dtype, "d": d.dtype, "pads": pads.dtype, "steps": "fp32",
    }
    if initial_state is not None:
        dtypes["initial_state"] = initial_state.dtype
    sizes = {
        "H": heads, "P": head_dim, "G": n_groups, "N": d_state,
        "PRECISION": PRECISION[xbc.dtype],
        "BLOCK_P": power_of_two(head_dim, 16), "BLOCK_N": power_of_two(d_state, 16),
    }
    steps = {"Z": zxbcdt.shape[2], "DT_MIN": dt_min, "DT_MAX": dt_max, "Q": chunk}
    extras = {"length": length, "chunks": chunks, "segment": segment}
    outputs = {"steps": Spec((batch, heads, chunks * chunk, 2), "fp32")}
    if segments == 1:
        tactic = choose(SSD_STEPS, tactics, SSD_STEPS.tactics[0])
        grid = (cdiv(heads, tactic.blocks["BLOCK"]), chunks)
        first = _call(SSD_STEPS, dtypes, extras, outputs, {"H": heads, **steps}, tactic, grid)
    else:
        part = (batch, segments - 1, heads)
        outputs["added"] = Spec((*part, d_state, head_dim), "fp32")
        outputs["decay"] = Spec(part, "fp32")
        tactic = choose(SSD_STATE, tactics, SSD_STATE.tactics[0 if xbc.dtype != "fp32" else -1])
        dtypes |= {"added": "fp32", "decay": "fp32"}
        grid = (heads, segments)
        first = _call(SSD_STATE, dtypes, extras, outputs, {**sizes, **steps}, tactic, grid)
    outputs = {
        "y": Spec((batch, length, heads * head_dim), xbc.dtype),
        "state": Spec((batch, heads, head_dim, d_state), "fp32"),
    }
    grid = (heads // scan.blocks["HEADS"], segments)
    return first, _call(SSD_SCAN, dtypes, extras, outputs, sizes, scan, grid)


def _call(
    kernel: Kernel, dtypes: Mapping[str, str], extras: Mapping[str, int],
    outputs: Mapping[str, Spec], constants: Mapping[str, int | float], tactic: Tactic,
    grid: tuple[int, int],
) -> Call:
    return Call(
        kernel=kernel,
        inputs={name: dtypes[name] for name in kernel.inputs if name in dtypes},
        extras={name: extras[name] for name in kernel.extras},
        outputs=outputs, constants=constants, tactic=tactic, grid=grid,
    )
