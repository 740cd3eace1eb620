"""NVIDIA's own plugin module, importable as ``tensorrt.plugin`` without TensorRT.

The bindings wheel holds the module, and needs three libraries to load. TensorRT for RTX has two
of them under other names; the third only has to be there. What comes out registers and validates
plugins as TensorRT 11 does, and can build nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
}
PLUGIN_LIBRARY = "libnvinfer_plugin.so.11"
# The classes that hold a dimension cannot be made from Python: stand-ins take their names.
PACKAGE = """
from tensorrt_bindings import *
from tensorrt_bindings import __version__
from nvidia_dimensions import DimsExprs, IDimensionExpr, ISymExpr
"""


def what_is_missing() -> str | None:
    """Why the arrangement cannot be made here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "TensorRT's bindings are arranged on x86-64 Linux only"
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    wheels = {
        "tensorrt_bindings": "tensorrt-cu13-bindings", "tensorrt_rtx_libs": "tensorrt-rtx-cu13",
        "triton": "triton",
    }
    missing = [name for module, name in wheels.items() if importlib.util.find_spec(module) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def arrange(folder: Path) -> dict[str, str]:
    """Lay the libraries and the package ``tensorrt`` out in ``folder``.

    Returns:
        The environment of a process that can import them and compile kernels.
    """
    libraries = folder / "libraries"
    package = folder / "python" / "tensorrt"
    libraries.mkdir()
    package.mkdir(parents=True)
    rtx = importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations[0]
    for name, existing in LIBRARIES.items():
        (libraries / name).symlink_to(Path(rtx) / existing)
    source = folder / "empty.c"
    source.write_text("int initLibNvInferPlugins(void* log, const char* space) { return 1; }\n")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{PLUGIN_LIBRARY}", source, "-o",
         libraries / PLUGIN_LIBRARY], check=True, timeout=60,
    )
    (package / "__init__.py").write_text(PACKAGE)
    (package / "plugin.py").write_text("from tensorrt_bindings.plugin import *\n")

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(package.parent), str(HERE), *filter(None, sys.path)]
    library_paths = [str(libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return {
        **environment, "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": os.pathsep.join(library_paths),
    }
