"""Runs the kernel tests in Triton's interpreter, in a process of their own.

Whether Triton interprets is decided once, when it is first imported, so it cannot be switched
on inside a process that may have imported it already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreted")
def test_kernels_in_the_interpreter():
    """Every test_kernel_*.py passes, and none of them ran no test."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    files = sorted(HERE.glob("test_kernel_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, files)], env=environment, cwd=HERE.parents[1],
        capture_output=True, text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-2000:]
