"""Who may import whom: the runtime needs no torch, the plugins need no tokred_export."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokred_export"
PLUGINS = ROOT / "plugins" / "tokred_plugins"
PYTHON310 = ROOT / ".venv310" / "bin" / "python"

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "triton"}
# What a deployed runtime is installed with, and what it looks for only when asked to run.
INSTALLED = {"numpy", "msgspec", "tokenizers"}
LAZY = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


@cache
def tree(path):
    """The parsed source of a file."""
    return ast.parse(path.read_text(), str(path))


def module_name(path):
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name):
    """The file of a dotted name, or None where it is no module of the package."""
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imported(node, path):
    """Absolute dotted names that an import statement of ``path`` may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        up = node.level - (path.name == "__init__.py")
        base = ".".join(package[: len(package) - up] + ([base] if base else []))
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports(path, top_only=False):
    """Every name that ``path`` imports; ``top_only``: just what importing it executes."""
    nodes = tree(path).body if top_only else ast.walk(tree(path))
    statements = (n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))
    return {name for node in statements for name in imported(node, path)}


def roots(names):
    """The top-level packages of dotted names."""
    return {name.split(".")[0] for name in names}


def reachable(paths):
    """``paths`` and every file of the package that they import, directly or not."""
    seen, todo = set(), list(paths)
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            if name.split(".")[0] == "tokred_export":
                parents = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
                todo += [file for file in map(module_file, parents) if file]
    return seen


RUNTIME = sorted(reachable((PACKAGE / "runtime").rglob("*.py")))
RUNTIME_NAMES = [module_name(path) for path in RUNTIME]


def test_the_walk_sees_what_it_should():
    """The runtime reaches the bundle and the errors, and the walk tells torch when it is there."""
    assert {"tokred_export.bundle", "tokred_export.errors", "tokred_export.runtime.session"} <= set(
        RUNTIME_NAMES
    )
    everything = {name for path in PACKAGE.rglob("*.py") for name in roots(imports(path))}
    assert {"torch", "onnx"} <= everything


@pytest.mark.parametrize("path", RUNTIME, ids=RUNTIME_NAMES)
def test_runtime_imports_nothing_heavy(path):
    """No module that the runtime reaches names a heavy package, not even inside a function."""
    foreign = roots(imports(path)) - set(sys.stdlib_module_names) - {"tokred_export"}
    assert foreign & HEAVY == set()
    assert foreign <= INSTALLED | LAZY
    assert roots(imports(path, top_only=True)) & LAZY == set()


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: path.name)
def test_plugins_do_not_import_the_tool(path):
    """The operators stand alone."""
    assert "tokred_export" not in roots(imports(path))


def loaded_by(python, modules, cwd=None):
    """Top-level packages that a fresh interpreter holds after importing ``modules``."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# The process that builds TensorRT engines lives in TensorRT's Python, which has no more.
BUILDER = "tokred_export.backends.tensorrt_build"
ON_310 = sorted(reachable([*RUNTIME, PACKAGE / "backends" / "tensorrt_build.py"]))


@pytest.mark.parametrize("modules", [RUNTIME_NAMES, [BUILDER]], ids=["runtime", "builder"])
def test_importing_loads_nothing_heavy(modules):
    """A fresh interpreter with the whole runtime imported holds no heavy package."""
    loaded = loaded_by(sys.executable, modules)
    assert loaded & (HEAVY | LAZY) == set()
    assert "numpy" in loaded


def test_registering_plugins_takes_triton_and_nothing_heavier():
    """What that process imports for TensorRT 10.15 and later; TensorRT itself comes on top."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    loaded = loaded_by(
        sys.executable, [BUILDER, "tokred_plugins.quick", "tokred_plugins.registry"]
    )
    assert loaded & HEAVY == {"triton"}


@pytest.mark.parametrize("path", ON_310, ids=map(module_name, ON_310))
def test_runtime_is_python_310_grammar(path):
    """Python 3.10, the runtime's oldest, can parse it."""
    ast.parse(path.read_text(), str(path), feature_version=(3, 10))


@pytest.mark.skipif(not PYTHON310.exists(), reason="no .venv310 with Python 3.10 in the project")
@pytest.mark.parametrize("modules", [RUNTIME_NAMES, [BUILDER]], ids=["runtime", "builder"])
def test_imports_on_python_310(modules):
    """Python 3.10 with numpy and msgspec imports the whole runtime, and the builder."""
    assert loaded_by(PYTHON310, modules, cwd=ROOT) & HEAVY == set()
