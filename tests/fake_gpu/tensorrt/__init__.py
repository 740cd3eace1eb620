"""TensorRT 8.6 to 11 as far as this tool sees it; see README.md one folder up."""

from __future__ import annotations

import ctypes
import enum
import json
import os
import sys
import types

import numpy as np

_said = json.loads(os.environ.get("FAKE_TENSORRT", "{}"))
__version__ = _said.get("version", "8.6.0")
_trouble = _said.get("trouble", "")
_release = tuple(map(int, __version__.split(".")[:2]))


def _enum(name, *members):
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})


DataType = _enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "BF16", "INT64")
float32, float16, int32 = DataType.FLOAT, DataType.HALF, DataType.INT32
TensorIOMode = _enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE", "JSON")
LayerType = _enum("LayerType", "OTHER", "MATRIX_MULTIPLY", "CAST", "PLUGIN_V2", "PLUGIN_V3")
if _release < (10, 0):
    NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH")
else:
    NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1}
    )
    bfloat16 = DataType.BF16

    class IProgressMonitor:
        pass


if _release < (11, 0):
    BuilderFlag = _enum("BuilderFlag", "FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS")
else:
    BuilderFlag = _enum("BuilderFlag", "TF32")

_NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32,
    DataType.BOOL: np.bool_, DataType.INT64: np.int64,
}


def nptype(kind):
    """As TensorRT's own, which raises for bfloat16."""
    return _NUMPY[kind]


class ILogger:
    Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Logger(ILogger):
    ERROR, WARNING = ILogger.Severity.ERROR, ILogger.Severity.WARNING

    def __init__(self, severity):
        if _trouble == "broken library":
            raise AttributeError("libnvinfer.so.8: cannot open shared object file")

    def log(self, severity, message):
        pass


class IProfiler:
    pass


class _Registry:
    def __init__(self):
        self.plugin_creator_list = []

    def load_library(self, path):
        with open(path, "rb") as file:  # another major would crash
            made_for = "tokred launcher for TensorRT {}.{}\0".format(*_release)
            if made_for.encode() not in file.read():
                return None
        self.plugin_creator_list.append(types.SimpleNamespace(name="KernelLaunch"))
        return "handle"


_registry = _Registry()


def get_plugin_registry():
    return _registry


# --- building ------------------------------------------------------------------------------------


class _Layer:
    def __init__(self, node, type):
        self.name, self.type, self.num_outputs = node.name, type, len(node.output)
        self.pinned = []

    def __setattr__(self, name, value):
        if name == "precision":
            self.pinned.append(["precision", value.name])
        object.__setattr__(self, name, value)

    def set_output_type(self, index, kind):
        self.pinned.append([index, kind.name])


class _Network:
    def __init__(self, flags):
        self.flags, self.layers, self.inputs, self.outputs, self.path = flags, [], [], [], ""

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, index):
        return self.layers[index]

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.error = network, None

    def parse_from_file(self, path):
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        self.network.path = path
        for node in graph.node:
            kind = LayerType.OTHER
            if node.domain:
                known = [creator.name for creator in _registry.plugin_creator_list]
                if node.op_type not in known or _trouble == "parse error":
                    self.error = node.name, f"no plugin {node.op_type}\n\nin any namespace\n"
                    return False
                kind = LayerType.PLUGIN_V2 if _release < (10, 15) else LayerType.PLUGIN_V3
            elif node.op_type in ("MatMul", "Cast"):
                kind = LayerType.CAST if node.op_type == "Cast" else LayerType.MATRIX_MULTIPLY
            self.network.layers.append(_Layer(node, kind))
        self.network.inputs = [_value(value) for value in graph.input]
        self.network.outputs = [_value(value) for value in graph.output]
        return True

    def get_error(self, index):
        node, text = self.error
        return types.SimpleNamespace(node=lambda: node, desc=lambda: text)


def _value(value):
    shape = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
    if _trouble == "other shapes" and len(shape) > 2:
        shape[2] += 1
    return types.SimpleNamespace(name=value.name, shape=shape)


class _TimingCache:
    def __init__(self, data):
        self.lines = data.decode().splitlines()

    def serialize(self):
        return memoryview("\n".join(self.lines).encode())


class _Config:
    def __init__(self):
        self.set_flags, self.cleared_flags, self.profile, self.timings = [], [], None, None
        self.tactic_sources = None

    def create_timing_cache(self, data):
        return _TimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.timings = cache
        return ignore_mismatch or cache.lines[:1] != ["of another GPU"]

    def get_timing_cache(self):
        return self.timings

    def add_optimization_profile(self, profile):
        self.profile = profile.shapes

    def set_flag(self, flag):
        self.set_flags.append(flag.name)

    def clear_flag(self, flag):
        self.cleared_flags.append(flag.name)

    if _release < (10, 0):

        def set_tactic_sources(self, sources):
            self.tactic_sources = sources


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, best, most):
        self.shapes[name] = [least, best, most]


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return _Network(flags)

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        if _trouble == "abort":
            print("terminate called after throwing an instance of 'Exception'", flush=True)
            os.abort()
        layers = [self._layer(layer) for layer in network.layers]
        _write_log(network, config, layers)
        if config.timings is not None:
            config.timings.lines.append(f"timings of {os.path.basename(network.path)}")
        if hasattr(config, "progress_monitor"):
            config.progress_monitor.phase_start("Building", None, 3)
            assert config.progress_monitor.step_complete("Building", 1) is True
            config.progress_monitor.phase_finish("Building")
        if _trouble == "no engine":
            return None
        _change_plugins(layers)
        return memoryview(json.dumps({"layers": layers}).encode())

    def _layer(self, layer):
        found = {"Name": layer.name, "LayerType": "kgen"}
        if layer.type in (LayerType.PLUGIN_V2, LayerType.PLUGIN_V3):
            return {**found, "LayerType": {3: "PluginV2", 4: "PluginV3"}[layer.type]}
        return found


