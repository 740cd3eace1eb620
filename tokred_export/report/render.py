"""A :class:`Report` as ``report.html`` (one file, fetches nothing), ``report.md`` and plots.

    files = render(report, Path("out/reports"))

The pages show what the records hold; they are written again whenever the records are judged again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from tokred_export.disk import clear_disk_errors, write_atomic
from tokred_export.report import plots, views
from tokred_export.report.model import JudgedParity, JudgedSpeed, Report
from tokred_export.report.plots import Plot
from tokred_export.verify.records import ITSELF

_HERE = Path(__file__).parent
_OUTCOMES = {"PASS": "passed", "FAIL": "failed", "INCONCLUSIVE": "inconclusive"}


class ParityView(NamedTuple):
    """A judged parity record by component, each with the plot of its errors, if there is one."""

    judged: JudgedParity
    components: list[tuple[views.ComponentView, Plot | None]]


class SpeedView(NamedTuple):
    """A judged speed record and its plots."""

    judged: JudgedSpeed
    latencies: Plot
    gains: Plot


def render(report: Report, out_dir: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.svg``.

    Args:
        report: what to show.
        out_dir: made if need be; files of these names are replaced.

    Returns:
        The files written.

    Raises:
        EnvironmentUnable: the folder cannot be written, or the disk is full.
    """
    parity = [_parity_view(index, judged) for index, judged in enumerate(report.parity)]
    speed = [_speed_view(judged) for judged in report.speed]
    tokens = [_tokens_plot(report, index) for index in range(len(report.buckets))]
    values = {
        "scope": _scope(report),
        "report": report,
        "buckets": list(zip(report.buckets, tokens, strict=True)),
        "parity": parity,
        "speed": speed,
        "environments": _environments(report),
    }
    texts = {
        "report.html": _templates().get_template("template.html.j2").render(values),
        "report.md": _templates().get_template("template.md.j2").render(values),
    }
    for plot in _all_plots(tokens, parity, speed):
        texts[f"plots/{plot.name}.svg"] = plot.svg
    with clear_disk_errors(out_dir, writable=True):
        (out_dir / "plots").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out_dir / name, text.encode())
    return [out_dir / name for name in texts]


def _scope(report: Report) -> str:
    """What the headline's "every gate held" leaves out."""
    itself = [judged.record.backend.endswith(ITSELF) for judged in report.parity]
    return f" for {ITSELF}; no engine was run" if itself and all(itself) else ""


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,  # Markdown too: it passes HTML through
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "sci": views.sci, "limit": views.limit_text, "percent": views.percent,
        "ms": views.milliseconds, "times": views.times, "gain": "{:.2f}".format, "size": views.size,
        "margin": views.margin_text, "tenths": views.tenths, "flops": views.flops, "cell": _cell,
        "outcome": _OUTCOMES.__getitem__,
        "svg": lambda plot: Markup(plots.for_page(plot)),  # escapes its words itself
    }  # fmt: skip
    return environment


def _cell(text: object) -> Markup:
    """Text within a line or a table's cell of Markdown: no breaks, pipes or markup of any kind."""
    line = str(escape(" ".join(str(text).split())))
    return Markup("".join(f"&#{ord(c)};" if c in "\\`*_[]|~" else c for c in line))


def _parity_view(index: int, judged: JudgedParity) -> ParityView:
    components = []
    for view in views.component_views(judged):
        points = [
            plots.ErrorPoint(
                kind=views.KINDS.get(row.kind, row.kind),
                name=row.tensor.name,
                error=math.inf if row.tensor.nonfinite else row.tensor.rel_l2,
                noise=row.tensor.noise_rel_l2,
                tolerance=row.limit if row.limit > 0 else None,
            )
            for row in views.worst_by_name(view)
            if row.kind != "kept_positions"  # integers, equal or wrong
        ]
        name = f"errors-{index}-{_slug(view.component)}-{_slug(judged.record.backend)}"
        title = f"Errors of {view.component} on {judged.record.backend}"
        components.append((view, plots.plot_errors(name, title, points) if points else None))
    return ParityView(judged, components)


def _speed_view(judged: JudgedSpeed) -> SpeedView:
    record = judged.record
    of = f"{_slug(record.component)}-{_slug(record.backend)}-b{record.batch}"
    on = f"{record.component} on {record.backend}, batch {record.batch}"
    return SpeedView(
        judged,
        plots.plot_latencies(
            f"latency-{of}", f"Latency of {on}", record.baselines, record.baseline,
            (record.engine_dense, record.engine_reduced),
        ),
        plots.plot_gains(
            f"gains-{of}", f"Speed-up of {on}",
            record.engine_gain, record.reduction_gain, record.speedup,
        ),
    )  # fmt: skip


def _tokens_plot(report: Report, index: int) -> Plot:
    bucket = report.buckets[index]
    return plots.plot_tokens(
        f"tokens-{_slug(bucket.component)}",
        f"Tokens entering each layer of {bucket.component}",
        bucket.schedule.tokens_entering(report.model.n_layer),
    )


def _all_plots(
    tokens: list[Plot], parity: list[ParityView], speed: list[SpeedView]
) -> Iterator[Plot]:
    yield from tokens
    for view in parity:
        yield from (plot for _, plot in view.components if plot is not None)
    for view in speed:
        yield view.latencies
        yield view.gains


def _environments(report: Report) -> list[tuple[str, object]]:
    """Each environment that something was measured in, with what was measured there."""
    found: list[tuple[list[str], object]] = []
    parts = [(f"parity on {p.record.backend}", p.record.environment) for p in report.parity]
    parts += [
        (f"speed of {s.record.component} on {s.record.backend}", s.record.environment)
        for s in report.speed
    ]
    for what, environment in parts:
        for names, known in found:
            if known == environment:
                names.append(what)
                break
        else:
            found.append(([what], environment))
    return [(", ".join(dict.fromkeys(names)), known) for names, known in found]


def _slug(name: str) -> str:
    """Fit for a file name and an id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
