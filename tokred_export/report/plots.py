"""The report's plots as SVG text: drawn without a display, in colours that a page can replace.

Every function returns a :class:`Plot`. Its ``svg`` stands alone on white; :func:`for_page` makes
it fit into a page: page colours, no ids shared with another plot, a title for screen readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokred_export.verify.records import Latency

# Stand-ins that are replaced by CSS variables of the page, see :func:`for_page`. The hues differ
# in lightness too, and no plot tells things apart by colour alone.
INK, FAINT, BASE, DENSE, REDUCED, LIMIT = (
    "#1b1f24", "#8a929b", "#747c86", "#2767b0", "#0d7d68", "#b3400e",
)  # fmt: skip
_VARIABLES = {
    INK: "--ink", FAINT: "--faint", BASE: "--base", DENSE: "--dense", REDUCED: "--reduced",
    LIMIT: "--limit",
}  # fmt: skip

WIDTH = 4.9  # inches; narrow, so that the text stays readable when a phone scales it to fit

TIMES = "\N{MULTIPLICATION SIGN}"

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: readable by machines, in the page's font
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "figure.facecolor": "white",
    "legend.frameon": False, "grid.color": FAINT, "grid.alpha": 0.35,
}  # fmt: skip


class Plot(NamedTuple):
    """One figure: ``name`` for files and ids, ``title`` and ``description`` in words."""

    name: str
    title: str
    description: str
    svg: str


class ErrorPoint(NamedTuple):
    """One tensor's error beside its noise floor and its tolerance, all relative L2."""

    kind: str  # "logits", "conv_state", "ssm_state"
    name: str
    error: float
    noise: float
    tolerance: float | None


