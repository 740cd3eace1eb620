"""An engine that runs in another Python: the one that has TensorRT."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest, TokredError
from tokred_export.runtime.serve import no_exchange, read_arrays, write_arrays

# Outputs of a large batch can be a gigabyte; a container's shared memory is 64 MB where nobody
# asked for more.
_ROOMY = 4 << 30
_KINDS = {kind.exit_code: kind for kind in (InvalidRequest, EnvironmentUnable, BundleError)}


class RemoteRunner:
    """A :class:`tokred_export.runtime.trt.TrtRunner` in a process of its own; close it after use.

    Threads take turns.

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
        self._folder = Path(tempfile.mkdtemp(prefix="tokred-", dir=_exchange()))
        self._turn = threading.Lock()
        read, write = os.pipe()
        self._answers = os.fdopen(read)
        command = [python, "-m", "tokred_export.runtime.serve", str(write), str(plan)]
        command += [str(launcher)] if launcher is not None else []
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[write], text=True,
                stdout=2,  # whatever it prints goes to standard error
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._answers.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EnvironmentUnable(
                f"{python} cannot be started ({error.strerror}): name a Python that has TensorRT "
                "in TOKRED_TENSORRT_PYTHON"
            ) from error
        finally:
            os.close(write)
        # Nobody need call close: it also happens when this object or this process goes.
        self._end = weakref.finalize(self, _end, self._process, self._answers, self._folder)
        try:
            hello = self._answer()
        except TokredError:
            self.close()
            raise
        self.input_names, self.output_names = tuple(hello["inputs"]), tuple(hello["outputs"])
        self.version, self.gpu = hello["version"], hello["gpu"]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine once on inputs by name; return every output by name."""
        return self._arrays({"do": "run"}, dict(feeds))

    def replayed(self) -> dict[str, np.ndarray]:
        """What the last repetition of :meth:`latencies` left in the outputs."""
        return self._arrays({"do": "replayed"}, {})

    def latencies(self, count: int, graph: bool = True) -> list[float]:
        """Milliseconds of ``count`` repetitions of the last run, inputs on the device."""
        return self._alone({"do": "latencies", "count": count, "graph": graph})["ms"]

    def profile(self, count: int) -> dict[str, float]:
        """Mean milliseconds of each layer."""
        return self._alone({"do": "profile", "count": count})["ms"]

    def memory_bytes(self) -> int:
        """Device memory that the engine takes."""
        return self._alone({"do": "memory"})["bytes"]

    def close(self) -> None:
        """End the process and give its memory back; again changes nothing."""
        self._end()

    def __enter__(self) -> RemoteRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _arrays(self, request: dict, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ask for arrays, with some."""
        with self._turn:
            try:
                names = write_arrays(self._folder, "in", given)
            except OSError as error:
                raise EnvironmentUnable(no_exchange(self._folder, error)) from error
            answer = self._ask({**request, "names": names, "folder": str(self._folder)})
            return read_arrays(self._folder, "out", answer["names"])

    def _alone(self, request: dict) -> dict[str, Any]:
        with self._turn:
            return self._ask(request)

    def _ask(self, request: dict) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except BrokenPipeError as error:
            raise EnvironmentUnable(self._ended()) from error
        except TokredError:
            raise
        except BaseException:
            # Nobody would know which request the next answer is to. One may lie in the pipe
            # already: none is asked for once the process is gone for certain.
            self._process.kill()
            self._process.wait()
            raise

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith("\n"):  # the process is gone
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


def _exchange() -> str | None:
    """Where arrays are exchanged: memory, where there is enough of it to be had as files."""
    shared = "/dev/shm"
    return shared if os.path.isdir(shared) and shutil.disk_usage(shared).free >= _ROOMY else None


def _end(process: subprocess.Popen[str], answers: TextIO, folder: Path) -> None:
    """Let the process read the end of its input, and remove what it was given."""
    with contextlib.suppress(BrokenPipeError):  # it ended before, with a request unread
        process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    answers.close()
    shutil.rmtree(folder, ignore_errors=True)
