#!/usr/bin/env bash
# Usage: tools/gpu/setup_machine.sh CARRIED PARTS HOME
#
# Sets up a GPU machine without network from carried files, below HOME:
#   CARRIED/py310.tar.xz         a CPython 3.10 with numpy, msgspec and cuda-bindings (TensorRT 8.6.0
#                                has no wheel for anything newer)
#   CARRIED/site312/             packages for the machine's own Python: msgspec, mamba_ssm,
#                                causal_conv1d with its extension
#   CARRIED/trt-include/         TensorRT's headers, for the launcher plugin
#   PARTS/                       the TensorRT wheel, in pieces; onnxruntime-gpu's too, if wanted
# and writes HOME/env.sh, to be sourced before anything else.
set -euo pipefail
carried=$(realpath "$1") parts=$2 home=$3
project=$(realpath "$(dirname "$0")/../..")
mkdir -p "$home"
if [ ! -d "$home/python" ]; then tar xJf "$carried/py310.tar.xz" -C "$home"; fi
site=$home/python/lib/python3.10/site-packages
if [ ! -d "$site/tensorrt" ]; then
    cat "$parts"/tensorrt-8.6.0-*.part* >"$home/tensorrt.whl"
    python3 -m zipfile -e "$home/tensorrt.whl" "$site"
    rm "$home/tensorrt.whl"
    # NVIDIA's own plugins want cuBLAS and cuDNN; nothing here uses them.
    printf 'int initLibNvInferPlugins(void* l, const char* n) { return 1; }\nint getPluginVersion(void) { return 8600; }\n' >"$home/stub.c"
    gcc -shared -fPIC -Wl,-soname,libnvinfer_plugin.so.8 -o "$site/tensorrt/libnvinfer_plugin.so.8" "$home/stub.c"
fi
cat >"$home/python3.10" <<END
#!/usr/bin/env bash
PYTHONHOME=$home/python LD_LIBRARY_PATH=$home/python/lib:$site/tensorrt\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH} exec $home/python/bin/python3.10 "\$@"
END
chmod +x "$home/python3.10"
cmake -S "$project/plugins/launcher" -B "$home/launcher" -DCMAKE_BUILD_TYPE=Release \
    -DTENSORRT_INCLUDE_DIR="$carried/trt-include" >"$home/cmake.log"
cmake --build "$home/launcher" >>"$home/cmake.log"
if ls "$parts"/onnxruntime_gpu-*.part* >/dev/null 2>&1 && [ ! -d "$home/ort" ]; then
    cat "$parts"/onnxruntime_gpu-*.part* >"$home/ort.whl"
    python3 -m zipfile -e "$home/ort.whl" "$home/ort"
    rm "$home/ort.whl"
fi
cat >"$home/env.sh" <<END
export TOKRED_TENSORRT_PYTHON=$home/python3.10 TOKRED_LAUNCHER=$home/launcher/libtokred_launcher.so
export TOKRED_ORT_GPU=$home/ort TOKRED_CACHE=$home/cache PYTHONPATH=$project:$project/plugins:$carried/site312
END
echo "set up $home"
