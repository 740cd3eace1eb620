"""What the verbs' flags have in common: types, shared flags, and the --config file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import click

from tokred_export.errors import InvalidRequest
from tokred_export.units import parse_share, parse_size


class _Parsed(click.ParamType):
    """A flag whose text one of our own parsers reads; its sentence becomes Click's."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name, self._parse = name, parse

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidRequest as error:
            self.fail(str(error), param, ctx)


SHARE = _Parsed("share", parse_share)
SIZE = _Parsed("size", parse_size)


def _sites(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidRequest(
            f"{text!r} is not a list of layers; write 0-based indices such as 5,7,9"
        ) from error


SITES = _Parsed("layers", _sites)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of this verb's flags: a flag or variable still wins."""
    if path is None:
        return
    import tomllib  # Python 3.11; the torch-free verbs run on 3.10

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read as TOML: {error}", ctx, param) from error
    known = {
        flag.removeprefix("--"): option
        for option in ctx.command.params
        for flag in option.opts
        if flag.startswith("--") and flag != "--config"
    }
    known |= {p.name: p for p in ctx.command.params if isinstance(p, click.Argument)}
    defaults = {}
    for key, value in values.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise click.BadParameter(f"{path} has an unknown key {key!r}{hint}", ctx, param)
        defaults[option.name] = _as_typed(option, value, path, key)
    if "target" in defaults:  # what flags that contradict each other are told
        if "keep_ratio" in defaults:
            raise click.UsageError(
                f"{path}: keep-ratio takes the place of reduce: give one of the two", ctx
            )
        if defaults.get("method") == "none":
            raise click.UsageError(f"{path}: method none removes no token: leave out reduce", ctx)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _as_typed(option: click.Parameter, value: object, path: Path, key: str) -> object:
    """A value of the file as one would type it, so that the flag's own parser judges it."""
    is_flag = getattr(option, "is_flag", False)
    items = value if isinstance(value, list) else [value]
    several = option.multiple if isinstance(option, click.Option) else False
    if is_flag and isinstance(value, bool):
        return value
    plain = all(type(item) in (str, int, float) for item in items)
    if is_flag or not plain or (len(items) != 1 and not several and option.type is not SITES):
        expected = "true or false" if is_flag else "a list" if several else "one text or number"
        raise click.BadParameter(f"{path} has {key} = {value!r}, expected {expected}", param=option)
    texts = [str(item) for item in items]
    return texts if several else ",".join(texts)


def shared_options(command: Callable) -> Callable:
    """--config, --json, --quiet and --verbose, as every verb has them."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Log what happens on the way."),
        click.option("-q", "--quiet", is_flag=True, help="Print results only, no progress."),
        click.option(
            "--json", "as_json", is_flag=True,
            help="Print one JSON object on stdout, everything else on stderr.",
        ),
        click.option(
            "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True, expose_value=False, callback=_read_config,
            help="TOML file with the same keys as the flags; flags win.",
        ),
    ):
        command = option(command)
    return command


def _refuse_contradictions(
    ctx: click.Context, param: click.Parameter, value: object
) -> object:
    """--reduce beside what makes it mean nothing, in whatever order they were given."""
    typed = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) in typed

    if given("target") and given(param.name):
        if param.name == "method" and value == "none":
            raise click.UsageError("--method none removes no token: leave out --reduce", ctx)
        if param.name == "keep_ratio":
            raise click.UsageError(
                "--keep-ratio takes the place of --reduce: give one of the two", ctx
            )
    return value


def reduction_options(command: Callable) -> Callable:
    """The flags that make a ReductionSpec."""
    for option in (
        click.option(
            "--round-to", default=1, show_default=True, type=click.IntRange(1),
            help="Round kept counts to a multiple; fewer distinct shapes build faster.",
        ),
        click.option(
            "--protect-tail", default=1, show_default=True, type=click.IntRange(0),
            help="Last tokens that are never removed.",
        ),
        click.option(
            "--prune-permille", default=500, show_default=True, type=click.IntRange(0, 1000),
            help="Share of links that prune instead of merging, in thousandths (utrc's q).",
        ),
        click.option("--sites", type=SITES, help="Layers after which to reduce, such as 5,7,9."),
        click.option(
            "--keep-ratio", type=click.FloatRange(0, 1, min_open=True),
            callback=_refuse_contradictions,
            help="Keep this share at every site, instead of solving for --reduce.",
        ),
        click.option(
            "--flops", type=click.Choice(["full", "paper"]), default="full", show_default=True,
            help="How --reduce counts: all FLOPs, or UTRC's mean share of tokens.",
        ),
        click.option(
            "--method", default="utrc", show_default=True,
            type=click.Choice(["utrc", "utrc-code", "evit", "pumer", "none"]),
            callback=_refuse_contradictions,
            help="How tokens are chosen and what becomes of them.",
        ),
        click.option(
            "--reduce", "target", type=SHARE, default="20%", show_default=True, is_eager=True,
            help="Share of prefill FLOPs to save.",
        ),
    ):
        command = option(command)
    return command
