"""Which tactic of a kernel is fastest on this GPU: measured, and remembered.

TensorRT does this itself for quick plugins; the launcher plugin runs the one kernel it is given.
Only kernels whose time does not depend on what their inputs hold are measured, on random numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from tokred_plugins.aot import (
    DESCRIPTORS_DRIVER,
    Compiled,
    DoesNotFit,
    compile_call,
    compile_key,
)
from tokred_plugins.faces import MULTIPROCESSORS
from tokred_plugins.kernels import Call, Spec
from tokred_plugins.retune import candidates

from tokred_export.disk import write_atomic
from tokred_export.errors import BuildFailed
from tokred_export.runtime.device import Device

MEASURED = ("linear", "linear_few")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "i32": 4, "i1": 1}
_WARM, _RUNS, _REPEATS = 2, 5, 3
# Products that take long are what a GPU's power limit slows down, some more than others; in a few
# launches it does not bite yet. The best few are timed again, in turns, for so long.
_LONG_MS, _FINALISTS, _NEAR, _HEAT_MS, _LOAD_MS, _TURNS = 0.2, 4, 1.1, 200.0, 60.0, 2
# Of two tactics, relative L2, at most. 16 bit: two roundings that have nothing to do with each
# other, 2^-11 or 2^-8 / sqrt(3) each. float32: sums of three TF32 products in another order.
_AGREEMENT = {"fp32": 1e-5, "fp16": 4e-4, "bf16": 3.2e-3}
_COMPARED = 4 << 20  # numbers, from either end


class Tuner:
    """Measures each call once, and keeps what it found in a file.

    Args:
        sm: compute capability of the GPU, times ten.
        file: results of earlier builds on this kind of GPU; None forgets them.
        multiprocessors: of the GPU; None where that is not known.
        driver: the CUDA version of the driver, whose compiler takes part; None likewise.
    """

    def __init__(
        self, sm: int, file: Path | None = None, multiprocessors: int | None = None,
        driver: int | None = None,
    ) -> None:
        self._sm, self._file, self._driver = sm, file, driver
        self._multiprocessors = multiprocessors or MULTIPROCESSORS
        self._known: dict[str, str] = {}
        if file is not None and file.is_file():
            self._known = json.loads(file.read_text())
        self._device: Device | None = None
        self._buffers: dict[str, tuple[int, int]] = {}
        # Lengths share code, and loading it costs the driver's compiler a second.
        self._loaded: dict[str, tuple[Compiled, tuple[object, object]] | None] = {}

    def best(self, call: Call) -> Call:
        """The call with its fastest tactic, or as it is if it is not measured.

        Raises:
            BuildFailed: the call's own tactic does not give the same twice.
        """
        if call.kernel.name not in MEASURED:
            return call
        possible = candidates(call, self._multiprocessors)
        offered = {str(candidate.tactic): candidate for candidate in possible}
        key = self._key(call)
        known = offered.get(self._known.get(key, ""))
        if known is None or not self._reads(known.tactic.since >= 90):
            times = {
                name: ms for name, candidate in offered.items()
                if (ms := self._time(candidate)) is not None
            }
            if not times:
                return call  # none fits this GPU: compiling it will say so
            ranked = self._under_load(sorted(times, key=lambda name: times[name]), offered, times)
            plain = offered[next(iter(times))]  # the call's own tactic, where that fits
            fit = (name for name in ranked if self._agrees(offered[name], plain))
            found = next(fit, None)
            if found is None:
                raise BuildFailed(
                    f"the kernel {call.kernel.name} with {plain.tactic} gives something else each "
                    "time on this GPU, or leaves its output unwritten; this is a bug of the kernel "
                    "or of the driver's compiler"
                )
            self._known[key] = found
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._file, json.dumps(self._known, indent=0).encode())
        return offered[self._known[key]]

    def _key(self, call: Call) -> str:
        """What decides the fastest tactic, and whether what it computes was found right: code and
        compiler, types, constants, lengths, batch."""
        import triton

        shapes = {name: (spec.shape, spec.dtype) for name, spec in call.outputs.items()}
        parts = (
            call.kernel.name, call.kernel.code, triton.__version__, self._sm,
            self._multiprocessors, self._driver, dict(call.inputs),
            dict(call.extras), shapes, dict(call.constants),
        )
        return repr(parts)

    def _reads(self, descriptors: bool) -> bool:
        """Whether this machine's driver reads such code: a file of tactics may be shared with
        machines whose driver is older."""
        if not descriptors:
            return True
        self._device = self._device or Device()
        return self._device.cuda_version >= DESCRIPTORS_DRIVER

    def close(self) -> None:
        """Give the GPU's memory back."""
        for address, _ in self._buffers.values():
            self._device.free(address)
        self._buffers.clear()
        for found in self._loaded.values():
            if found is not None:
                self._device.unload_kernel(found[1])
        self._loaded.clear()

    def _time(self, call: Call) -> float | None:
        """Milliseconds of one launch; None where it does not fit the GPU."""
        device = self._device = self._device or Device()
        launch = self._launch(call)
        if launch is None:
            return None
        for _ in range(_WARM):
            launch()
        taken = []
        for _ in range(_REPEATS):
            taken.append(device.elapsed_ms(lambda: [launch() for _ in range(_RUNS)]) / _RUNS)
        return min(taken)

    def _under_load(
        self, ranked: list[str], offered: Mapping[str, Call], times: Mapping[str, float]
    ) -> list[str]:
        """The ranking, with those near the best as they do on a GPU that has been at work."""
        best = times[ranked[0]]
        near = [name for name in ranked[:_FINALISTS] if times[name] <= _NEAR * best]
        if best < _LONG_MS or len(near) < 2:
            return ranked
        self._mean(offered[near[0]], best, _HEAT_MS)
        taken = dict.fromkeys(near, 0.0)
        for _ in range(_TURNS):
            for name in near:
                taken[name] += self._mean(offered[name], times[name], _LOAD_MS)
        return [*sorted(near, key=lambda name: taken[name]), *ranked[len(near) :]]

    def _mean(self, call: Call, expected: float, for_ms: float) -> float:
        """Milliseconds of a launch among as many as take about so long."""
        launch, count = self._launch(call), math.ceil(for_ms / expected)
        return self._device.elapsed_ms(lambda: [launch() for _ in range(count)]) / count

    def _launch(self, call: Call) -> Callable[[], None] | None:
        """Puts the call on the stream; None where it does not fit the GPU."""
        found = self._load(call)
        if found is None:
            return None
        compiled, function = found
        arguments, batch = self._arguments(compiled, call)
        grid = (*call.grid, batch)
        if compiled.hidden:
            arguments.append(self._room("scratch", compiled.scratch * math.prod(grid)))
        return partial(
            self._device.launch, function, grid, compiled.block, compiled.shared, arguments
        )

    def _agrees(self, call: Call, other: Call) -> bool:
        """Whether two tactics give the same, each time: compilers err, and races show so."""
        expected = self._results(other)
        norm = np.linalg.norm(expected)
        for _ in range(_REPEATS):
            found = self._results(call)
            if not np.linalg.norm(found - expected) <= _AGREEMENT[call.inputs["x"]] * norm:
                return False
        return True

    def _results(self, call: Call) -> np.ndarray:
        """The first and the last numbers of the output, float32; those not written are NaN."""
        (spec,) = call.outputs.values()
        width, size = BYTES[spec.dtype], math.prod(spec.shape)
        address = self._buffer("y", spec)
        self._device.fill(address, 0xFF, width * size)
        self._launch(call)()
        self._device.synchronize()
        pieces = [(0, min(size, _COMPARED)), (max(size - _COMPARED, 0), min(size, _COMPARED))]
        found = []
        for first, count in pieces:
            raw = np.empty(width * count, np.uint8)
            self._device.download(address + width * first, raw)
            found.append(_numbers(raw, spec.dtype))
        return np.concatenate(found)

    def _load(self, call: Call) -> tuple[Compiled, tuple[object, object]] | None:
        """The code and its function on the GPU; None where it does not fit."""
        key = compile_key(call)
        if key not in self._loaded:
            try:
                compiled = compile_call(call, self._sm)
            except DoesNotFit:
                compiled = None
            if compiled is None or not self._reads(compiled.scratch > 0):
                self._loaded[key] = None
            else:
                kernel = self._device.load_kernel(compiled.ptx, compiled.entry, compiled.shared)
                self._loaded[key] = compiled, kernel
        return self._loaded[key]

    def _arguments(self, compiled: Compiled, call: Call) -> tuple[list[int | np.int32], int]:
        """Addresses and int32 extras in the entry's order, and the batch."""
        batch, inner = call.outputs["y"].shape[0], int(call.constants["K"])
        length, columns = call.extras["length"], int(call.constants["N"])
        specs = {
            "x": Spec((batch, length, inner), call.inputs["x"]),
            "weight": Spec((inner, columns), call.inputs["weight"]),
            "y": call.outputs["y"],
        }
        if "squares" in call.inputs:
            specs["squares"] = Spec((batch, length, int(call.constants["PARTS"])), "fp32")
        values: list[int | np.int32] = []
        for parameter in compiled.parameters:
            if parameter.role == "extra":
                values.append(np.int32(call.extras[parameter.name]))
            else:
                values.append(self._buffer(parameter.name, specs[parameter.name]))
        return values, batch

    def _buffer(self, name: str, spec: Spec) -> int:
        """The address of a tensor of random numbers, at least as large as asked for."""
        size = BYTES[spec.dtype] * math.prod(spec.shape)
        held = self._buffers.get(name)
        address = self._room(name, size)
        if self._buffers[name] != held:
            self._device.upload(_random_bytes(size, spec.dtype, name == "squares"), address)
        return address

    def _room(self, name: str, size: int) -> int:
        """The address of at least so many bytes."""
        address, held = self._buffers.get(name, (0, -1))
        if held < size:
            if address:
                self._device.free(address)
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
        return address


def _numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a dtype as float32."""
    if dtype == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float32 if dtype == "fp32" else np.float16).astype(np.float32)


def _random_bytes(size: int, dtype: str, squares: bool = False) -> np.ndarray:
    """Numbers of a standard deviation of a tenth, or squares of such; zeros would run faster than
    real data."""
    block = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) / 10
    block = block * block if squares else block
    if dtype == "bf16":
        raw = (block.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        raw = block.astype(np.float32 if dtype == "fp32" else np.float16).view(np.uint8)
    return np.resize(raw, size)
