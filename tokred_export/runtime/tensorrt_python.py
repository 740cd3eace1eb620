"""Which Python has TensorRT, and how an engine is opened: here, or in a process of that Python.

TensorRT's wheels and JetPack's packages are for one Python each, so the one that exports or
serves may be another: ``TOKRED_TENSORRT_PYTHON`` names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from tokred_export.errors import EnvironmentUnable

if TYPE_CHECKING:
    from tokred_export.runtime.remote import RemoteRunner
    from tokred_export.runtime.trt import TrtRunner

LAUNCHER_FILE = "libtokred_launcher.so"
_ASK_VERSION = "import tensorrt; print(tensorrt.__version__)"


def interpreter() -> str:
    """The Python that has TensorRT."""
    return os.environ.get("TOKRED_TENSORRT_PYTHON") or sys.executable


def is_here() -> bool:
    """Whether that is this very Python."""
    return interpreter() == sys.executable


def environment() -> dict[str, str]:
    """Variables with which that Python finds this package and the plugins."""
    if not is_here():
        # Of all that this process imports, only these two: what else lies on its path, or beside
        # them in site-packages, may be compiled for this Python alone.
        return {"PYTHONPATH": _own_packages_alone().name}
    roots = sorted({str(place.parent) for place in _own_packages()})
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*roots, *([known] if known else [])])}


def _own_packages() -> list[Path]:
    plugins = util.find_spec("tokred_plugins")
    places = plugins.submodule_search_locations if plugins is not None else ()
    return [Path(__file__).parents[1], *map(Path, places)]


@cache
def _own_packages_alone() -> tempfile.TemporaryDirectory[str]:
    """A folder that holds links to them and nothing else, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tokred-path-")
    for place in _own_packages():
        (Path(folder.name) / place.name).symlink_to(place.resolve(), target_is_directory=True)
    return folder


@cache
def installed_version() -> str | None:
    """TensorRT's version in that Python; None where it cannot be imported."""
    try:
        done = subprocess.run(
            [interpreter(), "-c", _ASK_VERSION], capture_output=True, text=True, check=True,
            timeout=120, env={**os.environ, **environment()},  # as builds and runs will see it
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[-1]


def missing() -> str:
    """What to do where it cannot be imported."""
    if not is_here() and shutil.which(interpreter()) is None:
        return (
            f"TOKRED_TENSORRT_PYTHON names {interpreter()}, which is no program here: name the "
            "Python that has TensorRT"
        )
    return (
        f"TensorRT cannot be imported by {interpreter()}: install the package tensorrt there, or "
        "name another Python in TOKRED_TENSORRT_PYTHON"
    )


def require_version() -> str:
    """TensorRT's version.

    Raises:
        EnvironmentUnable: it cannot be imported.
    """
    version = installed_version()
    if version is None:
        raise EnvironmentUnable(missing())
    return version


def open_engine(plan: Path, launcher: Path | None) -> TrtRunner | RemoteRunner:
    """Open a plan in this process, or in one of the Python that has TensorRT.

    Args:
        plan: the engine.
        launcher: the launcher plugin that it needs, if any.
    """
    if is_here():
        from tokred_export.runtime.trt import TrtRunner

        return TrtRunner(plan, launcher)
    from tokred_export.runtime.remote import RemoteRunner

    return RemoteRunner(plan, launcher, interpreter(), environment())
