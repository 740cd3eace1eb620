"""The README's commands run, and its links and names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker):
    """The fenced block behind an HTML comment."""
    return re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)[1]


def environment(folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TOKRED_CACHE": str(folder / "cache")}


def commands():
    lines = (line.partition("  #")[0].strip() for line in block("run").splitlines())
    return [line for line in lines if line]


@pytest.mark.slow
def test_commands_run(tmp_path):
    """Every command but `make demo`, which CI cannot nest, and the Python example after them."""
    found = commands()
    assert found[0] == "make demo"
    for command in found[1:]:
        done = subprocess.run(
            command, shell=True, check=False, cwd=tmp_path, env=environment(tmp_path),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "out" / "parity.xml").is_file()
    done = subprocess.run(
        [sys.executable, "-c", block("python")], check=False,
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 4096) (1, ")


def test_code_map_names_what_exists():
    """Modules of the code map are there."""
    code_map = TEXT.split("## Code map")[1].split("Letters:")[0]
    for name in re.findall(r"(\w+)\.py", code_map):
        assert list(ROOT.rglob(f"{name}.py")), name
    for name in re.findall(r"^      (\w+)/", code_map, re.MULTILINE):
        assert (ROOT / "tokred_export" / name).is_dir(), name


def test_demo_figures_are_those_of_the_shipped_model():
    """The table of bits per byte says what training.json says."""
    import json

    path = ROOT / "tokred_export" / "data" / "demo" / "training.json"
    for value in json.loads(path.read_text())["bits_per_byte"].values():
        assert f"| {value:.3f} |" in TEXT


def test_make_demo_and_make_test_are_there():
    """The two commands of the README are targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "setup"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
