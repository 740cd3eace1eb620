"""The command line: parses and prints, nothing more. One file a verb.

Exit codes: 0 all gates passed, 1 a gate failed, 2 usage, 3 the environment cannot, 4 export or
build failed, 5 inconclusive, 70 internal error.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from tokred_export import __version__
from tokred_export.errors import TokredError

# verb -> one line of help; the module of the same name is imported when the verb is used, so
# that `--help` and `inspect` need no torch.
VERBS = {
    "build": "Turn a checkpoint into a proven bundle.",
    "plan": "Show what a reduction target means, without touching weights.",
    "verify": "Measure and judge a bundle's parity with eager PyTorch.",
    "bench": "Measure a bundle's speed against eager PyTorch.",
    "report": "Write a bundle's report pages again from its stored records.",
    "inspect": "Show what is in a bundle, and check its hashes.",
    "doctor": "Tell which backends this machine can build and run, and why not.",
}


class _Verbs(click.Group):
    """Loads a verb's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"tokred_export.cli.{name}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "TOKRED"},
    epilog=(
        "Exit codes: 0 all gates passed, 1 a gate failed, 2 usage, 3 the environment cannot, "
        "4 export or build failed, 5 inconclusive, 70 internal error."
    ),
)
@click.version_option(__version__, prog_name="tokred-export")
def cli() -> None:
    """Mamba-2 with token reduction: checkpoint to ONNX and TensorRT, proven right and faster."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing escapes but the code."""
    try:
        result = cli.main(args=arguments, prog_name="tokred-export", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return _say("interrupted", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TokredError as error:
        return _say(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except MemoryError:
        return _say(
            "error: out of memory: use a machine with more, a smaller model, a shorter --seq-len, "
            "or --no-verify, which holds no eager model beside the engine", 3,
        )
    # Rich and Click make of a broken pipe an exit with 1, which would read as "a gate failed".
    except (BrokenPipeError, SystemExit):
        # What is still in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as the shell reports a reader that went away
    except Exception:  # noqa: BLE001  Python's own exit code 1 would read as "a gate failed"
        traceback.print_exc()
        return _say("internal error: please report it with the lines above", 70)


def _say(message: str, code: int) -> int:
    click.echo(message, err=True)
    return code


def main() -> None:
    """Entry point of the ``tokred-export`` script."""
    sys.exit(run())
