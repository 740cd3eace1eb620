"""What the launcher's tests share: it is built once, and its fields are made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_stage import HERE, Stage, build


@pytest.fixture(scope="session")
def fields() -> dict[str, dict]:
    """What lower.py writes for real kernels, by the worker's names."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / "fields_worker.py"], env=environment,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {facts["name"]: facts for facts in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The folder of what was built."""
    folder = tmp_path_factory.mktemp("launcher")
    build(folder)
    return folder


@pytest.fixture()
def stage(built, tmp_path) -> Stage:
    """Runs commands against the plugin, each time in a new process."""
    return Stage(built, tmp_path)
