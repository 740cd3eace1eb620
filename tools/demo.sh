#!/usr/bin/env bash
# Usage: tools/demo.sh BIN OUT   Builds the model that ships with the package into OUT.
set -euo pipefail
bin=$1 out=$2
backends=(--backend onnxruntime)
# The RTX plan needs its wheel, but no GPU.
if "$bin/python" -c 'import tensorrt_rtx' 2>/dev/null; then
    backends+=(--backend tensorrt-rtx)
else
    echo "demo: TensorRT-RTX is not installed here, so its plan is not built" >&2
fi
exec "$bin/tokred-export" build -o "$out" --force "${backends[@]}"
