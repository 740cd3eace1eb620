"""The plots: well-formed SVG that shows what it was given, alone and within a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from sample_report import make_latency

from tokred_export.report.plots import (
    ErrorPoint,
    Plot,
    for_page,
    plot_errors,
    plot_gains,
    plot_latencies,
    plot_tokens,
)

SVG = "{http://www.w3.org/2000/svg}"
TIMES = "\N{MULTIPLICATION SIGN}"


def texts(plot: Plot) -> list[str]:
    """Every text of a plot; parsing fails if it is no well-formed XML."""
    root = ET.fromstring(plot.svg)
    assert root.tag == f"{SVG}svg"
    return ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]


def points(errors: list[float], tolerance: float | None = 1e-4) -> list[ErrorPoint]:
    return [ErrorPoint("SSM state", f"s{i}", e, 3e-7, tolerance) for i, e in enumerate(errors)]


def bars(plot: Plot, count: int) -> list[tuple[float, float]]:
    """Left and right edge of the ``count`` bars, from their paths, in the order drawn."""
    found = []
    for group in ET.fromstring(plot.svg).iter(f"{SVG}g"):
        if re.fullmatch(r"patch_\d+", group.get("id", "")):
            path = group.find(f"{SVG}path")
            if "clip-path" in path.attrib:  # the background and the axes have none
                xs = [float(x) for x in re.findall(r"[ML] (\S+) ", path.get("d"))]
                found.append((min(xs), max(xs)))
    assert len(found) == count
    return found


def test_tokens_describe_both_ends():
    """Axes named, the dense count beside its line, both ends in words."""
    plot = plot_tokens("t", "Tokens", [2048, 2048, 1792, 1280])
    assert {"layer", "tokens", "dense: 2048 everywhere"} <= set(texts(plot))
    assert plot.description == "2048 tokens enter the first layer and 1280 the last of 4."


def test_tokens_of_a_single_layer():
    """A model of one layer has a plot too."""
    assert "dense: 7 everywhere" in texts(plot_tokens("t", "Tokens", [7]))


def test_errors_name_what_is_above_its_tolerance():
    """In the description, for those who do not see the plot."""
    plot = plot_errors("e", "Errors", points([1e-6, 2e-3, 1e-5, float("nan")]))
    assert plot.description == "4 tensors; above the tolerance: s1, s3."
    assert {"error", "noise floor", "tolerance", "relative L2"} <= set(texts(plot))


@pytest.mark.parametrize(
    "given",
    [
        points([0.0, 0.0]),
        points([1e-6]),
        points([float("inf"), 1e-6]),
        points([float("nan")], tolerance=None),
        [ErrorPoint("logits", "logits", 0.0, 0.0, None)],
    ],
)
def test_errors_of_any_size_can_be_drawn(given):
    """Zero, infinite and NaN errors stay inside the axes, all of them on finite coordinates."""
    plot = plot_errors("e", "Errors", given)
    assert "nan" not in plot.svg.lower().replace("nansi", "")
    uses = [e for e in ET.fromstring(plot.svg).iter(f"{SVG}use") if e.get("y")]
    height = float(ET.fromstring(plot.svg).get("viewBox").split()[3])
    assert uses
    assert all(0 <= float(use.get("y")) <= height for use in uses)


def test_kinds_are_named_once_each():
    """One label a run of tensors of one kind."""
    given = [ErrorPoint("logits", "logits", 1e-6, 1e-7, 1e-4), *points([1e-6, 2e-6, 3e-6])]
    found = " ".join(texts(plot_errors("e", "Errors", given)))
    assert found.count("logits") == 1
    assert found.count("SSM state") == 1


def test_latencies_show_every_sample_and_mark_the_fastest():
    """A bar a row as long as its median, a dot a sample, a star at the baseline."""
    eager = [make_latency("eager chunk 32", 200, 3), make_latency("eager chunk 64", 160, 5)]
    engines = (make_latency("engine dense", 80, 5), make_latency("engine reduced", 40, 5))
    plot = plot_latencies("l", "Latency", eager, "eager chunk 64", engines)
    found = texts(plot)
    assert {"eager chunk 64 *", "eager chunk 32", "engine dense", "engine reduced"} <= set(found)
    assert {"median 160 ms", "median 80 ms", "median 40 ms"} <= set(found)
    assert "engine reduced: median 40 ms" in plot.description
    lengths = [right - left for left, right in bars(plot, 4)]
    assert lengths[1] / lengths[3] == pytest.approx(4, rel=1e-3)
    assert lengths[1] / lengths[2] == pytest.approx(2, rel=1e-3)
    dots = [e for e in ET.fromstring(plot.svg).iter(f"{SVG}use") if "fill-opacity" in str(e.attrib)]
    assert len(dots) == 3 + 5 + 5 + 5


@pytest.mark.parametrize("engine", [2.0, 0.8])
def test_gains_add_up_on_their_scale(engine):
    """The second bar starts where the first ends, and the total spans both; below 1 too."""
    plot = plot_gains("g", "Gains", engine, 1.25, engine * 1.25)
    assert [f"{engine:.2f}{TIMES}", f"1.25{TIMES}", f"{engine * 1.25:.2f}{TIMES}"] == [
        text for text in texts(plot) if re.fullmatch(rf"\d\.\d\d{TIMES}", text)
    ]
    first, second, total = bars(plot, 3)
    grows = engine > 1
    assert second[0] == pytest.approx(first[1 if grows else 0], abs=0.01)
    assert total[1] == pytest.approx(second[1] if grows else first[1], abs=0.01)
    assert plot.description == f"Engine {engine:.2f} times reduction 1.25 is {engine * 1.25:.2f}."


@pytest.mark.parametrize("gains", [(1.0, 1.0, 1.0), (40.0, 3.0, 120.0), (0.01, 1.5, 0.015)])
def test_gains_of_any_size_have_ticks(gains):
    """At least one and at most eight readable ticks on the axis."""
    found = [text for text in texts(plot_gains("g", "Gains", *gains)) if TIMES in text]
    ticks = [text for text in found if not re.fullmatch(rf"\d+\.\d\d{TIMES}", text)]
    assert 1 <= len(ticks) <= 8


def test_on_a_page_the_plot_takes_the_pages_colours():
    """No fixed colours, sizes or addresses are left, and the words are escaped."""
    plot = plot_gains("gains-a", "Gains of <a> & b", 2.0, 1.5, 3.0)
    page = for_page(plot)
    assert page.startswith("<svg ")
    assert page.endswith("</svg>\n")
    assert "var(--dense)" in page
    assert not re.search(r"#[0-9a-f]{6}\b", page.lower())
    assert "://" not in page
    assert "<title>Gains of &lt;a&gt; &amp; b</title>" in page
    head = page.partition(">")[0]
    assert " width=" not in head
    assert "viewBox=" in head
    assert all(name.startswith("gains-a-") for name in re.findall(r'\bid="([^"]+)"', page))


def test_the_same_input_gives_the_same_file():
    """No time stamp and no random ids."""
    make = lambda: plot_errors("e", "Errors", points([1e-6, 2e-6]))  # noqa: E731
    assert make().svg == make().svg
