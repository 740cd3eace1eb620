"""The Triton kernels of matrix products with a constant: 16-bit operands, float32 sums.

No op of its own: :mod:`tokred_export.export.lower` puts them in the place of MatMul nodes, for
TensorRT 8's own 16-bit products sum in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl

from tokred_plugins.kernels import PRECISION, Call, Constant, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.linear.tensorrt import FEW, HEADROOM

# Columns whose squares are summed into one number for the norm that follows.
SLOT = tl.constexpr(64)
SHRINK = tl.constexpr(1 / HEADROOM)


@triton.jit
def _place(tile, tiles_m, tiles_n: tl.constexpr, GROUP: tl.constexpr):
    """Tile down and tile across: programs that run together share rows and columns, GROUP tiles
    down before one across."""
    first = tile // (GROUP * tiles_n) * GROUP
    rows_here = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % rows_here, inside // rows_here


@triton.jit
def _row_scales(
    squares, row, there, K: tl.constexpr, SLOTS: tl.constexpr, EPS: tl.constexpr,
    UNDO: tl.constexpr, ROWS: tl.constexpr,
):
    """What each row is multiplied by to have a root mean square of one: [ROWS]."""
    total = tl.zeros((ROWS, 16), tl.float32)
    for first in tl.static_range(0, SLOTS, 16):
        slot = first + tl.arange(0, 16)[None, :]
        at = squares + row.to(tl.int64)[:, None] * SLOTS + slot
        if SLOTS % 16 == 0:
            total += tl.load(at, mask=there[:, None], other=0)
        else:
            total += tl.load(at, mask=there[:, None] & (slot < SLOTS), other=0)
    return tl.rsqrt(tl.sum(total, axis=1) / K + EPS) * UNDO


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _pieces(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as a tuple of pieces SLOT columns wide; nothing moves between threads."""
    if COLUMNS == SLOT:
        return (tile,)
    elif COLUMNS == 2 * SLOT:
        return _halves(tile, ROWS, COLUMNS)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        a, b = _halves(left, ROWS, COLUMNS // 2)
        c, d = _halves(right, ROWS, COLUMNS // 2)
        return (a, b, c, d)


@triton.jit
def _stream_piece(
    residual, row, there, column, N: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A piece of the residual stream, and where it lies."""
    at = row[:, None] * N + column[None, :]
    mask = there[:, None] if N % BLOCK_N == 0 else there[:, None] & (column < N)[None, :]
    return tl.load(residual + at, mask=mask, other=0).to(tl.float32), at, mask


@triton.jit
def _add(
    acc, row, there, across, residual, norm_weight, weighted, residual_out, squares_out,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Adds a tile to the residual stream and leaves what the next norm and product need."""
    slots: tl.constexpr = (N + SLOT - 1) // SLOT
    row = row.to(tl.int64)
    pieces = _pieces(acc, BLOCK_M, BLOCK_N)
    first = across * BLOCK_N + tl.arange(0, SLOT)
    before, at, mask = _stream_piece(residual, row, there, first, N, BLOCK_N)
    for i in tl.static_range(len(pieces)):
        column = first + i * SLOT
        total = pieces[i] + before
        here, kept = at, mask
        if i + 1 < len(pieces):  # on its way before this one is written
            before, at, mask = _stream_piece(residual, row, there, column + SLOT, N, BLOCK_N)
        tl.store(residual_out + here, total.to(residual_out.dtype.element_ty), mask=kept)
        scale = tl.load(norm_weight + column, mask=column < N, other=0).to(tl.float32)
        small = total * (scale * SHRINK)[None, :]
        tl.store(weighted + here, small.to(weighted.dtype.element_ty), mask=kept)
        if N % BLOCK_N != 0:  # columns beyond the end are of other data
            total = tl.where((column < N)[None, :], total, 0.0)
        slot = across * (BLOCK_N // SLOT) + i
        tl.store(
            squares_out + row * slots + slot, tl.sum(total * total, axis=1),
            mask=there & (slot < slots),
        )


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    x, weight, squares, length, y,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, EPS: tl.constexpr, UNDO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    if PROGRAMS > 0:
        _by_descriptors(x, weight, squares, None, None, length, y, None, None, K, N, TURNED, SLOTS,
                        EPS, UNDO, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PROGRAMS)
    else:
        _by_pointers(x, weight, squares, None, None, length, y, None, None, K, N, TURNED, PRECISION,
                     SLOTS, EPS, UNDO, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)


@triton.jit(do_not_specialize=["length"])
def linear_add_kernel(
    x, weight, residual, norm_weight, length, weighted, residual_out, squares,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    if PROGRAMS > 0:
        _by_descriptors(x, weight, None, residual, norm_weight, length, weighted, residual_out,
                        squares, K, N, TURNED, 0, 0.0, 1.0, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                        PROGRAMS)
    else:
        _by_pointers(x, weight, None, residual, norm_weight, length, weighted, residual_out,
                     squares, K, N, TURNED, PRECISION, 0, 0.0, 1.0, BLOCK_M, BLOCK_N, BLOCK_K,
                     GROUP)


@triton.jit
def _by_descriptors(
    x, weight, squares, residual, norm_weight, length, y, residual_out, squares_out,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, SLOTS: tl.constexpr,
    EPS: tl.constexpr, UNDO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):
    # One program a multiprocessor, each doing many tiles, fed by the tensor memory accelerator.
    # The rows of all sequences are one matrix; programs of the others have nothing to do.
    if tl.program_id(2) == 0:
        rows = length * tl.num_programs(2)
        tiles_m = tl.cdiv(rows, BLOCK_M)
        tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        rows_of = tl.make_tensor_descriptor(x, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])
        if residual is None:
            result = tl.make_tensor_descriptor(y, [rows, N], [N, 1], [BLOCK_M, BLOCK_N])
        if TURNED:
            columns = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        else:
            columns = tl.make_tensor_descriptor(weight, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            down, across = _place(tile, tiles_m, tiles_n, GROUP)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for at in range(0, K, BLOCK_K):
                a = rows_of.load([down * BLOCK_M, at])
                if TURNED:
                    b = columns.load([across * BLOCK_N, at]).T
                else:
                    b = columns.load([at, across * BLOCK_N])
                acc = tl.dot(a, b, acc=acc)
            row = down * BLOCK_M + tl.arange(0, BLOCK_M)
            if squares is not None:
                acc *= _row_scales(squares, row, row < rows, K, SLOTS, EPS, UNDO, BLOCK_M)[:, None]
            if residual is None:
                result.store([down * BLOCK_M, across * BLOCK_N], acc.to(y.dtype.element_ty))
            else:
                _add(acc, row, row < rows, across, residual, norm_weight, y, residual_out,
                     squares_out, N, BLOCK_M, BLOCK_N)


@triton.jit
def _by_pointers(
    x, weight, squares, residual, norm_weight, length, y, residual_out, squares_out,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, EPS: tl.constexpr, UNDO: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    first = tl.program_id(2).to(tl.int64) * length
    tiles_m = tl.cdiv(length, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    down, across = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
    m = down * BLOCK_M + tl.arange(0, BLOCK_M)
    n = across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end are computed on others' data and not stored.
    row = first + tl.where(m < length, m, 0).to(tl.int64)
    column = tl.where(n < N, n, 0)
    column = tl.max_contiguous(tl.multiple_of(column, BLOCK_N), BLOCK_N) if N % BLOCK_N == 0 else n
    in_n = (n < N)[None, :]
    step: tl.constexpr = 1 if TURNED else N  # from one k to the next
    x += row[:, None] * K + k[None, :]
    weight += k[:, None] * step + column.to(tl.int64)[None, :] * (K if TURNED else 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x)
            b = tl.load(weight, mask=in_n, other=0) if N % BLOCK_N else tl.load(weight)
        else:
            a = tl.load(x, mask=(at + k < K)[None, :], other=0)
            b = tl.load(weight, mask=(at + k < K)[:, None] & in_n, other=0)
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION)
        x += BLOCK_K
        weight += BLOCK_K * step
    if squares is not None:
        acc *= _row_scales(squares, row, m < length, K, SLOTS, EPS, UNDO, BLOCK_M)[:, None]
    if residual is None:
        out = y + (first + m.to(tl.int64)[:, None]) * N + n[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(m < length)[:, None] & in_n)
    else:
        _add(acc, row, m < length, across, residual, norm_weight, y, residual_out, squares_out,
             N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["length"])
def linear_few_kernel(
    x, weight, length, y,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # The weights are what is read: the first sequence's programs do the rows of all.
    step: tl.constexpr = 1 if TURNED else N  # from one k to the next
    if tl.program_id(2) == 0:
        rows = length * tl.num_programs(2)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        in_n = (n < N)[None, :]
        for first in range(0, rows, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            in_m = (m < rows)[:, None]
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for at in range(0, K, BLOCK_K):
                in_k = at + k < K
                a = tl.load(
                    x + m.to(tl.int64)[:, None] * K + at + k[None, :],
                    mask=in_m & in_k[None, :], other=0,
                )
                b = tl.load(
                    weight + (at + k).to(tl.int64)[:, None] * step
                    + n.to(tl.int64)[None, :] * (K if TURNED else 1),
                    mask=in_k[:, None] & in_n, other=0,
                )
                acc = tl.dot(a, b, acc=acc, input_precision=PRECISION)
            out = y + m.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(out, acc.to(y.dtype.element_ty), mask=in_m & in_n)


def _tactic(m: int, n: int, k: int, warps: int, stages: int, programs: int = 0) -> Tactic:
    """Tiles of m x n, k deep; ``programs`` that stay, with descriptors, or one a tile."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PROGRAMS": programs}
    return Tactic(blocks, warps, stages, since=90 if programs else 0)


LINEAR = Kernel(
    "linear", linear_kernel, ("x", "weight", "squares"), ("length",), ("y",),
    tuple(
        _tactic(*sizes)
        for sizes in (
            (128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4),
            (64, 128, 64, 4, 4), (64, 256, 64, 4, 4), (256, 128, 64, 8, 3), (64, 64, 64, 4, 4),
            (128, 256, 64, 8, 3, 132), (256, 128, 64, 8, 3, 132), (128, 128, 64, 8, 4, 132),
            (64, 256, 64, 4, 4, 132), (64, 64, 64, 4, 3, 528),
            (128, 128, 32, 4, 3), (64, 64, 32, 4, 2), (32, 32, 32, 4, 2),
        )
    ),
)
# Its tiles are not written through shared memory: more stages fit, and fewer registers.
LINEAR_ADD = Kernel(
    "linear_add", linear_add_kernel, ("x", "weight", "residual", "norm_weight"), ("length",),
    ("weighted", "residual_out", "squares"),
    tuple(
        _tactic(*sizes)
        for sizes in (
            (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 128, 64, 4, 4),
            (64, 256, 64, 4, 4), (64, 64, 64, 4, 4),
            (128, 256, 64, 8, 3, 132), (128, 256, 64, 8, 4, 132), (128, 128, 64, 8, 4, 132),
            (64, 256, 64, 4, 4, 132), (64, 64, 64, 4, 3, 528),
            (64, 64, 32, 4, 2),
        )
    ),
)
LINEAR_FEW = Kernel(
    "linear_few", linear_few_kernel, ("x", "weight"), ("length",), ("y",),
    tuple(
        Tactic({"BLOCK_M": 16, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)
        for n, k, warps, stages in (
            (64, 128, 4, 4), (128, 64, 4, 4), (32, 128, 4, 4), (64, 64, 4, 3), (32, 32, 4, 2),
        )
    ),
)


@dataclass(frozen=True)
class Unnormed:
    """Rows of x that are yet to be divided by their root mean square.

    Attributes:
        squares: [B, L, S] float32, which add up to a row's sum of squares over K columns.
        eps: added to the mean of the squares.
        undo: what the rows were divided by, to have room in 16 bits.
    """

    squares: Spec
    eps: float
    undo: float = 1.0


@dataclass(frozen=True)
class Stream:
    """The residual stream that a product is added to, and the norm that follows.

    Attributes:
        residual: [B, L, N].
        norm_weight: [N].
    """

    residual: Spec
    norm_weight: Spec


def described(constants: Mapping[str, Constant]) -> bool:
    """Whether tensor descriptors can hold the operands: 16-bit rows of whole 16 bytes."""
    half = constants["PRECISION"] == PRECISION["fp16"]
    return half and constants["K"] % 8 == 0 and constants["N"] % 8 == 0


def calls(
    x: Spec, weight: Spec, turned: bool = False, flat: bool = False,
    tactics: Mapping[str, Tactic] | None = None, unnormed: Unnormed | None = None,
    stream: Stream | None = None,
) -> tuple[Call, ...]:
    """The launch of y = x [B, L, K] @ weight [K, N], in x's dtype, summed in float32.

    With ``stream``, there is no y but ``residual_out`` = y + residual; ``weighted``, which is
    residual_out * norm_weight / 16 in x's dtype; and ``squares`` [B, L, N / 64], which add up to
    the sum of residual_out's squares. With ``unnormed``, each row of y is divided by the root mean
    square that such squares tell: what was weighted becomes the product of normed rows.

    Args:
        x: rows.
        weight: constant.
        turned: the weight is stored as [N, K], as an embedding is.
        flat: L is 1, and y is described as [B, N] instead of [B, 1, N].
        tactics: kernel name -> tactic, where not the default.
        unnormed: x is not normed yet; more than 16 rows.
        stream: what y is added to, not with ``unnormed``; more than 16 rows.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, length, inner = x.shape
    kept, columns = reversed(weight.shape) if turned else weight.shape
    few = length <= FEW
    fused = (unnormed is not None) + (stream is not None)
    if kept != inner or (flat and length != 1) or fused > (not few):
        raise ValueError(f"x {x.shape} cannot be multiplied with a weight {weight.shape}")
    kernel = LINEAR_ADD if stream else LINEAR_FEW if few else LINEAR
    default = kernel.tactics[-1] if x.dtype == "fp32" else kernel.tactics[0]
    tactic = choose(kernel, tactics, default)
    tiles = cdiv(columns, tactic.blocks["BLOCK_N"])
    programs = tactic.blocks.get("PROGRAMS", 0)
    constants = {"K": inner, "N": columns, "TURNED": turned, "PRECISION": PRECISION[x.dtype]}
    if programs and not described(constants):
        raise ValueError(f"rows of {inner} and {columns} {x.dtype} numbers fit no descriptor")
    if kernel is LINEAR:
        constants |= {"SLOTS": 0, "EPS": 0.0, "UNDO": 1.0}
    inputs = {"x": x.dtype, "weight": weight.dtype}
    outputs = {"y": Spec((batch, columns) if flat else (batch, length, columns), x.dtype)}
    if unnormed is not None:
        inputs["squares"] = "fp32"
        constants |= {
            "SLOTS": unnormed.squares.shape[-1], "EPS": unnormed.eps, "UNDO": unnormed.undo,
        }
    if stream is not None:
        inputs |= {"residual": stream.residual.dtype, "norm_weight": stream.norm_weight.dtype}
        outputs = {
            "weighted": outputs["y"], "residual_out": stream.residual,
            "squares": Spec((batch, length, cdiv(columns, SLOT.value)), "fp32"),
        }
    call = Call(
        kernel=kernel,
        inputs=inputs,
        extras={"length": length},
        outputs=outputs,
        constants=constants,
        tactic=tactic,
        grid=(
            programs or (tiles if few else tiles * cdiv(length, tactic.blocks["BLOCK_M"])), 1
        ),
    )
    return (call,)
