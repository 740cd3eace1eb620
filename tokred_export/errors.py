"""Everything this package raises on purpose.

    TokredError                 70  an internal error, never raised by itself
    +-- GateFailed               1  the work was done and a gate (parity, --min-speedup) said no
    +-- InvalidRequest           2  the request cannot be meant: flags, a schedule, a missing file
    +-- EnvironmentUnable        3  this machine cannot do it: no GPU, no backend, disk full
    +-- BuildFailed              4  a checkpoint, an export or an engine build failed
    |   +-- CheckpointError      4  weights or config damaged, unknown or inconsistent
    |   +-- BundleError          4  a bundle is damaged, foreign or does not fit this machine
    +-- Inconclusive             5  a measurement drifted too much to be believed

Each message is one sentence or two: what was found, what was expected, what to do.
The number is the exit code of the command line.
"""

from __future__ import annotations

from typing import ClassVar


class TokredError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line exits with."""

    exit_code: ClassVar[int] = 70


class GateFailed(TokredError):
    """A gate said no: parity outside its tolerance, or a speed-up below ``--min-speedup``."""

    exit_code = 1


class InvalidRequest(TokredError):
    """The request is wrong in itself, on any machine."""

    exit_code = 2


class EnvironmentUnable(TokredError):
    """The request is fine, but this machine lacks something (a GPU, a package, disk space)."""

    exit_code = 3


class BuildFailed(TokredError):
    """An export or an engine build did not come to its end."""

    exit_code = 4


class CheckpointError(BuildFailed):
    """Weights or config are missing, damaged, inconsistent or of an unknown architecture."""


class BundleError(BuildFailed):
    """A bundle is damaged, of another schema, or made for another machine."""


class Inconclusive(TokredError):
    """A measurement drifted too much to be believed, twice."""

    exit_code = 5


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it is PyTorch's way of saying so, which is a RuntimeError like any other."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
