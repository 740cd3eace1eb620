"""Builds that run in a process of their own: what is asked for, and what came of it.

A builder that ends its process instead of reporting an error, or that needs another Python than
the one that exports, is called through a job file and answers with an outcome file.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from tokred_export.errors import BuildFailed, EnvironmentUnable, TokredError
from tokred_export.specs import Spec

_TAIL = 20  # lines of the build's log that an error quotes


class Outcome(Spec, kw_only=True):
    """What a build process answers: an error in words, or what it built."""

    error: str | None = None
    exit_code: int = 0  # of the error's kind
    show_log: bool = False  # the log knows more than the error
    version: str = ""
    layers: int = 0
    layers_from: Literal["engine", "network"] = "network"
    outputs: dict[str, tuple[int, ...]] = msgspec.field(default_factory=dict)
    plugins: dict[str, int] = msgspec.field(default_factory=dict)  # kernel -> layers of the engine
    seconds: float = 0.0  # of the builder alone


class Job(Spec, kw_only=True):
    """Base of what a build process is asked for; ``outcome`` is the file for its answer."""

    outcome: str


def run_job(
    job: Job,
    command: Sequence[str],
    who: str,
    backend: str,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run one build in a process of its own and wait for it.

    The process gets the path of a file ``job.json``, which lies beside the outcome's.

    Args:
        job: what is asked for.
        command: that runs the build, without the job's path.
        who: the builder's name, for messages.
        backend: the backend's name, for messages.
        environment: variables added to this process's own.

    Raises:
        BuildFailed: the process reported an error, or it crashed; then with the end of its log.
        EnvironmentUnable: the process found the disk full or the library broken.
    """
    folder = Path(job.outcome).parent
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    with (folder / "log").open("w+b") as log:
        code = subprocess.run(
            [*command, str(folder / "job.json")], stdout=log, stderr=subprocess.STDOUT,
            check=False, env={**os.environ, **(environment or {})},
        ).returncode
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    tail = "\n".join(["the log ends with:", *lines[-_TAIL:]])
    try:
        outcome = msgspec.json.decode(Path(job.outcome).read_bytes(), type=Outcome)
    except (FileNotFoundError, msgspec.DecodeError) as error:  # no answer, or half of one
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise BuildFailed(
            f"the {who} build process ended with {how} and built nothing: report the graph "
            f"and its log, or leave out the backend {backend}; {tail}"
        ) from error
    if outcome.error is not None:
        unable = outcome.exit_code == EnvironmentUnable.exit_code
        text = f"{outcome.error}; {tail}" if outcome.show_log else outcome.error
        raise (EnvironmentUnable if unable else BuildFailed)(text)
    return outcome


def batch_profile(
    builder: Any, network: Any, least: int, most: int,  # noqa: ANN401  either TensorRT's
) -> Any:  # noqa: ANN401
    """The range of every input with an open batch; the plan is tuned for the largest.

    Args:
        builder: TensorRT's or TensorRT-RTX's ``Builder``.
        network: its ``INetworkDefinition``.
        least, most: batches that the plan takes.
    """
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        if -1 in tuple(value.shape):
            rest = tuple(value.shape)[1:]
            profile.set_shape(value.name, (least, *rest), (most, *rest), (most, *rest))
    return profile


def answer(job: Job, outcome: Outcome) -> int:
    """Leave the outcome where the job says and return the process's exit status."""
    Path(job.outcome).write_bytes(msgspec.json.encode(outcome))
    return outcome.exit_code


def outcome_of(error: TokredError) -> Outcome:
    """An error as an outcome."""
    return Outcome(error=str(error), exit_code=error.exit_code)
