"""Engine descriptions on disk, and what is said about this machine."""

import msgspec
import pytest

from tokred_export.backends import common
from tokred_export.backends.common import (
    EngineInfo,
    driver_version,
    engine_folder,
    list_gpus,
    processor_name,
    read_engines,
    write_engine,
)
from tokred_export.errors import BundleError

INFO = EngineInfo(
    backend="onnxruntime", version="1.0", component="prefill-4", file="prefill-4.onnx",
    files=("prefill-4.onnx",), target="cpu", machine="x86_64", processor="a CPU",
    onnx_files={"prefill-4.onnx": "00"}, seconds=1.5, bytes=10, layers=3, layers_from="graph",
    options={"threads": None}, can_run_here=True, reason="it ran",
)  # fmt: skip


def test_engines_of_one_folder(tmp_path):
    """Components gather in one file; a component built again replaces its old entry."""
    assert read_engines(tmp_path) == {}
    other = msgspec.structs.replace(INFO, component="decode")
    newer = msgspec.structs.replace(INFO, seconds=2.5)
    for info in (INFO, other, newer):
        write_engine(tmp_path, info)
    assert read_engines(tmp_path) == {"prefill-4": newer, "decode": other}
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]


@pytest.mark.parametrize("text", ["{", '{"prefill-4": {"backend": 3}}', '{"a": {"surprise": 1}}'])
def test_damaged_description(tmp_path, text):
    """A description that cannot be read is named, with the way out."""
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BundleError, match=r"engine\.json is damaged.*build the engine again"):
        read_engines(tmp_path)


def test_folder_names():
    """The folder says backend, target and version."""
    assert engine_folder("tensorrt-rtx", "sm86", "1.7") == "tensorrt-rtx-sm86-1.7"


def test_processor_has_a_name():
    """Some name is known on every machine."""
    assert processor_name().strip()


class FakeCuda:
    """The driver's five functions for two devices, 8.6 and 12.0."""

    capabilities = ((8, 6), (12, 0))

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, text, size, device):
        text.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value][attribute - 75]
        return 0


def test_gpus_as_the_driver_tells(monkeypatch):
    """Names and capabilities come from the driver."""
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: FakeCuda())
    assert list_gpus() == [("GPU 0", 86), ("GPU 1", 120)]
    assert driver_version() == 12040


def test_no_gpus(monkeypatch):
    """A driver that finds nothing and a machine without one both mean none."""
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: FakeCuda(status=100))
    assert list_gpus() == []

    def refuse(name):
        raise OSError("no such library")

    monkeypatch.setattr(common.ctypes, "CDLL", refuse)
    assert list_gpus() == [] and driver_version() is None
