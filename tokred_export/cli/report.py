"""tokred-export report"""

from __future__ import annotations

from pathlib import Path

import click

from tokred_export.cli import _console
from tokred_export.cli._options import shared_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@shared_options
def command(bundle: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Write a bundle's report.html and report.md again from its stored records."""
    from tokred_export import build as building

    _console.set_up(verbose, quiet)
    pages = building.write_report(bundle)
    if as_json:
        _console.print_json({"pages": [str(page) for page in pages]})
    else:
        for page in pages:
            _console.out.print(str(page), markup=False)