def plot_tokens(name: str, title: str, tokens: Sequence[int]) -> Plot:
    """Tokens that enter each layer, as steps.

    Args:
        name, title: see :class:`Plot`.
        tokens: one count a layer.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=2.5)
        layers = range(len(tokens))
        axes.step(layers, tokens, where="mid", color=REDUCED, linewidth=2)
        axes.fill_between(layers, tokens, step="mid", color=REDUCED, alpha=0.15, linewidth=0)
        axes.axhline(tokens[0], color=BASE, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="layer", ylabel="tokens", ylim=(0, tokens[0] * 1.18))
        axes.annotate(
            f"dense: {tokens[0]} everywhere", (len(tokens) - 1, tokens[0]),
            xytext=(0, 4), textcoords="offset points", ha="right", color=INK,
        )  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        description = (
            f"{tokens[0]} tokens enter the first layer and {tokens[-1]} the last of {len(tokens)}."
        )
        return Plot(name, title, description, _svg(figure, name))


def plot_errors(name: str, title: str, points: Sequence[ErrorPoint]) -> Plot:
    """Each tensor's error, its noise floor and its tolerance, on a log scale.

    Args:
        name, title: see :class:`Plot`.
        points: tensors of one kind side by side; values of 0 are drawn at the lower edge.
    """
    values = [v for p in points for v in (p.error, p.noise, p.tolerance) if v]
    finite = [v for v in values if v < float("inf")] or [1e-7]
    low, high = min(finite) / 4, max(finite) * 4

    def clip(value: float) -> float:  # NaN goes to the upper edge, with what is infinite
        return min(max(value, low * 1.3), high / 1.3) if value == value else high / 1.3

    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=3.1)
        where = range(len(points))
        limits = [(x, clip(p.tolerance)) for x, p in zip(where, points, strict=True) if p.tolerance]
        axes.scatter(
            *zip(*limits, strict=True) if limits else ([], []), marker="_", s=60, linewidths=1.8,
            color=LIMIT, label="tolerance",
        )  # fmt: skip
        axes.scatter(
            where, [clip(p.noise) for p in points], marker="o", s=16, facecolors="none",
            edgecolors=BASE, linewidths=1, label="noise floor",
        )  # fmt: skip
        axes.scatter(
            where, [clip(p.error) for p in points], marker="D", s=11, color=DENSE, label="error"
        )
        axes.set(yscale="log", ylim=(low, high), ylabel="relative L2", xlim=(-1, len(points)))
        axes.grid(axis="y")
        _mark_kinds(axes, points)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.3)
        over = [p.name for p in points if p.error == float("inf") or (
            p.tolerance is not None and not p.error <= p.tolerance
        )]
        description = (
            f"{len(points)} tensors; above the tolerance: {', '.join(over) if over else 'none'}."
        )
        return Plot(name, title, description, _svg(figure, name))


def plot_latencies(
    name: str, title: str, baselines: Sequence[Latency], fastest: str, engines: Sequence[Latency]
) -> Plot:
    """Medians as bars and every sample as a dot.

    Args:
        name, title: see :class:`Plot`.
        baselines: dense eager candidates, ``fastest`` the name of the quickest.
        engines: the dense and the reduced engine.
    """
    rows = [*((b, BASE) for b in baselines), *zip(engines, (DENSE, REDUCED), strict=True)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=0.65 + 0.32 * len(rows))
        longest = max(sample for latency, _ in rows for sample in latency.samples_ms)
        for y, (latency, colour) in enumerate(rows):
            chosen = colour != BASE or latency.name == fastest
            axes.barh(y, latency.median_ms, color=colour, alpha=0.8 if chosen else 0.35, height=0.7)
            axes.scatter(
                latency.samples_ms, [y] * len(latency.samples_ms), s=7, color=INK, alpha=0.55,
                linewidths=0, zorder=3,
            )  # fmt: skip
            axes.annotate(
                f"median {_ms(latency.median_ms)}", (max(latency.samples_ms), y), xytext=(5, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        names = [f"{r.name} *" if r.name == fastest else r.name for r, _ in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="ms (bar: median, dots: samples)", xlim=(0, longest * 1.3))
        axes.invert_yaxis()
        description = "; ".join(f"{r.name}: median {_ms(r.median_ms)}" for r, _ in rows) + "."
        return Plot(name, title, description, _svg(figure, name))


def plot_gains(name: str, title: str, engine: float, reduction: float, total: float) -> Plot:
    """Two factors and their product as a waterfall; on a log scale factors add up.

    Args:
        name, title: see :class:`Plot`.
        engine: fastest dense eager over dense engine.
        reduction: dense engine over reduced engine.
        total: fastest dense eager over reduced engine.
    """
    rows = (
        ("engine", 1.0, engine, engine, DENSE),
        ("reduction", engine, total, reduction, REDUCED),
        ("speed-up", 1.0, total, total, INK),
    )
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=1.75)
        for y, (_, start, end, factor, colour) in enumerate(rows):
            axes.barh(y, end - start, left=start, color=colour, alpha=0.85, height=0.62)
            axes.annotate(
                f"{factor:.2f}{TIMES}", (1, y), xycoords=("axes fraction", "data"),
                ha="right", va="center", fontweight="bold",
            )  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_xscale("log")
        edges = (1.0, engine, total)
        axes.set_xlim(min(edges) / 1.15, max(edges) * 1.35)
        _plain_log_ticks(axes)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="times as fast as the fastest dense eager (log scale)")
        axes.invert_yaxis()
        description = f"Engine {engine:.2f} times reduction {reduction:.2f} is {total:.2f}."
        return Plot(name, title, description, _svg(figure, name))


def for_page(plot: Plot) -> str:
    """The plot's SVG as an element of a page."""
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, rest = svg.partition(">")
    # Sized by the page; HTML knows the namespaces.
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    svg = f"{head}>{rest}".replace("xlink:href", "href").replace("fill: #ffffff", "fill: none")
    # matplotlib numbers its ids from 1 in each figure.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    head, _, rest = svg.partition(">")
    words = f"<title>{escape(plot.title)}</title><desc>{escape(plot.description)}</desc>"
    return f'{head} role="img" aria-label="{escape(plot.title)}">{words}{rest}'


def _axes(height: float) -> tuple[Figure, Axes]:
    # Not pyplot, which keeps every figure and picks a display.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """The figure as text, the same for the same input."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _mark_kinds(axes: Axes, points: Sequence[ErrorPoint]) -> None:
    """One label for each run of tensors of the same kind, in place of one a tensor."""
    runs: list[list[int]] = []
    for x, point in enumerate(points):
        if runs and points[runs[-1][-1]].kind == point.kind:
            runs[-1].append(x)
        else:
            runs.append([x])
    for run in runs[1:]:
        axes.axvline(run[0] - 0.5, color=FAINT, linewidth=0.8)
    labels = [
        points[run[0]].kind if len(run) == 1 else f"{points[run[0]].kind}\nby layer" for run in runs
    ]
    axes.set_xticks([(run[0] + run[-1]) / 2 for run in runs], labels)
    axes.tick_params(axis="x", length=0)


def _plain_log_ticks(axes: Axes) -> None:
    """1, 1.5, 2, 3, ... instead of powers of ten, of which there may be one."""
    low, high = axes.get_xlim()
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [s * 10.0**e for e in range(-4, 6) for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) <= 6:
            break
    axes.set_xticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks])
    axes.minorticks_off()


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
