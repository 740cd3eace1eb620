"""What is said about the machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata

import msgspec
import pytest

from tokred_export.environment import environment, nvidia_gpu, usable_cores
from tokred_export.verify.records import Environment


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with a given shell body on an otherwise empty PATH."""

    def install(body):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def test_this_machine(smi):
    """Versions are those installed, and the record survives JSON."""
    found = environment()
    assert found.python == platform.python_version()
    assert found.packages["numpy"] == metadata.version("numpy")
    assert "tokred-export" in found.packages
    assert list(found.packages) == sorted(found.packages)
    assert found.processor and found.platform and found.cores >= 1
    assert (found.gpu, found.driver) == (None, None)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found


def test_gpus(smi):
    """Names and the driver, several equal ones counted."""
    smi("echo 'NVIDIA H200, 575.57.08'")
    assert nvidia_gpu() == ("NVIDIA H200", "575.57.08")
    smi("echo 'NVIDIA A, B, 1.2'; echo 'NVIDIA T4, 1.2'; echo 'NVIDIA T4, 1.2'")
    assert nvidia_gpu() == ("NVIDIA A, B, 2 x NVIDIA T4", "1.2")


@pytest.mark.parametrize("body", ["exit 9", "echo broken; exit 1", "true", "echo 'No devices'"])
def test_an_nvidia_smi_that_cannot_say(smi, body):
    """A driver that does not answer is no GPU, and no error."""
    smi(body)
    assert nvidia_gpu() == (None, None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_allowed():
    """A process bound to one core has one."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tokred_export.environment import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_it_needs_no_framework():
    """doctor must say what is missing even where everything is."""
    code = "import sys, tokred_export.environment; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "numpy"} & set(done.stdout.split())
