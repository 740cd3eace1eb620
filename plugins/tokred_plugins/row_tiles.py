"""Tiles of a few whole rows, which the kernels that walk along a row share.

A row is rarely a power of two: pieces waste no lanes, 2560 = 5 x 512. Several rows a program
mean fewer programs to start, which counts where a kernel takes microseconds.
"""

# ruff: noqa: ANN001, ANN201, RUF005  Triton functions; Triton has no starred tuples
from __future__ import annotations

import triton
import triton.language as tl

from tokred_plugins.kernels import Tactic, cdiv


@triton.jit
def rows_of(program, length, ROWS: tl.constexpr):
    """A program's rows, counted over the batch, and whether each exists: [ROWS, 1]."""
    row = program * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2).to(tl.int64) * length
    return (first + row)[:, None], (row < length)[:, None]


@triton.jit
def piece_mask(i: tl.constexpr, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of piece ``i`` [1, BLOCK], and which elements of it exist."""
    cols = (i * BLOCK + tl.arange(0, BLOCK))[None, :]
    if WIDTH % BLOCK == 0:
        return cols, there
    else:
        return cols, there & (cols < WIDTH)


@triton.jit
def load_pieces(x, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at the pointers ``x`` [ROWS, 1], as a tuple of float32 pieces."""
    pieces = ()
    for i in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        cols, mask = piece_mask(i, there, WIDTH, BLOCK)
        pieces = pieces + (tl.load(x + cols, mask=mask, other=0).to(tl.float32),)
    return pieces


@triton.jit
def load_vector(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row that all share, as a tuple of float32 pieces [1, BLOCK]."""
    pieces = ()
    for i in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        cols = (i * BLOCK + tl.arange(0, BLOCK))[None, :]
        pieces = pieces + (tl.load(x + cols, mask=cols < WIDTH, other=0).to(tl.float32),)
    return pieces


@triton.jit
def store_inverse_norms(
    x, program, length, inverse, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One over the norm of each of a program's rows, float32; never infinite."""
    row, there = rows_of(program, length, ROWS)
    pieces = load_pieces(x + row * WIDTH, there, WIDTH, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(len(pieces)):
        squares += pieces[i] * pieces[i]
    norm = tl.sqrt(tl.sum(squares, axis=1))[:, None]
    tl.store(inverse + row, 1 / tl.maximum(norm, 1e-12), mask=there)


# Eight elements a thread and piece: one 16-byte access of a 16-bit tensor. A warp has a row or
# part of it.
TACTICS = tuple(
    Tactic({"ROWS": rows, "BLOCK": 256 * warps}, rows * warps)
    for rows, warps in (
        (1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (4, 1), (2, 2),
    )
)


def row_tactic(width: int) -> Tactic:
    """The fewest warps that hold a row of ``width`` in at most three pieces."""
    alone = [t for t in TACTICS if t.blocks["ROWS"] == 1]
    return next((t for t in alone if cdiv(width, t.blocks["BLOCK"]) <= 3), alone[-1])


def reading_tactic(width: int) -> Tactic:
    """The same for kernels that write next to nothing, where four short rows a program pay."""
    return TACTICS[5] if width <= 1536 else row_tactic(width)
