"""Keeping TensorRT 8's 16-bit matrix products to float32 accumulation.

TensorRT 8 takes the fastest kernel for a product, and on Hopper that is one that accumulates in
float16: errors of a layer then exceed those of eager PyTorch several times. Which kernel a
tactic is, only the verbose log says ("Tactic Name: ... Tactic: 0x..."), so the names are read
from there and kept in a file beside the timing cache: a tactic's number is the same in every
build of one release.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tokred_export.disk import write_atomic

if TYPE_CHECKING:
    import tensorrt

_NAMED = re.compile(r"Tactic Name: (\S+) Tactic: (0x[0-9a-f]+)")
# a, b and output types, then the type of the sum: "f16f16_f16f16_f16" against "..._f32".
_HALF_SUM = re.compile(r"f16f16_f16f16_f16(_|$)|(^|_)h\d*gemm|h884|h1688|h16816")


def accumulates_in_half(name: str) -> bool:
    """Whether a kernel's name says that it sums float16 products in float16."""
    return _HALF_SUM.search(name) is not None


class Tactics:
    """Names of tactics by number, from earlier builds and from this one's log."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.names: dict[int, str] = {}
        if file is not None and file.is_file():
            self.names = {int(k, 16): v for k, v in json.loads(file.read_text()).items()}

    def read(self, line: str) -> None:
        """Take the name from a line of the log, if it has one."""
        for name, number in _NAMED.findall(line):
            self.names[int(number, 16)] = name

    def is_half(self, number: int) -> bool:
        """Whether the tactic (a signed 64-bit number) is known to sum in float16."""
        return accumulates_in_half(self.names.get(number & (2**64 - 1), ""))

    def save(self) -> None:
        """Keep what is known."""
        if self._file is not None:
            known = {hex(number): name for number, name in sorted(self.names.items())}
            write_atomic(self._file, json.dumps(known, indent=0).encode())


def listening_logger(trt: ModuleType, tactics: Tactics) -> tensorrt.ILogger:
    """A logger that prints warnings and errors, and reads tactic names from the verbose rest."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: tensorrt.ILogger.Severity, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                print(f"[TRT] {message}", flush=True)
            else:
                tactics.read(message)

    return Logger()


def float32_sums(trt: ModuleType, tactics: Tactics) -> tensorrt.IAlgorithmSelector:
    """A selector that leaves out the tactics that sum in float16."""

    class Selector(trt.IAlgorithmSelector):
        def __init__(self) -> None:
            trt.IAlgorithmSelector.__init__(self)

        def select_algorithms(
            self, context: tensorrt.IAlgorithmContext, choices: list[tensorrt.IAlgorithm]
        ) -> list[int]:
            return [
                index for index, choice in enumerate(choices)
                if not tactics.is_half(choice.algorithm_variant.tactic)
            ]

        def report_algorithms(
            self, contexts: list[tensorrt.IAlgorithmContext], choices: list[tensorrt.IAlgorithm]
        ) -> None:
            pass

    return Selector()


def half_sums(layers: list[dict]) -> list[str]:
    """Layers of an engine, as its inspector describes them, that sum in float16."""
    return [
        f"{layer['Name']} ({layer['TacticName']})" for layer in layers
        if accumulates_in_half(layer.get("TacticName", ""))
    ]
