"""The other side of :mod:`tokred_export.runtime.remote`: runs an engine for another process.

``python -m tokred_export.runtime.serve ANSWERS PLAN [LAUNCHER]``: requests are lines of JSON on
standard input; answers go to the file descriptor ANSWERS, since TensorRT prints what it likes.
Arrays travel as .npy files in the folder that a request names.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from tokred_export.errors import EnvironmentUnable, TokredError
from tokred_export.runtime.trt import TrtRunner


def write_arrays(folder: Path, way: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """Arrays as numbered files, "in" or "out"; their names in that order."""
    for index, array in enumerate(arrays.values()):
        np.save(folder / f"{way}-{index}.npy", array)
    return list(arrays)


def read_arrays(folder: Path, way: str, names: list[str]) -> dict[str, np.ndarray]:
    """What :func:`write_arrays` wrote."""
    return {name: np.load(folder / f"{way}-{index}.npy") for index, name in enumerate(names)}


def no_exchange(folder: Path, error: OSError) -> str:
    """Inputs or outputs that cannot be written."""
    return (
        f"inputs and outputs of the engine cannot be exchanged in {folder} ({error}): free memory "
        "or disk there, or name another folder in TMPDIR"
    )


def answer(runner: TrtRunner, request: dict) -> dict:
    """Do one request."""
    what = request["do"]
    folder = Path(request.get("folder", "."))
    if what == "run":
        made = runner.run(read_arrays(folder, "in", request["names"]))
        return {"names": write_arrays(folder, "out", made)}
    if what == "replayed":
        return {"names": write_arrays(folder, "out", runner.replayed())}
    if what == "latencies":
        return {"ms": runner.latencies(request["count"], request["graph"])}
    if what == "profile":
        return {"ms": runner.profile(request["count"])}
    if what == "memory":
        return {"bytes": runner.memory_bytes()}
    raise ValueError(f"unknown request {what!r}")


def main() -> int:
    """Open the engine, say so, and answer until standard input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    plan, *launcher = map(Path, sys.argv[2:])

    def say(what: dict) -> None:
        answers.write(json.dumps(what) + "\n")

    try:
        runner = TrtRunner(plan, *launcher)
    except TokredError as error:
        say({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    say({
        "inputs": runner.input_names, "outputs": runner.output_names,
        "version": runner.trt.__version__, "gpu": runner.device.gpu.name,
    })
    for line in sys.stdin:
        try:
            say(answer(runner, json.loads(line)))
        except TokredError as error:
            say({"error": str(error), "exit_code": error.exit_code})
        except OSError as error:
            said = no_exchange(Path(json.loads(line).get("folder", ".")), error)
            say({"error": said, "exit_code": EnvironmentUnable.exit_code})
    return 0


if __name__ == "__main__":
    sys.exit(main())
