"""ONNX Runtime as a runner: numpy in, numpy out; its own errors become this package's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

Device = Literal["cpu", "cuda"]
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
# Products of float32 as PyTorch does them by default; TF32 has three digits.
OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
_FATAL = 4  # log only this: errors come back as exceptions, with the same words


class OrtRunner:
    """An open ONNX Runtime session."""

    def __init__(self, session: onnxruntime.InferenceSession, source: Path) -> None:
        self.session, self.source = session, source
        self.input_names = tuple(value.name for value in session.get_inputs())
        self.output_names = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once on ``feeds`` and return every output by name.

        Raises:
            InvalidRequest: an input is missing, or its type, shape or content does not fit.
            EnvironmentUnable: ONNX Runtime fails while running.
        """
        try:
            values = self.session.run(None, dict(feeds))
        except (_state().InvalidArgument, ValueError) as error:
            raise InvalidRequest(
                f"ONNX Runtime refuses the inputs of {self.source.name}: {first_line(error)}; "
                "feed what the I/O map of the bundle names"
            ) from error
        except ort_errors() as error:
            raise EnvironmentUnable(
                f"ONNX Runtime could not run {self.source.name}: {first_line(error)}; check the "
                "bundle with `tokred-export verify`, and the memory that is free"
            ) from error
        return dict(zip(self.output_names, values, strict=True))


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises:
        EnvironmentUnable: it is not installed or its libraries do not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentUnable(
            f"onnxruntime cannot be imported ({error}): install it with "
            "`pip install onnxruntime`, or `onnxruntime-gpu` for CUDA"
        ) from error
    return onnxruntime


def ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises, which share no base class of their own."""
    kinds = (value for value in vars(_state()).values() if isinstance(value, type))
    return (*(kind for kind in kinds if issubclass(kind, Exception)), RuntimeError, ValueError)


def _state() -> ModuleType:
    """ONNX Runtime's compiled module, where its exceptions live."""
    return load_onnxruntime().capi.onnxruntime_pybind11_state


def require_provider(device: Device) -> list[str]:
    """ONNX Runtime's providers for ``device``, the wanted one first.

    Raises:
        InvalidRequest: no such device.
        EnvironmentUnable: this ONNX Runtime was built without that provider.
    """
    if device not in PROVIDERS:
        raise InvalidRequest(f"no device {device!r}, expected one of {', '.join(PROVIDERS)}")
    ort, wanted = load_onnxruntime(), PROVIDERS[device]
    if wanted[0] not in ort.get_available_providers():
        raise EnvironmentUnable(
            f"onnxruntime {ort.__version__} here offers {_names(ort.get_available_providers())}, "
            f"expected {wanted[0]}: install onnxruntime-gpu in place of onnxruntime, or use "
            "the device cpu"
        )
    return wanted


def open_session(
    path: Path,
    device: Device = "cpu",
    threads: int | None = None,
    level: Literal["none", "extended", "all"] = "all",
    save_to: Path | None = None,
    external_bytes: int = 1024,
) -> onnxruntime.InferenceSession:
    """Open ``path`` with ONNX Runtime.

    Args:
        path: the ONNX file; external data lies beside it.
        device: where to run; the CUDA provider is never quietly replaced by the CPU's.
        threads: of the CPU provider; None lets ONNX Runtime choose.
        level: how far ONNX Runtime optimises the graph.
        save_to: write the optimised graph there, with weights of ``external_bytes`` and more in
            ``<name>.data`` beside it.
        external_bytes: see ``save_to``.

    Raises:
        EnvironmentUnable: no onnxruntime, or not this device.
        BuildFailed: ONNX Runtime does not accept the file.
    """
    ort, providers = load_onnxruntime(), require_provider(device)
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[level]
    if threads is not None:
        options.intra_op_num_threads = threads
    if save_to is not None:
        key = "session.optimized_model_external_initializers"
        options.optimized_model_filepath = str(save_to)
        options.add_session_config_entry(f"{key}_file_name", f"{save_to.name}.data")
        options.add_session_config_entry(f"{key}_min_size_in_bytes", str(external_bytes))
    if device == "cuda":
        # Its ScatterND warns of indices that come twice, past the session's own settings: a
        # reduction site's do, with the same row each time.
        ort.set_default_logger_severity(_FATAL)
    settings = [OPTIONS.get(name, {}) for name in providers]
    try:
        session = ort.InferenceSession(str(path), options, providers, settings)
    except ort_errors() as error:
        raise BuildFailed(
            f"onnxruntime {ort.__version__} does not accept {path}: {first_line(error)}; build "
            "the bundle again, or update onnxruntime if it is older than the build's"
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise EnvironmentUnable(
            f"ONNX Runtime fell back to {_names(session.get_providers())}, expected "
            f"{providers[0]}: check the GPU driver and CUDA libraries, or use the device cpu"
        )
    return session


def first_line(error: Exception) -> str:
    """The first line of an error's text, without ONNX Runtime's prefix."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.removeprefix("[ONNXRuntimeError] : ")


def _names(providers: Sequence[str]) -> str:
    return ", ".join(providers)
