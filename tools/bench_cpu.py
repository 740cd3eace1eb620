"""Speed of the CPU path on random weights: ONNX Runtime against the fastest dense eager.

    python tools/bench_cpu.py                      # 130m, 2048 tokens, 30 %, two threads
    python tools/bench_cpu.py --reduce 20% --json speed.json

All of it is measured interleaved in one run; see the record's "timed". Also prints the peak
memory of the build, which runs first in a process of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec
from random_checkpoint import SIZES, write_random

from tokred_export import pipeline, prove
from tokred_export.cache import Cache
from tokred_export.cli._console import Progress
from tokred_export.cli._options import SHARE, SIZE
from tokred_export.specs import BuildSpec, ReductionSpec


def build_memory(model: Path, target: float, length: int, cache: Path) -> float:
    """Peak resident memory in GB of a whole build without speed, in a process of its own."""
    arguments = [
        sys.executable, "-m", "tokred_export", "build", str(model), "-o", str(cache / "bundle"),
        "--reduce", str(target), "--seq-len", str(length), "--no-bench", "--force",
    ]
    # A cache of its own, so that nothing is found ready.
    environment = {**os.environ, "TOKRED_CACHE": str(cache / "stages")}
    subprocess.run(arguments, check=True, env=environment)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # from KB


@click.command()
@click.option("--size", type=click.Choice(sorted(SIZES)), default="130m", show_default=True)
@click.option("--reduce", "target", type=SHARE, default="30%", show_default=True)
@click.option("--method", default="utrc", show_default=True)
@click.option("--seq-len", "length", type=SIZE, default="2048", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--samples", default=10, show_default=True)
@click.option("--seconds", default=600.0, show_default=True)
@click.option("--chunk-size", default=64, show_default=True)
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    size: str, target: float, method: str, length: int, threads: int, samples: int,
    seconds: float, chunk_size: int, memory: bool, json_path: Path | None,
) -> None:
    """Measure, print, and optionally store the speed record."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, size)
        write_random(model, size)
        if memory:
            peak = build_memory(model, target, length, Path(folder))
            click.echo(f"build: peak memory {peak:.2f} GB")
        spec = BuildSpec(
            model=str(model), seq_lens=(length,), chunk_size=chunk_size,
            reduction=ReductionSpec(method=method, target=target),
        )
        cache = Cache(root=Path(folder, "stages"))
        line = pipeline.start_line(spec, cache, Progress(False))
        with pipeline.assembling(line, Path(folder, "measured"), "") as bundle:
            command = (
                f"python tools/bench_cpu.py --size {size} --reduce {target:.0%} --method {method} "
                f"--seq-len {length} --threads {threads} --samples {samples} --seconds {seconds:g} "
                f"--chunk-size {chunk_size}"
            )
            (record,) = prove.measure_bundle_speed(
                line, bundle, command, threads, samples, seconds
            )
    for latency in (*record.baselines, record.engine_dense, record.engine_reduced):
        click.echo(
            f"{latency.name:<24} {latency.median_ms:8.0f} ms  p95 {latency.p95_ms:8.0f}  "
            f"{len(latency.samples_ms)} samples, drift {latency.drift:.1%}"
        )
    click.echo(
        f"{size}, {length} tokens, {record.schedule.length_out} out: "
        f"{record.speedup:.2f}x of {record.baseline} = engine {record.engine_gain:.2f}x "
        f"* reduction {record.reduction_gain:.2f}x"
        + (", inconclusive" if record.inconclusive else "")
    )
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))


if __name__ == "__main__":
    main()
