"""Builds the launcher plugin where neither TensorRT nor a driver is, and plays TensorRT for it.

The plugin is built against a stand-in for NvInfer.h (``double/NvInfer.h``), played by
``player.cpp`` as TensorRT would, and finds ``double/libcuda.c`` where the driver would be. What
the driver was asked for is what the tests look at.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "plugins" / "launcher"
INT32, CHAR, FLOAT32 = 5, 6, 1  # TensorRT's PluginFieldType
DATA_TYPES = {"fp32": 0, "fp16": 1, "bf16": 7, "i32": 3, "i1": 4}  # TensorRT's DataType
INPUT, OUTPUT = 0xA00000000000, 0xB00000000000  # where the player says that tensors are
SANITIZE = "-fsanitize=address,undefined"


def cuda_include() -> str | None:
    """A folder with cuda.h: Triton brings one."""
    triton = importlib.util.find_spec("triton")
    roots = [Path(root) / "backends/nvidia" for root in triton.submodule_search_locations or ()
             ] if triton else []
    roots += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    return next((str(r / "include") for r in roots if (r / "include/cuda.h").is_file()), None)


def sanitizers(folder: Path) -> list[str]:
    """Flags that make memory errors and undefined behaviour fail, where the compiler has them."""
    probe = folder / "probe"
    probe.with_suffix(".cpp").write_text("int main() {}")
    tried = subprocess.run(["g++", SANITIZE, probe.with_suffix(".cpp"), "-o", probe],
                           capture_output=True, check=False)
    if tried.returncode or subprocess.run([probe], capture_output=True, check=False).returncode:
        return []
    return [SANITIZE, "-fno-sanitize-recover=all"]


def compile_all(commands: list[list[str]]) -> None:
    """Run compilers side by side; a warning is an error."""
    running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0 and not said, said


def build(folder: Path) -> None:
    """Put the plugin and its player for TensorRT 8 and 10 into a folder, and some drivers."""
    include = cuda_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("g++ or cuda.h is missing: the launcher plugin cannot be built")
    flags = ["-O0", "-g1", "-Wall", "-Wextra", "-fPIC", "-I", str(HERE / "double"),
             "-isystem", include]
    flags += sanitizers(folder)
    cpp = ["g++", "-std=c++17", *flags]
    compile_all([
        [*cpp, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
        for name in ("driver", "kernel")
    ])
    for driver, lacks in (("driver", []), ("old", ["-DWITHOUT_PUSH"])):
        (folder / driver).mkdir()
        compile_all([["gcc", *flags, *lacks, "-shared", str(HERE / "double/libcuda.c"), "-o",
                      str(folder / driver / "libcuda.so.1"), "-lpthread"]])
    for major in (8, 10):
        version = f"-DNV_TENSORRT_MAJOR={major}"
        compile_all([
            [*cpp, version, "-shared", "-Wl,--no-undefined", str(SOURCES / "plugin.cpp"),
             str(folder / "driver.o"), str(folder / "kernel.o"), "-o",
             str(folder / f"plugin{major}.so"), "-ldl"],
            [*cpp, version, str(HERE / "player.cpp"), "-o", str(folder / f"player{major}"),
             "-ldl", "-lpthread"],
        ])
    (folder / "broken").mkdir()
    (folder / "broken" / "libcuda.so.1").write_text("no library")


@dataclass
class Played:
    """What came of some commands.

    Attributes:
        said: lines that the player printed: results, and messages that the plugin logged.
        asked: lines that the driver wrote down, one a call.
        record: where it did; the code of module N is in ``record.N``.
    """

    said: list[str]
    asked: list[str]
    record: Path

    @property
    def results(self) -> list[str]:
        return [line for line in self.said if not line.startswith("log ")]

    @property
    def message(self) -> str:
        """The one message that was logged."""
        (line,) = (line for line in self.said if line.startswith("log "))
        start = "log error: tokred launcher: "
        assert line.startswith(start)
        return line.removeprefix(start)

    def calls(self, name: str) -> list[str]:
        """Arguments of the driver's calls of that name."""
        return [" ".join(line.split()[1:]) for line in self.asked if line.split()[0] == name]


class Stage:
    """Runs commands against the built plugin."""

    def __init__(self, built: Path, folder: Path) -> None:
        self.built, self.folder, self.runs = built, folder, 0

    def play(self, *commands: str, major: int = 10, driver: str = "driver", sm: int = 80,
             **told: str) -> Played:
        """Run a player that does as told; a crash, or what a sanitizer finds, is an error."""
        self.runs += 1
        record = self.folder / f"record{self.runs}"
        paths = [str(self.built / driver), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {
            **os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), "CUDA_SM": str(sm),
            "CUDA_RECORD": str(record), "ASAN_OPTIONS": "detect_leaks=0", **told,
        }
        done = subprocess.run(
            [self.built / f"player{major}", self.built / f"plugin{major}.so"],
            input="\n".join(commands), env=environment, capture_output=True, text=True,
            timeout=120, check=False,
        )
        assert done.returncode == 0 and not done.stderr, (done.stdout, done.stderr)
        asked = record.read_text().splitlines() if record.is_file() else []
        return Played(done.stdout.splitlines()[1:], asked, record)

    def node(self, name: str, fields: dict, nul: bool = False, **other: object) -> str:
        """Write fields as TensorRT's parser hands them over; the command that makes the plugin.

        Args:
            name: of the node.
            fields: as lower.py writes them.
            nul: strings end in NUL, as in TensorRT 8.6.
            other: fields to change; None takes one away, a tuple is given as type and data.
        """
        path = self.folder / f"{name}.fields"
        data = b""
        for key, value in {**fields, **other}.items():
            if key.startswith("plugin_") or value is None:
                continue
            kind, length, raw = encoded(value, nul)
            data += f"{key} {kind} {length}\n".encode() + raw + b"\n"
        path.write_bytes(data)
        return f"create {name} {path}"


def encoded(value: object, nul: bool) -> tuple[int, int, bytes]:
    """Type, length and bytes of one field."""
    if isinstance(value, tuple):
        kind, data = value
        return kind, len(data), struct.pack(f"{len(data)}f", *data)
    if isinstance(value, str):
        raw = value.encode() + b"\0" * nul
        return CHAR, len(raw), raw
    numbers = value if isinstance(value, list) else [value]
    return INT32, len(numbers), struct.pack(f"{len(numbers)}i", *numbers)


def expected_launch(facts: dict, batch: int, module: int = 1) -> str:
    """The driver's line for a launch as the kernel's call describes it."""
    arguments = [hex(INPUT + i) for i in range(1, len(facts["inputs"]) + 1)]
    arguments += map(str, facts["extras"])
    arguments += [hex(OUTPUT + i) for i in range(1, len(facts["outputs"]) + 1)]
    x, y = facts["grid"]
    return (f"module={module} grid={x},{y},{batch} block={facts['threads']},1,1 "
            f"shared={facts['fields']['shared']} stream=7 arguments={','.join(arguments)}")
