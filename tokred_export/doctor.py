"""What this machine can build and run."""

from __future__ import annotations

from tokred_export.backends import onnxruntime, tensorrt, tensorrt_rtx
from tokred_export.backends.common import Availability
from tokred_export.environment import environment
from tokred_export.specs import Spec


class Diagnosis(Spec, kw_only=True):
    """Backends by name, and facts about the machine."""

    backends: dict[str, Availability]
    machine: dict[str, str]


def diagnose() -> Diagnosis:
    """Ask every backend, and describe the machine."""
    found = environment()
    machine = {
        "platform": found.platform,
        "processor": found.processor,
        "cores": str(found.cores),
        "python": found.python,
        "GPU": found.gpu or "none found",
        "driver": found.driver or "none found",
        **found.packages,
    }
    backends = {
        "onnxruntime (CPU)": onnxruntime.available("cpu"),
        "onnxruntime (CUDA)": onnxruntime.available("cuda"),
        "tensorrt": tensorrt.available(),
        "tensorrt-rtx": tensorrt_rtx.available(),
    }
    return Diagnosis(backends=backends, machine=machine)
