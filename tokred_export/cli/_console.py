"""Printing: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator

import click
import msgspec
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

_ELSEWHERE = (click.core.ParameterSource.ENVIRONMENT, click.core.ParameterSource.DEFAULT_MAP)
# Rich itself honours NO_COLOR and drops colours where the stream is no terminal.
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
# A terminal folds a wide table; in a pipe or a file names must not be cut off.
_unfolded = Console(width=1000, highlight=False)


def set_up(verbose: bool, quiet: bool) -> None:
    """Route logging and warnings to stderr, at the level asked for."""
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tokred_export").setLevel(level)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not quiet:
            err.print(f"warning: {message}", markup=False)

    warnings.showwarning = show
    if not verbose:
        for category in (FutureWarning, DeprecationWarning):  # other libraries', about themselves
            warnings.simplefilter("ignore", category)


class Progress:
    """One line a stage on stderr: live on a terminal, plain where it is none."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Report the stage ``name`` and how long it took."""
        if self._quiet:
            yield
            return
        begun = time.perf_counter()
        spinner = err.status(f"{name} ...") if err.is_terminal else contextlib.nullcontext()
        with spinner:
            yield
        err.print(f"  {name:<44} {time.perf_counter() - begun:7.1f} s", markup=False)


def table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """A table on stdout; every column after the first is right-aligned."""
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    (out if out.is_terminal else _unfolded).print(shown)


def print_json(value: object) -> None:
    """The one JSON object of ``--json``."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    sys.stdout.flush()  # a reader that went away is noticed here, not when Python ends


def command_line() -> str:
    """What was typed, for records: the program by its name, whatever started it.

    What came from variables and from a --config file is written out as flags: a record is read
    where neither is.
    """
    context = click.get_current_context(silent=True)
    typed, flags, places = sys.argv[1:], [], []
    if context is None:
        return shlex.join(["tokred-export", *typed])
    for option in context.command.params:
        source = context.get_parameter_source(option.name)
        if source not in _ELSEWHERE:
            continue
        if isinstance(option, click.Argument):
            places.append(str(context.lookup_default(option.name)))
            continue
        if option.name == "config":  # its values are here one by one
            continue
        flag = next(text for text in option.opts if text.startswith("--"))
        if source is click.core.ParameterSource.ENVIRONMENT:
            value = option.value_from_envvar(context)
        else:
            value = context.lookup_default(option.name)
        if option.is_flag:
            flags += [flag] if context.params.get(option.name) else []
        else:
            items = value if isinstance(value, list | tuple) else [value]
            flags += [word for item in items for word in (flag, str(item))]
    # Behind the verb, before a "--" that somebody may have typed.
    words = [*typed[:1], *flags, *_without_config(typed[1:]), *places]
    return shlex.join(["tokred-export", *words])


def _without_config(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--config" and not word.startswith("--config="):
            kept.append(word)
        skip = word == "--config" and not skip
    return kept
