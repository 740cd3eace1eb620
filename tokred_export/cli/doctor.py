"""tokred-export doctor"""

from __future__ import annotations

import click

from tokred_export.cli import _console
from tokred_export.cli._options import shared_options


@click.command()
@shared_options
def command(as_json: bool, quiet: bool, verbose: bool) -> int:
    """Tell which backends this machine can build and run, and why not.

    Exits with 3 if it can build with none.
    """
    from tokred_export.doctor import diagnose

    _console.set_up(verbose, quiet)
    diagnosis = diagnose()
    if as_json:
        _console.print_json(diagnosis)
    else:
        yes = {True: "yes", False: "no"}
        _console.table(
            "Backends",
            ["backend", "version", "build", "run", "why"],
            [
                [name, a.version or "-", yes[a.can_build], yes[a.can_run], a.reason]
                for name, a in diagnosis.backends.items()
            ],
        )
        _console.table(
            "Machine", ["fact", "found"], [[k, v] for k, v in diagnosis.machine.items()]
        )
    return 0 if any(a.can_build for a in diagnosis.backends.values()) else 3
