"""tokred-export build"""

from __future__ import annotations

from pathlib import Path

import click

from tokred_export.cli import _console
from tokred_export.cli._options import SIZE, reduction_options, shared_options
from tokred_export.specs import BuildSpec, ReductionSpec


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--seq-len", "seq_lens", multiple=True, type=SIZE, default=("2048",), show_default=True,
    help="Prompt length of a graph, such as 2048 or 8k; several make several buckets.",
)
@reduction_options
@click.option(
    "--max-batch", default=1, show_default=True, type=click.IntRange(1),
    help="Largest batch; above 1 the batch is dynamic, and TensorRT engines are tuned for the "
    "largest.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of weights and activations  [default: float32 for onnxruntime, else float16]",
)
@click.option(
    "--logits", type=click.Choice(["last", "all"]), default="last", show_default=True,
    help="Logits of the last token, or of all that are kept.",
)
@click.option(
    "--backend", "backends", multiple=True, default=("onnxruntime",), show_default=True,
    type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]), help="Engines to build.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="What onnxruntime runs on.",
)
@click.option(
    "--chunk-size", default=64, show_default=True, type=click.IntRange(1),
    help="Tokens a chunk of the exported scan.",
)
@click.option(
    "--opt-level", type=click.IntRange(0, 5),
    help="TensorRT's builder optimisation level; lower builds faster  [default: TensorRT's]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: all usable]")
@click.option("--no-verify", is_flag=True, help="Do not measure parity, nor speed.")
@click.option("--no-bench", is_flag=True, help="Do not measure speed.")
@click.option(
    "--bench-seconds", default=90.0, show_default=True, type=click.FloatRange(0, min_open=True),
    help="Time for measuring the speed of each graph.",
)
@click.option(
    "--min-speedup", type=click.FloatRange(0, min_open=True),
    help="Fail below this speed-up over the fastest dense eager.",
)
@shared_options
def command(
    model: str | None,
    out: Path,
    force: bool,
    revision: str | None,
    seq_lens: tuple[int, ...],
    max_batch: int,
    dtype: str | None,
    logits: str,
    backends: tuple[str, ...],
    device: str,
    chunk_size: int,
    opt_level: int | None,
    threads: int | None,
    no_verify: bool,
    no_bench: bool,
    bench_seconds: float,
    min_speedup: float | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **reduction: object,
) -> int:
    """Turn a Mamba-2 checkpoint into a bundle of engines, proven right and measured.

    MODEL is a local folder or a hub id (state-spaces or transformers layout); left out, the
    small trained model that ships with the package.
    """
    from tokred_export import build as building

    _console.set_up(verbose, quiet)
    spec = BuildSpec(
        model=model, revision=revision, seq_lens=seq_lens, max_batch=max_batch, dtype=dtype,
        logits=logits, backends=backends, device=device, chunk_size=chunk_size,
        opt_level=opt_level, reduction=ReductionSpec(**reduction),
    )
    result = building.build(
        spec, out, command=_console.command_line(), force=force, threads=threads,
        parity=not no_verify, speed=not (no_verify or no_bench), bench_seconds=bench_seconds,
        min_speedup=min_speedup, stage=_console.Progress(quiet),
    )
    if as_json:
        _console.print_json(result)
    else:
        for line in building.summary(result):
            _console.out.print(line, markup=False)
    return result.exit_code
