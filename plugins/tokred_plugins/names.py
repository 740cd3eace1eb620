"""What our nodes are called in an ONNX file. Imports nothing: a build of engines needs no onnx."""

from __future__ import annotations

DOMAIN = "tokred"
VERSION = 1
# What TensorRT's parser looks for on a node, beside the op's own attributes.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
