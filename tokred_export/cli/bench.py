"""tokred-export bench"""

from __future__ import annotations

from pathlib import Path

import click

from tokred_export.cli import _console
from tokred_export.cli._options import shared_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="Where the checkpoint is now, if not where it was at the build.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--samples", default=20, show_default=True, type=click.IntRange(3))
@click.option(
    "--seconds", default=120.0, show_default=True, type=click.FloatRange(0, min_open=True),
    help="Time for each graph.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: all usable]")
@click.option(
    "--min-speedup", type=click.FloatRange(0, min_open=True),
    help="Fail below this speed-up over the fastest dense eager.",
)
@shared_options
def command(
    bundle: Path,
    model: str | None,
    batch: int,
    samples: int,
    seconds: float,
    threads: int | None,
    min_speedup: float | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Measure a bundle's speed against the fastest dense eager PyTorch on this machine.

    Refused while the bundle's parity has not been measured, or failed.
    """
    from tokred_export import build as building

    _console.set_up(verbose, quiet)
    result = building.bench(
        bundle, model=model, command=_console.command_line(), batch=batch, samples=samples,
        max_seconds=seconds, threads=threads, min_speedup=min_speedup,
        stage=_console.Progress(quiet),
    )
    if as_json:
        _console.print_json(result)
    else:
        for line in building.speed_summary(result):
            _console.out.print(line, markup=False)
    return result.exit_code
