"""Where a measurement is taken: machine, Python, packages, GPU. Needs neither torch nor a GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

from tokred_export.backends.common import processor_name
from tokred_export.manifest import library_versions
from tokred_export.verify.records import Environment

# Beside what a build depends on: this tool, and what its baselines and evaluations run.
_ALSO = ("tokred-export", "mamba-ssm", "causal-conv1d", "lm-eval")
_NVIDIA_SMI_SECONDS = 20  # a driver that hangs must not hang a report


def environment() -> Environment:
    """Describe this machine and this Python."""
    gpu, driver = nvidia_gpu()
    return Environment(
        platform=platform.platform(),
        processor=processor_name(),
        cores=usable_cores(),
        python=platform.python_version(),
        packages=dict(sorted((library_versions() | _versions(_ALSO)).items())),
        gpu=gpu,
        driver=driver,
    )


def usable_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nvidia_gpu() -> tuple[str | None, str | None]:
    """Names of the NVIDIA GPUs and the driver's version by nvidia-smi; None where it cannot say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    lines = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    names = [name.strip() for name, _, _ in lines]
    if not names:
        return None, None
    counted = [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
    return ", ".join(counted), lines[0][2].strip()


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
