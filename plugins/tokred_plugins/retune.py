"""Other tactics for one launch of a graph that is already decided.

TensorRT times the candidates of every plugin on the user's GPU. A candidate may differ in its
launch and its code, and in nothing that another kernel of the graph sees: inputs, outputs and
extras stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from tokred_plugins.faces import MULTIPROCESSORS, Grid, Tuning
from tokred_plugins.kernel_faces import TUNINGS
from tokred_plugins.kernels import Call, Tactic


def candidates(call: Call, multiprocessors: int = MULTIPROCESSORS) -> tuple[Call, ...]:
    """The call itself, and the same with each other tactic of its kernel that can stand in for it.

    Args:
        call: as the graph has it.
        multiprocessors: of the GPU, where programs stay on them.

    Raises:
        RuntimeError: what the op's ``tensorrt.py`` says about the grid is not how the kernel's
            ``calls`` made this one.
    """
    tuning = TUNINGS.get(call.kernel.name, Tuning(free=()))
    expected = _grid(call, call.tactic, tuning)
    if expected != call.grid:
        raise RuntimeError(
            f"{call.kernel.name} with {call.tactic} has the grid {call.grid}, and its tuning "
            f"makes it {expected}; tensorrt.py and kernel.py of the op disagree"
        )
    tactics = (scaled(tactic, tuning, multiprocessors) for tactic in call.kernel.tactics)
    others = (retune(call, tactic, tuning) for tactic in tactics)
    return (call, *(other for other in others if other is not None and other != call))


def scaled(tactic: Tactic, tuning: Tuning, multiprocessors: int) -> Tactic:
    """The tactic with as many programs that stay as suit the GPU, an even number: some go in
    pairs."""
    counts = {
        name: max(tactic.blocks[name] * multiprocessors // MULTIPROCESSORS // 2 * 2, 2)
        for name in tuning.programs if tactic.blocks[name]
    }
    return replace(tactic, blocks={**tactic.blocks, **counts})


def retune(call: Call, tactic: Tactic, tuning: Tuning) -> Call | None:
    """The call with another tactic; None where that changes more than its own launch."""
    if tactic.blocks.keys() != call.tactic.blocks.keys():
        return None
    changed = {n for n, size in tactic.blocks.items() if size != call.tactic.blocks[n]}
    grid = _grid(call, tactic, tuning)
    if changed - set(tuning.free) or grid is None:
        return None
    return replace(call, tactic=tactic, grid=grid)


def _grid(call: Call, tactic: Tactic, tuning: Tuning) -> Grid | None:
    return tuning.grid({**call.constants, **call.extras, **tactic.blocks}, call.grid)
