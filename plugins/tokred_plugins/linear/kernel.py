"""The kernels of matrix products with a constant: 16-bit operands, float32 sums. By Triton; for
compute capability 9.0 also in PTX, which :mod:`tokred_plugins.linear.hopper` writes.

No op of its own: :mod:`tokred_export.export.lower` puts them in the place of MatMul nodes, for
TensorRT 8's own 16-bit products sum in float16. Rows of x may come as they were before a norm, with
sums of their squares: what is linear in a row can be divided by its root mean square afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from tokred_plugins.kernels import PRECISION, Call, Constant, Kernel, Spec, Tactic, cdiv, choose
from tokred_plugins.linear import hopper
from tokred_plugins.ptx import DEEP


@triton.jit
def _place(tile, tiles_m, tiles_n: tl.constexpr, GROUP: tl.constexpr):
    """Tile down and tile across: programs that run together share rows and columns, GROUP tiles
    down before one across."""
    first = tile // (GROUP * tiles_n) * GROUP
    rows_here = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % rows_here, inside // rows_here


@triton.jit
def _scales(squares, row, in_m, K: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr):
    """One over the root mean square of each row [M]."""
    total = tl.zeros(row.shape, tl.float32)
    for first in tl.static_range(0, PARTS, 16):
        part = first + tl.arange(0, 16)[None, :]
        at = squares + row.to(tl.int64)[:, None] * PARTS + part
        total += tl.sum(tl.load(at, mask=in_m[:, None] & (part < PARTS), other=0), axis=1)
    return tl.rsqrt(total / K + EPS)


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    x, weight, squares, length, y,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, CLUSTER: tl.constexpr,
):
    tl.static_assert(CLUSTER == 0, "with clusters it is hopper.py's")
    if PROGRAMS > 0:
        _by_descriptors(x, weight, squares, length, y, K, N, TURNED, PARTS, EPS, BLOCK_M, BLOCK_N,
                        BLOCK_K, GROUP, PROGRAMS)
    else:
        _by_pointers(x, weight, squares, length, y, K, N, TURNED, PRECISION, PARTS, EPS, BLOCK_M,
                     BLOCK_N, BLOCK_K, GROUP)


@triton.jit
def _by_descriptors(
    x, weight, squares, length, y,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # One program a multiprocessor, each doing many tiles, fed by the tensor memory accelerator.
    # The rows of all sequences are one matrix; programs of the others have nothing to do.
    if tl.program_id(2) == 0:
        rows = length * tl.num_programs(2)
        tiles_m = tl.cdiv(rows, BLOCK_M)
        tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        rows_of = tl.make_tensor_descriptor(x, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])
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
            if squares is not None:
                m = down * BLOCK_M + tl.arange(0, BLOCK_M)
                acc *= _scales(squares, m, m < rows, K, PARTS, EPS)[:, None]
            result.store([down * BLOCK_M, across * BLOCK_N], acc.to(result.dtype))


@triton.jit
def _by_pointers(
    x, weight, squares, length, y,
    K: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    tiles_m = tl.cdiv(length, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    down, across = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
    m = down * BLOCK_M + tl.arange(0, BLOCK_M)
    n = across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end are computed on others' data and not stored.
    row = tl.where(m < length, m, 0)
    column = tl.where(n < N, n, 0)
    column = tl.max_contiguous(tl.multiple_of(column, BLOCK_N), BLOCK_N) if N % BLOCK_N == 0 else n
    in_n = (n < N)[None, :]
    step: tl.constexpr = 1 if TURNED else N  # from one k to the next
    x += (batch * length + row.to(tl.int64)[:, None]) * K + k[None, :]
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
        acc *= _scales(squares + batch * length * PARTS, m, m < length, K, PARTS, EPS)[:, None]
    out = y + (batch * length + m.to(tl.int64)[:, None]) * N + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m < length)[:, None] & in_n)


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
    blocks = {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PROGRAMS": programs, "CLUSTER": 0,
    }
    return Tactic(blocks, warps, stages, since=90 if programs else 0)


def _hopper(m: int, n: int, groups: int, stages: int, cluster: int = 1) -> Tactic:
    """Tiles of m x n by PTX; ``groups`` of four warps multiply, ``cluster`` blocks go together."""
    blocks = {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": DEEP, "GROUP": 8, "PROGRAMS": 132,
        "CLUSTER": cluster,
    }
    return Tactic(blocks, 4 * (groups + 1), stages, since=90, until=90, ptx=True)


LINEAR = Kernel(
    "linear", linear_kernel, ("x", "weight", "squares"), ("length",), ("y",),
    (
        *(
            _tactic(*sizes)
            for sizes in (
                (128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
                (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 256, 64, 4, 4),
                (256, 128, 64, 8, 3), (64, 64, 64, 4, 4),
                (128, 256, 64, 8, 3, 132), (256, 128, 64, 8, 3, 132), (128, 128, 64, 8, 4, 132),
                (64, 256, 64, 4, 4, 132), (64, 64, 64, 4, 3, 528),
            )
        ),
        # Widths between powers of two, of which one or another gives whole rounds of tiles.
        *(
            _hopper(*sizes)
            for sizes in (
                (128, 256, 2, 4, 2), (128, 224, 2, 4), (128, 192, 2, 4), (128, 160, 2, 5),
                (256, 160, 2, 4), (256, 128, 2, 4), (256, 96, 2, 4), (128, 192, 1, 4),
                (64, 192, 1, 6),
            )
        ),
        *(_tactic(*sizes) for sizes in ((128, 128, 32, 4, 3), (64, 64, 32, 4, 2),
                                        (32, 32, 32, 4, 2))),
    ),
    hopper.written,
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
# Up to so many rows a sequence the product reads little but the weights.
FEW = 16


def described(constants: Mapping[str, Constant], cluster: Constant) -> bool:
    """Whether tensor descriptors can hold the operands: 16-bit rows of whole 16 bytes; where
    there are clusters, a weight stored as [N, K] too."""
    half = constants["PRECISION"] == PRECISION["fp16"]
    whole = constants["K"] % 8 == 0 and constants["N"] % 8 == 0
    return half and whole and bool(constants["TURNED"] or not cluster)


def calls(
    x: Spec, weight: Spec, turned: bool = False, flat: bool = False,
    tactics: Mapping[str, Tactic] | None = None, squares: Spec | None = None, eps: float = 0.0,
) -> tuple[Call, ...]:
    """The launch of y = x [B, L, K] @ weight [K, N], in x's dtype, summed in float32.

    With ``squares``, rows of y are divided by sqrt(mean square + eps) of the rows of x.

    Args:
        x: rows.
        weight: constant.
        turned: the weight is stored as [N, K], as an embedding is.
        flat: L is 1, and y is described as [B, N] instead of [B, 1, N].
        tactics: kernel name -> tactic, where not the default.
        squares: float32 [B, L, S]: of each row S numbers whose sum is that of its squares.
        eps: added to the mean square.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, length, inner = x.shape
    kept, columns = reversed(weight.shape) if turned else weight.shape
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}, expected the same")
    if kept != inner or (flat and length != 1):
        raise ValueError(f"x {x.shape} cannot be multiplied with a weight {weight.shape}")
    shape = (batch, columns) if flat else (batch, length, columns)
    if squares is not None and (
        squares.shape[:2] != x.shape[:2] or not squares.shape[2] or squares.dtype != "fp32"
    ):
        raise ValueError(f"squares are {squares}, expected float32 for each row of x {x.shape}")
    few = length <= FEW and squares is None
    kernel = LINEAR_FEW if few else LINEAR
    default = kernel.tactics[-1] if x.dtype == "fp32" else kernel.tactics[0]
    tactic = choose(kernel, tactics, default)
    tiles = cdiv(columns, tactic.blocks["BLOCK_N"])
    programs = tactic.blocks.get("PROGRAMS", 0)
    constants = {"K": inner, "N": columns, "TURNED": turned, "PRECISION": PRECISION[x.dtype]}
    if programs and not described(constants, tactic.blocks["CLUSTER"]):
        stored = "N x K" if turned else "K x N"
        raise ValueError(
            f"rows of {inner} and {columns} {x.dtype} numbers, {stored}, fit no descriptor of "
            f"{kernel.name} with {tactic}"
        )
    inputs = {"x": x.dtype, "weight": weight.dtype}
    if squares is not None:
        inputs["squares"] = squares.dtype
    if not few:
        scaled = squares is not None
        constants |= {"PARTS": squares.shape[2] if scaled else 0, "EPS": eps if scaled else 0.0}
    call = Call(
        kernel=kernel,
        inputs=inputs,
        extras={"length": length},
        outputs={"y": Spec(shape, x.dtype)},
        constants=constants,
        tactic=tactic,
        grid=(
            programs or (tiles if few else tiles * cdiv(length, tactic.blocks["BLOCK_M"])), 1
        ),
    )
    return (call,)
