"""A build that is killed at any stage leaves no half bundle, and the next one goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from checkpoints import write_transformers

# What `build` reports on stderr when a stage is done, in order.
STAGES = [
    "load checkpoint", "export prefill-64", "build onnxruntime prefill-64", "copy and hash files",
    "parity prefill-64", "export prefill-64 dense", "build onnxruntime prefill-64",
    "speed prefill-64", "write bundle",
]  # fmt: skip


def start(model, out, cache):
    environment = {**os.environ, "TOKRED_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tokred_export", "build", str(model), "-o", str(out),
         "--seq-len", "64", "--sites", "0,1", "--threads", "1", "--bench-seconds", "1"],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(process):
    """Yield stages as they are reported done."""
    for line in process.stderr:
        if match := re.fullmatch(r"  (.+?) +[0-9.]+ s\n", line):
            yield match[1]


@pytest.mark.slow
def test_sigkill_at_each_stage(tmp_path):
    """Killed after each stage in turn; what was finished is not done again."""
    model, out, cache = tmp_path / "model", tmp_path / "out", tmp_path / "cache"
    model.mkdir()
    write_transformers(model)
    made = {}
    for last in STAGES[:-1]:
        process = start(model, out, cache)
        for name in done(process):
            if name == last:
                break
        else:
            pytest.fail(f"never reached {last}: {process.communicate()}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists(), f"a bundle although killed after {last}"
        entries = {p.name: (p / "hashes.json").stat().st_ino for p in cache.glob("*")
                   if (p / "hashes.json").exists()}  # fmt: skip
        assert made.items() <= entries.items(), f"redone or lost after {last}"
        made = entries
    assert len(made) == 4  # two exports, two engines
    process = start(model, out, cache)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [n for n in STAGES if n in errors] == STAGES
    manifest = json.loads((out / "export.json").read_text())
    assert "reports/parity.json" in manifest["files"]
    assert not list(tmp_path.glob(".out*")), "leftovers of killed builds"
