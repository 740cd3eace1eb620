#!/usr/bin/env bash
# Usage: tools/gpu/pack_machine.sh OUT PYTHON310 HEADERS EXTENSION
#
# Makes what setup_machine.sh takes, on a machine with network: OUT/carried and OUT/parts.
#   PYTHON310   prefix of a CPython 3.10 with pip, such as pyenv's
#   HEADERS     folder of the NvInfer*.h of TensorRT 8.6.0
#   EXTENSION   causal_conv1d_cuda*.so, compiled for the GPU machine's own Python and torch
# OTHER_PYTHON (3.12 if not set) is the version of that other Python. PYTHON (python3 if not set) is
# one with pip, torch, setuptools and packaging, which mamba-ssm's set-up imports.
set -euo pipefail
out=$1 python310=$(realpath "$2") headers=$(realpath "$3") extension=$(realpath "$4")
other=${OTHER_PYTHON:-3.12}
pip="${PYTHON:-python3} -m pip --disable-pip-version-check -q"
wheels="--no-deps --only-binary=:all: --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
mkdir -p "$out/carried" "$out/parts"
carried=$(realpath "$out/carried") parts=$(realpath "$out/parts")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# CPython 3.10 without what only development needs, and what TensorRT's process imports.
cp -r "$python310" "$work/python"
library=$work/python/lib/python3.10
rm -rf "$work/python"/{share,include} "$library"/{test,tkinter,idlelib,ensurepip,lib2to3}
rm -rf "$library/site-packages"
"$python310/bin/python3.10" -m pip install --disable-pip-version-check -q \
    --target "$library/site-packages" numpy==1.26.4 msgspec "cuda-bindings==13.0.*"
find "$work/python" \( -name '*.a' -o -name '*.pyc' \) -delete
find "$work/python" -type f -name '*.so*' -exec strip --strip-unneeded {} +
XZ_OPT=-T0 tar cJf "$carried/py310.tar.xz" -C "$work" python

# mamba-ssm's and causal-conv1d's Python files; Mamba-2 needs none of mamba-ssm's own extension.
mkdir -p "$carried/site312"
MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE $pip download --no-deps \
    --no-binary :all: --no-build-isolation -d "$work/source" mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
for name in mamba_ssm causal_conv1d; do
    tar xzf "$work/source/$name"-*.tar.gz -C "$work"
    cp -r "$work/$name"-*/"$name" "$carried/site312/"
done
$pip download $wheels --python-version "$other" -d "$work/other" msgspec
python3 -m zipfile -e "$work"/other/msgspec-*.whl "$carried/site312"
: >"$carried/site312/selective_scan_cuda.py"
cp "$extension" "$carried/site312/"

mkdir -p "$carried/trt-include"
cp "$headers"/NvInfer*.h "$carried/trt-include/"

$pip download $wheels --python-version 3.10 -d "$work/tensorrt" tensorrt==8.6.0
wheel=$(basename "$work"/tensorrt/tensorrt-8.6.0-*.whl)
split -b 46M -d "$work/tensorrt/$wheel" "$parts/$wheel.part"
du -sh "$carried" "$parts"
