"""The command line: parses and prints, nothing more. One file a verb.

Exit codes: 0 all gates passed, 1 a gate failed, 2 usage, 3 the environment cannot, 4 export or
build failed, 5 inconclusive, 70 internal error.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence

import click

from tokred_export import __version__
from tokred_export.errors import TokredError, ran_out_of_memory

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

OUT_OF_MEMORY = (
    "out of memory: use a machine with more, a smaller model, a shorter --seq-len, or --no-verify, "
    "which holds no eager model beside the engine"
)


class _Verbs(click.Group):
    """Loads a verb's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"tokred_export.cli.{name}")
        for option in module.command.params:
            if isinstance(option, click.Option) and option.envvar is None:
                # Named for the flag: Click would name it for our name of its value.
                flag = next(text for text in option.opts if text.startswith("--"))
                option.envvar = f"TOKRED_{name}_{flag[2:]}".replace("-", "_").upper()
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
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
        return _as_json(arguments, error.format_message(), error.exit_code)
    except TokredError as error:
        return _as_json(arguments, str(error), _say(f"error: {error}", error.exit_code))
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except MemoryError:
        return _as_json(arguments, OUT_OF_MEMORY, _say(f"error: {OUT_OF_MEMORY}", 3))
    # Rich and Click make of a broken pipe an exit with 1, which would read as "a gate failed".
    except (BrokenPipeError, SystemExit):
        _forget_output()
        return 141  # as the shell reports a reader that went away
    except Exception as error:  # noqa: BLE001  Python's own exit code 1 would read as "a gate failed"
        if ran_out_of_memory(error):  # PyTorch has no class of its own for it on a CPU
            return _as_json(arguments, OUT_OF_MEMORY, _say(f"error: {OUT_OF_MEMORY}", 3))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _forget_output()
            return _say(f"error: the result cannot be written ({error.strerror})", 3)
        traceback.print_exc()
        said = "internal error: please report it with the lines above"
        return _as_json(arguments, f"internal error: {error}", _say(said, 70))


def _forget_output() -> None:
    """What is still in the buffer would raise once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_json(arguments: Sequence[str] | None, error: str, code: int) -> int:
    """With ``--json``, the one object that stdout gets where a command came to no result."""
    if "--json" in (sys.argv[1:] if arguments is None else arguments):
        click.echo(json.dumps({"error": error, "exit_code": code}, indent=2))
    return code


def _say(message: str, code: int) -> int:
    click.echo(message, err=True)
    return code


def main() -> None:
    """Entry point of the ``tokred-export`` script."""
    sys.exit(run())
