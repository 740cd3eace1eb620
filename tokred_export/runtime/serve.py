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

from tokred_export.errors import TokredError
from tokred_export.runtime.trt import TrtRunner


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """Arrays as numbered files; their names in that order."""
    for index, array in enumerate(arrays.values()):
        np.save(folder / f"{index}.npy", array)
    return list(arrays)


def read_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """What :func:`write_arrays` wrote."""
    return {name: np.load(folder / f"{index}.npy") for index, name in enumerate(names)}


def answer(runner: TrtRunner, request: dict) -> dict:
    """Do one request."""
    what = request["do"]
    folder = Path(request.get("folder", "."))
    if what == "run":
        return {"names": write_arrays(folder, runner.run(read_arrays(folder, request["names"])))}
    if what == "replayed":
        return {"names": write_arrays(folder, runner.replayed())}
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