def _change_plugins(layers):
    first = next((layer for layer in layers if layer["LayerType"].startswith("Plugin")), None)
    if first is not None and _trouble == "lost plugin":
        layers.remove(first)
    if first is not None and _trouble == "turned plugin":
        first["LayerType"] = "kgen"


def _write_log(network, config, layers):
    if "FAKE_TENSORRT_LOG" not in os.environ:
        return
    quick = sys.modules.get("tokred_plugins.quick")
    said = {
        "file": os.path.basename(network.path), "network_flags": network.flags,
        "set": config.set_flags, "cleared": config.cleared_flags,
        "tactic_sources": config.tactic_sources, "profile": config.profile,
        "level": getattr(config, "builder_optimization_level", None),
        "verbosity": config.profiling_verbosity.name,
        "timings": None if config.timings is None else list(config.timings.lines),
        "pinned": {layer.name: layer.pinned for layer in network.layers if layer.pinned},
        "registered": dict(quick._registered) if quick else {},
    }
    with open(os.environ["FAKE_TENSORRT_LOG"], "a") as file:
        file.write(json.dumps(said) + "\n")


# --- running -------------------------------------------------------------------------------------


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        if _trouble == "unreadable plan" or bytes(plan[:1]) != b"{":
            return None
        return _Engine(json.loads(bytes(plan)))


class _Engine:
    """Tensors are [[mode, name, dtype, shape], ...], -1 for the batch."""

    def __init__(self, plan):
        self.plan = plan
        tensors = plan.get("io", ())
        self.tensors = {name: (DataType[kind], shape) for _, name, kind, shape in tensors}
        self.modes = {name: TensorIOMode[mode] for mode, name, _, _ in tensors}
        self.names, self.count = list(self.tensors), 0

    num_io_tensors = property(lambda self: len(self.names))

    def create_engine_inspector(self):
        def inform(form):
            assert form == LayerInformationFormat.JSON
            return json.dumps({"Layers": self.plan["layers"], "Bindings": []})

        return types.SimpleNamespace(get_engine_information=inform)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return self.modes[name]

    def get_tensor_dtype(self, name):
        return self.tensors[name][0]

    def create_execution_context(self):
        return None if _trouble == "no memory" else _Context(self)


class _Context:
    """y<n> is x<n>, the int32 y_count how often the engine ran; other outputs stay zero."""

    def __init__(self, engine):
        self.engine, self.addresses, self._profiler = engine, {}, None
        self.shapes = {name: list(shape) for name, (_, shape) in engine.tensors.items()}

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, given):
        if given is not None:  # 8.6 logs an error and keeps the one it has
            self._profiler = given

    def get_tensor_shape(self, name):
        return tuple(self.shapes[name])

    def set_input_shape(self, name, shape):
        declared = self.engine.tensors[name][1]
        pairs = zip(declared, shape, strict=False)
        if len(declared) != len(shape) or any(a not in (-1, b) or b > 8 for a, b in pairs):
            return False
        self.shapes[name] = list(shape)
        if "y" + name[1:] in self.shapes:
            self.shapes["y" + name[1:]] = list(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        from cuda.bindings import driver

        if _trouble == "dies while running":
            os._exit(9)
        if stream != 42 or set(self.addresses) != set(self.engine.names):
            return False
        if self.profiler is not None:
            if driver.recordings:
                return False
            self.profiler.report_layer_time("copy", 0.5)
            self.profiler.report_layer_time("count", 0.25)
        if not (driver.recordings and _trouble == "records nothing"):
            driver.submit(lambda addresses=dict(self.addresses): self._copy(addresses))
        return _trouble != "fails while running" and not (
            driver.recordings and _trouble == "fails while recording"
        )

    def _copy(self, addresses):
        self.engine.count += 1
        for name, address in addresses.items():
            if name == "y_count":
                ctypes.c_int32.from_address(address).value = self.engine.count
            elif name.startswith("y") and "x" + name[1:] in addresses:
                kind, _ = self.engine.tensors[name]
                size = 2 if kind == DataType.BF16 else np.dtype(_NUMPY[kind]).itemsize
                count = int(np.prod(self.shapes[name]))
                ctypes.memmove(address, addresses["x" + name[1:]], size * count)
