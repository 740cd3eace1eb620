"""An engine that runs in another Python: the one that has TensorRT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest, TokredError
from tokred_export.runtime.serve import read_arrays, write_arrays

_KINDS = {kind.exit_code: kind for kind in (InvalidRequest, EnvironmentUnable, BundleError)}


class RemoteRunner:
    """A :class:`tokred_export.runtime.trt.TrtRunner` in a process of its own; close it after use.

    Raises:
        EnvironmentUnable: TensorRT or a GPU is missing there, or the process ends.
        BundleError: the plan does not fit.
    """

    def __init__(
        self,
        plan: Path,
        launcher: Path | None = None,
        python: str = "python3",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.source = plan
        # Memory rather than disk where there is such a folder: outputs can be a gigabyte.
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._folder = Path(tempfile.mkdtemp(prefix="tokred-", dir=shared))
        read, write = os.pipe()
        command = [python, "-m", "tokred_export.runtime.serve", str(write), str(plan)]
        command += [str(launcher)] if launcher is not None else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[write], text=True,
            stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})},
        )
        os.close(write)
        self._answers = os.fdopen(read)
        try:
            hello = self._answer()
        except TokredError:
            self.close()
            raise
        self.input_names, self.output_names = tuple(hello["inputs"]), tuple(hello["outputs"])
        self.version, self.gpu = hello["version"], hello["gpu"]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine once on inputs by name; return every output by name."""
        names = write_arrays(self._folder, dict(feeds))
        return self._arrays({"do": "run", "names": names})

    def replayed(self) -> dict[str, np.ndarray]:
        """What the last repetition of :meth:`latencies` left in the outputs."""
        return self._arrays({"do": "replayed"})

    def latencies(self, count: int, graph: bool = True) -> list[float]:
        """Milliseconds of ``count`` repetitions of the last run, inputs on the device."""
        return self._ask({"do": "latencies", "count": count, "graph": graph})["ms"]

    def profile(self, count: int) -> dict[str, float]:
        """Mean milliseconds of each layer."""
        return self._ask({"do": "profile", "count": count})["ms"]

    def memory_bytes(self) -> int:
        """Device memory that the engine takes."""
        return self._ask({"do": "memory"})["bytes"]

    def close(self) -> None:
        """End the process and give its memory back."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RemoteRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _arrays(self, request: dict) -> dict[str, np.ndarray]:
        names: Sequence[str] = self._ask({**request, "folder": str(self._folder)})["names"]
        return read_arrays(self._folder, list(names))

    def _ask(self, request: dict) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EnvironmentUnable(self._ended()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise EnvironmentUnable(self._ended())
        found = json.loads(line)
        if "error" in found:
            raise _KINDS.get(found["exit_code"], EnvironmentUnable)(found["error"])
        return found

    def _ended(self) -> str:
        code = self._process.wait()
        return (
            f"the process that runs {self.source.name} ended with status {code}; what it said "
            "stands above"
        )
