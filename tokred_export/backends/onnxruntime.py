"""ONNX Runtime: keeps an optimised copy of the graph, so that a start does not optimise again.

The copy is made at the level "extended". What "all" adds is memory layouts for the CPU at hand,
which must not travel; ONNX Runtime adds them when it opens the copy.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokred_export.backends.common import (
    Availability,
    EngineInfo,
    engine_folder,
    processor_name,
    write_engine,
)
from tokred_export.backends.graph import hash_sources, load_graph, walk_nodes
from tokred_export.disk import clear_disk_errors
from tokred_export.errors import BuildFailed, EnvironmentUnable
from tokred_export.runtime.ort import (
    PROVIDERS,
    Device,
    OrtRunner,
    load_onnxruntime,
    open_session,
)

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
_LEVEL = "extended"
_EXTERNAL_BYTES = 1024  # smaller weights stay in the graph

_NUMPY = {
    "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
}  # fmt: skip


def available(provider: Device = "cpu") -> Availability:
    """Whether ONNX Runtime can build and run here with ``provider``."""
    try:
        ort = load_onnxruntime()
    except EnvironmentUnable as error:
        return Availability(can_build=False, can_run=False, reason=str(error))
    offered = ort.get_available_providers()
    fits = PROVIDERS[provider][0] in offered
    return Availability(
        can_build=fits,
        can_run=fits,
        reason=f"onnxruntime offers {', '.join(offered)}",
        version=ort.__version__,
    )


def folder_name(provider: Device = "cpu") -> str:
    """The folder below ``engines/`` for engines that are built here."""
    return engine_folder(NAME, provider, load_onnxruntime().__version__)


def build(
    onnx_path: Path, out_dir: Path, *, provider: Device = "cpu", threads: int | None = None
) -> EngineInfo:
    """Write an optimised copy of ``onnx_path`` to ``out_dir`` and check that it is the same.

    The copy is opened again without optimisation: it must hold the same kinds of nodes, and give
    on the CPU the very same outputs, on CUDA outputs of the same types and shapes.

    Args:
        onnx_path: the graph; its name without suffix becomes the engine's component.
        out_dir: gets ``<component>.onnx``, ``<component>.onnx.data`` and ``engine.json``.
        provider: "cpu" or "cuda".
        threads: of the CPU provider, for the check; None lets ONNX Runtime choose.

    Raises:
        InvalidRequest: no such file.
        EnvironmentUnable: no ONNX Runtime, not this provider, or the disk is full.
        BuildFailed: ONNX Runtime does not accept the file, or its copy differs.
    """
    ort, graph = load_onnxruntime(), load_graph(onnx_path)
    sources = hash_sources(onnx_path, graph)
    started = time.perf_counter()
    with clear_disk_errors(out_dir, writable=True):
        out_dir.mkdir(parents=True, exist_ok=True)
        target = out_dir / f"{onnx_path.stem}.onnx"
        for stale in _files(target):
            stale.unlink()
    kinds = _write_and_check(onnx_path, target, provider, threads)
    info = EngineInfo(
        backend=NAME,
        version=ort.__version__,
        component=onnx_path.stem,
        file=target.name,
        files=tuple(path.name for path in _files(target)),
        target=provider,
        machine=platform.machine(),
        processor=processor_name(),
        onnx_files=sources,
        seconds=round(time.perf_counter() - started, 3),
        bytes=sum(path.stat().st_size for path in _files(target)),
        layers=kinds.total(),
        layers_from="graph",
        options={"level": _LEVEL, "threads": threads, "external_bytes": _EXTERNAL_BYTES},
        can_run_here=True,
        reason="it was opened and run here",
    )
    with clear_disk_errors(out_dir):
        write_engine(out_dir, info)
    return info


def node_kinds(path: Path) -> Counter[str]:
    """How often each op occurs in an ONNX file, ``domain::type``."""
    return Counter(f"{node.domain}::{node.op_type}" for node in walk_nodes(load_graph(path).graph))


def example_feeds(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Inputs that any graph of this tool accepts: ids 0, full prompts, a ramp for states."""
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        kind = _NUMPY[value.type]
        if np.issubdtype(kind, np.floating):
            count = int(np.prod(shape))
            feeds[value.name] = np.linspace(-1, 1, count, dtype=kind).reshape(shape)
        else:
            feeds[value.name] = np.zeros(shape, kind)
    if "prompt_len" in feeds and "input_ids" in feeds:
        feeds["prompt_len"] += feeds["input_ids"].shape[1]
    return feeds


def _files(target: Path) -> list[Path]:
    data = target.with_name(f"{target.name}.data")
    return [path for path in (target, data) if path.exists()]


def _write_and_check(
    source: Path, target: Path, provider: Device, threads: int | None
) -> Counter[str]:
    """Write the copy, open it as it is, and compare; one session at a time holds the weights."""
    session = open_session(
        source, provider, threads, level=_LEVEL, save_to=target, external_bytes=_EXTERNAL_BYTES
    )
    feeds = example_feeds(session)
    expected = OrtRunner(session, source).run(feeds)
    del session
    again = target.with_name(f"again-{target.name}")
    try:
        session = open_session(target, provider, threads, level="none", save_to=again)
        written, loaded = node_kinds(target), node_kinds(again)
    finally:
        for path in _files(again):
            path.unlink()
    if written != loaded:
        differ = sorted((written - loaded) + (loaded - written))
        raise BuildFailed(
            f"ONNX Runtime reads its own copy {target.name} with other nodes than it wrote "
            f"({', '.join(differ)}): run the ONNX file itself, or update onnxruntime"
        )
    found = OrtRunner(session, target).run(feeds)
    if name := _first_difference(expected, found, exact=provider == "cpu"):
        raise BuildFailed(
            f"ONNX Runtime's copy {target.name} gives another {name} than {source.name}: run "
            "the ONNX file itself, or update onnxruntime"
        )
    return written


def _first_difference(
    expected: dict[str, np.ndarray], found: dict[str, np.ndarray], exact: bool
) -> str | None:
    """The first output whose type, shape or (``exact``) bytes differ."""
    for name, array in expected.items():
        other = found[name]
        if (array.dtype, array.shape) != (other.dtype, other.shape):
            return name
        if exact and array.tobytes() != other.tobytes():
            return name
    return None
