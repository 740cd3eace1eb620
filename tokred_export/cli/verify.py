"""tokred-export verify"""

from __future__ import annotations

from pathlib import Path

import click

from tokred_export.cli import _console
from tokred_export.cli._options import shared_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="Where the checkpoint is now, if not where it was at the build.")
@click.option(
    "--thorough", is_flag=True, help="Every padded length at which something new happens."
)
@click.option("--bisect", is_flag=True, help="Name the first layer that diverges.")
@click.option(
    "--junit", type=click.Path(path_type=Path), help="Write the verdicts as JUnit XML here."
)
@click.option(
    "--stored", is_flag=True, help="Judge the stored record again instead of measuring anew."
)
@click.option(
    "--backend", type=click.Choice(["onnxruntime", "tensorrt"]),
    help="What runs the bundle  [default: tensorrt if it holds such an engine]",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="What onnxruntime runs on.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: all usable]")
@shared_options
def command(
    bundle: Path,
    model: str | None,
    thorough: bool,
    bisect: bool,
    junit: Path | None,
    stored: bool,
    backend: str | None,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Measure a bundle's engine against eager PyTorch, and judge it.

    The bundle's hashes are checked first; the record and the report pages are stored in it.
    """
    from tokred_export import build as building

    _console.set_up(verbose, quiet)
    result = building.verify(
        bundle, model=model, command=_console.command_line(), thorough=thorough, stored=stored,
        threads=threads, junit=junit, bisect=bisect, device=device, backend=backend,
        stage=_console.Progress(quiet),
    )
    if as_json:
        _console.print_json(result)
    else:
        for line in building.parity_summary(result):
            _console.out.print(line, markup=False)
    return result.exit_code
