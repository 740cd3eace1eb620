"""What a launcher library holds that names the TensorRT it was compiled for."""

from __future__ import annotations


def launcher_text(version: str) -> str:
    """For a release such as 10.9.0.34."""
    return "tokred launcher for TensorRT {}.{}\0".format(*version.split("."))
