#!/usr/bin/env bash
# Usage: tools/gpu/run_all.sh STEP OUT WORK   One step of the measurements on a GPU machine, after
# sourcing the env.sh that setup_machine.sh wrote. Each fits ten minutes on an H100; results and
# what speeds up the next step's build (timing caches) go to OUT, and from OUT they are read.
# TOKRED_SECONDS bounds the timing of one model and batch, 60 if not set.
#   kernels   kernel tests, the PTX through the driver, a fast look at every kernel's time
#   products  every tactic of a layer's two products, beside cuBLAS, and of one that divides rows
#   sanitize  the same tests under compute-sanitizer's memcheck
#   small     130m, batch 1 and 8, dense and 30 %; the demo model's choices on 500 prompts
#   middle    780m, batch 1 and 8, kept counts multiples of 64
#   large1    2.7b, batch 1, the same
#   large8    2.7b, batch 8, the same
#   memory    130m and 2.7b, batch 8, at 10 and 20 %
#   ort       ONNX Runtime's CUDA provider on the demo model and on 130m; needs onnxruntime-gpu
set -euo pipefail
step=$1 out=$2 work=$3
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out" "$work"
cache=$work/timing.cache
for file in "$out"/timing.*; do
    if [ -e "$file" ]; then cp -n "$file" "$work/"; fi
done
bench() { "$python" tools/gpu/bench_engines.py --timing-cache "$cache" --work "$work" --out "$out/speed.jsonl" --seconds "${TOKRED_SECONDS:-60}" "$@"; }
# A case outside its gate fails the step, but neither what comes after it nor what the next needs.
trap 'exit 143' TERM
trap 'cp "$work"/timing.* "$out/" 2>/dev/null || true' EXIT
case $step in
kernels)
    "$python" -m pytest -q -p no:cacheprovider tests/plugins -m "not slow" -k "(kernel or aot_launch or cuda_dispatch) and not interpreter" | tee "$out/tests.log"
    "$python" tools/gpu/bench_kernels.py --models 130m 780m 2.7b --out "$out/kernels.json" --lines "$out/kernels.jsonl"
    ;;
products)
    "$python" tools/gpu/bench_kernels.py --models 130m 780m 2.7b --dtype fp16 --tactics --ops first_product second_product second_product_scaled --out "$out/products.json" --lines "$out/products.jsonl"
    ;;
sanitize)
    compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider tests/plugins -k "kernel and not true_size and not interpreter" | tee "$out/sanitize.log"
    ;;
small)
    failed=0
    bench --models 130m --batches 1 8 || failed=$?
    "$python" tools/gpu/demo_agreement.py --timing-cache "$cache" --out "$out/demo.json" --work "$work" || failed=$?
    exit "$failed"
    ;;
middle) bench --models 780m --batches 1 8 --round-to 64 ;;
large1) bench --models 2.7b --batches 1 --round-to 64 ;;
large8) bench --models 2.7b --batches 8 --round-to 64 --samples 15 ;;
memory) bench --models 130m 2.7b --batches 8 --shares 0.1 0.2 --samples 10 ;;
ort)
    export PYTHONPATH=${TOKRED_ORT_GPU:-}:${PYTHONPATH:-} # before the CPU build of the machine
    "$python" -m tokred_export build -o "$out/demo-cuda" --device cuda --reduce 30% --no-bench --force
    "$python" tools/random_checkpoint.py 130m "$work/130m-float32" --device cuda
    "$python" -m tokred_export build "$work/130m-float32" -o "$work/130m-cuda" --device cuda --reduce 30% --no-bench --force
    cp "$work/130m-cuda/reports/parity.json" "$out/ort-130m-parity.json"
    ;;
*)
    echo "unknown step $step; the head of this file lists them" >&2
    exit 2
    ;;
esac
