"""Stand-ins for what TensorRT's builder hands a plugin while a network is built.

A dimension is a constant or the batch, which is all that our plugins compute with.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class IDimensionExpr:
    """A size in a tensor's shape; ``value`` is None for the batch where that is open."""

    value: int | None

    def is_constant(self) -> bool:
        return self.value is not None

    def get_constant_value(self) -> int:
        assert self.value is not None
        return self.value

    def at(self, batch: int) -> int:
        """The size for a batch."""
        return batch if self.value is None else self.value


class DimsExprs(list):
    """A shape of so many dimensions."""

    def __init__(self, rank: int) -> None:
        super().__init__([None] * rank)


class ISymExpr:
    """A launch parameter or extra: ``type``, ``dtype`` and ``expr``, set by NVIDIA's subclass."""


class ExprBuilder:
    """Makes constants; our plugins ask for no operation."""

    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)


@dataclass
class LaunchParams:
    """Where a plugin writes its grid, block and shared memory."""

    grid_x: ISymExpr | None = None
    grid_y: ISymExpr | None = None
    grid_z: ISymExpr | None = None
    block_x: ISymExpr | None = None
    block_y: ISymExpr | None = None
    block_z: ISymExpr | None = None
    shared_mem: ISymExpr | None = None


@dataclass
class SymExprs:
    """Where a plugin writes its extras."""

    values: dict[int, ISymExpr] = field(default_factory=dict)
    nbSymExprs: int = 0  # TensorRT's name

    def __setitem__(self, index: int, value: ISymExpr) -> None:
        assert index < self.nbSymExprs
        self.values[index] = value
