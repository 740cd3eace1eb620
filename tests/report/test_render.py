"""The report pages: whole, self-contained, complete, and safe against what names may hold."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from sample_report import (
    ENVIRONMENT,
    MODEL,
    judged_parity,
    judged_speed,
    make_case,
    make_engine,
    make_report,
    make_tensor,
)

from tokred_export.errors import EnvironmentUnable
from tokred_export.report.model import Bucket, Missing, Report
from tokred_export.report.render import render
from tokred_export.report.views import (
    component_views,
    flops,
    kind_of,
    limit_text,
    milliseconds,
    percent,
    sci,
    size,
    times,
    worst_by_name,
)
from tokred_export.specs import ReductionSchedule
from tokred_export.verify.judge import SIXTEEN_BIT
from tokred_export.verify.records import Flip, ParityCase

INLINE = {"b", "strong", "code", "small", "span"}
VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert('x')</script> & \"q\" | *b*"


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, attributes and the text outside style elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag not in INLINE:
            self.words.append(" ")
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("report")
    return write(make_report(), folder)


def write(report: Report, folder: Path) -> tuple[str, str]:
    """Both pages of a report that went through JSON."""
    report = msgspec.json.decode(msgspec.json.encode(report), type=Report)
    files = render(report, folder)
    assert all(file.is_file() for file in files)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def lean(**changes) -> Report:
    """A report that has only what is asked for, since plots take time."""
    return make_report(**{"parity": (), "speed": (), "buckets": (), **changes})


def unescape(markdown: str) -> str:
    return html.unescape(markdown)


def test_the_html_is_well_formed(pages):
    """Every tag is closed in order and no id occurs twice, in eight plots on one page."""
    page = Page(pages[0])
    assert pages[0].startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids))
    assert sum(tag == "svg" and name == "role" for tag, name, _ in page.attributes) == 8
    assert ("html", "lang", "en") in page.attributes
    assert any(name == "name" and value == "viewport" for _, name, value in page.attributes)


def test_every_reference_within_the_page_has_its_target(pages):
    """Clip paths, markers and labels point at ids that exist."""
    page = Page(pages[0])
    wanted = set(re.findall(r"url\(#([^)]+)\)", pages[0]))
    wanted |= {v[1:] for _, name, v in page.attributes if name == "href"}
    wanted |= {v for _, name, v in page.attributes if name == "aria-labelledby"}
    assert wanted
    assert wanted <= set(page.ids)


def test_the_html_fetches_nothing(pages):
    """No address, import, script, frame or picture from elsewhere."""
    assert "://" not in pages[0]
    assert "@import" not in pages[0]
    page = Page(pages[0])
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "img", "object"}
    assert all(v.startswith("#") for _, name, v in page.attributes if name in ("src", "href"))
    assert not re.search(r"url\((?!#)", pages[0])


def test_plots_have_words_for_those_who_cannot_see_them(pages):
    """Each plot carries a title and a description, and each scrolling box a label."""
    figures = re.findall(r"<svg.*?</svg>", pages[0], re.DOTALL)
    for figure in figures:
        assert re.search(r"<svg[^>]* role=\"img\" aria-label=\"[^\"]+\"", figure)
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", figure)
    labels = [v for _, name, v in Page(pages[0]).attributes if name == "aria-label"]
    assert len(labels) > len(figures) == 8
    assert all(labels)


def test_every_measured_number_is_on_the_page(pages):
    """Errors, noise, limits, agreements, medians, p95s and samples, each as the page writes it."""
    report, text = make_report(), Page(pages[0]).text
    cells = set(re.findall(r">([^<>]+)<", pages[0]))
    for judged in report.parity:
        for case in judged.record.cases:
            assert case.description in text
            assert {sci(case.logits.kl), percent(case.logits.top5_agreement)} <= cells
            assert percent(case.kept_jaccard) in cells
            for t in case.tensors:
                assert {t.name, sci(t.rel_l2), sci(t.noise_rel_l2), sci(t.max_abs)} <= cells
                assert {sci(t.mean_abs), f"{t.cosine:.7g}"} <= cells
            for site in case.sites:
                assert percent(site.same_source) in cells
                assert str(site.tokens_in) in cells
    assert "1e-4" in cells
    assert "token 417: removed differs, 0.73\N{MULTIPLICATION SIGN} rounding" in text
    for judged in report.speed:
        record = judged.record
        for latency in (*record.baselines, record.engine_dense, record.engine_reduced):
            assert {milliseconds(latency.median_ms), milliseconds(latency.p95_ms)} <= cells
            assert ", ".join(map(milliseconds, latency.samples_ms)) in text
        assert f"= engine {record.engine_gain:.2f} \N{MULTIPLICATION SIGN} reduction" in text
        assert f"reduction {record.reduction_gain:.2f}" in text
        assert times(record.speedup) in cells
        assert record.timed in text
    for bucket in report.buckets:
        for row in bucket.rows:
            assert {str(row.tokens_in), str(row.tokens_out), str(row.removed)} <= cells
            assert {flops(row.cumulative_flops), f"{100 * row.share:.1f} %"} <= cells


def test_both_pages_say_where_it_comes_from(pages):
    """Model, hash, environment, tolerance's reason, engines and commands, in HTML and Markdown."""
    report = make_report()
    for text in (Page(pages[0]).text, unescape(pages[1])):
        for words in (
            report.title, report.provenance.model_source, report.provenance.weights_sha256,
            report.provenance.command, report.command, ENVIRONMENT.processor, "torch 2.13.0",
            "tokred-export bench out/demo --threads 2", "eager float64 against eager float32",
            report.parity[0].tolerance.logits.reason, "eager chunk 64 (baseline)", "24 layers",
            "transformers chunk 256", "Passed", "sm80+sm86+sm89+sm120", "258 MiB in 1 file",
            "913 (counted in the network)", "Speed of prefill-2048 on tensorrt-rtx",
            "20 samples were asked for",
        ):  # fmt: skip
            assert words in text, words


def test_an_engine_that_was_not_run_says_so(pages):
    """TensorRT-RTX: built here, not run, and why; the other engine says nothing of the kind."""
    for text in (Page(pages[0]).text, unescape(pages[1]).replace("**", "")):
        assert text.count("Built, not run:") == 1
        assert re.search(r"Built, not run:\s+TensorRT-RTX needs an RTX GPU", text)


def test_markdown_tables_have_as_many_cells_as_their_heads(pages):
    """No stray pipe or break in a row, and each picture lies where the page says."""
    width = 0
    tables = 0
    for line in pages[1].splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        tables += width == 0
        width = width or line.count("|")
        assert line.count("|") == width, line
    assert tables == 2 + 2 * 3 + 2  # schedules, parity of two components, speeds


def test_markdown_pictures_exist(tmp_path):
    """Every picture of the Markdown is one of the files written, and all of them are shown."""
    _, markdown = write(make_report(), tmp_path)
    shown = set(re.findall(r"\]\((plots/[^)]+)\)", markdown))
    assert shown == {f"plots/{file.name}" for file in (tmp_path / "plots").iterdir()}
    assert len(shown) == 8


def test_markdown_folds_no_line_into_another(pages):
    """Lists, headings and tables start on lines of their own, with a blank line before."""
    lines = pages[1].splitlines()
    for before, line in pairwise(lines):
        if line.startswith("#") or line.startswith("!["):
            assert before == "", line
        if line.startswith("|") and not before.startswith("|"):
            assert before == "", line
        if line.startswith("- ") and not before.startswith("- "):
            assert before == "", line


def test_names_cannot_break_the_pages(tmp_path):
    """Markup in any name is shown as text, in both pages."""
    model = make_report()
    provenance = msgspec.structs.replace(
        model.provenance, model_source=HOSTILE, command=HOSTILE, libraries={HOSTILE: HOSTILE}
    )
    schedule = model.buckets[0].schedule
    environment = msgspec.structs.replace(ENVIRONMENT, processor=HOSTILE, gpu=HOSTILE)
    speed = judged_speed(
        512, component=HOSTILE, backend=HOSTILE, timed=HOSTILE, left_out={HOSTILE: HOSTILE},
        environment=environment, command=HOSTILE,
    )  # fmt: skip
    case = make_case(512, 1, component=HOSTILE, description=HOSTILE, problems={HOSTILE: HOSTILE})
    case = msgspec.structs.replace(case, tensors=(*case.tensors, make_tensor(HOSTILE, 0.5)))
    page, markdown = write(
        make_report(
            title=HOSTILE, provenance=provenance, command=HOSTILE,
            buckets=(Bucket(component=HOSTILE, schedule=schedule, rows=model.buckets[0].rows),),
            speed=(speed,), parity=(judged_parity(cases=(case,), backend=HOSTILE, noise=HOSTILE),),
            engines=(make_engine(file=HOSTILE, reason=HOSTILE, options={HOSTILE: HOSTILE}),),
            missing=(Missing(what=HOSTILE, why=HOSTILE),),
            verdict={"outcome": "FAIL", "reasons": [HOSTILE]},
        ),
        tmp_path,
    )  # fmt: skip
    assert HOSTILE in Page(page).text
    assert HOSTILE in unescape(markdown)
    for text in (page, markdown):
        assert "<script" not in text
    rows = [line for line in markdown.splitlines() if line.startswith("|") and "alert" in line]
    assert rows
    assert {line.count("|") for line in rows} <= {7 + 1, 8 + 1}  # as in their heads


def test_a_report_without_speed_or_parity_says_so_in_words(tmp_path):
    """Nothing measured, nothing built: said, not left blank."""
    page, markdown = write(
        lean(engines=(), missing=()), tmp_path
    )
    for text in (Page(page).text, markdown):
        assert text.count("Speed was not measured.") == 2  # at the top and in its section
        assert "Parity was not measured, so nothing is proven." in text
        assert "No engine was built." in text
        assert "No prefill graph is part of this report." in text
        assert "Nothing was measured." in text


def test_a_failed_parity_is_told_with_its_reasons(tmp_path):
    """The verdict, what failed by how much, and that speed was refused."""
    good = make_case(2048, 1)
    tensors = (
        make_tensor("logits", 2.5e-3), make_tensor("present.ssm_state.7", 1e-7, nonfinite=5),
        *good.tensors[1:],
    )  # fmt: skip
    flip = Flip(site=0, row=1, position=12, what="target", margin=None)
    sites = (msgspec.structs.replace(good.sites[0], flips=(flip,)), *good.sites[1:])
    judged = judged_parity(cases=(msgspec.structs.replace(good, tensors=tensors, sites=sites),))
    assert judged.verdict.outcome == "FAIL"
    why = Missing(what="Speed of prefill-2048 on onnxruntime", why="refused, since parity failed")
    page, markdown = write(
        lean(verdict=judged.verdict, parity=(judged,), missing=(why,)), tmp_path
    )
    for text in (Page(page).text, unescape(markdown).replace("**", "")):
        assert "Failed: a gate did not hold." in text
        assert "logits is off by 2.50e-03 (relative L2), allowed 1.00e-04" in text
        assert "present.ssm_state.7 holds 5 values that are NaN or infinite" in text
        assert "Speed of prefill-2048 on onnxruntime: refused, since parity failed" in text
        assert "beyond rounding" in text
    assert '<td class="wrong">2.5e-3</td>' in page
    assert '<td class="wrong">1 of 25</td>' in page
    assert "(not explained by rounding)" in page


def test_many_reasons_are_folded(tmp_path):
    """The first five of many stand at the top, the rest in a fold."""
    reasons = tuple(f"reason {i}." for i in range(9))
    page, _ = write(lean(verdict={"outcome": "FAIL", "reasons": reasons}), tmp_path)
    text = Page(page).text
    assert "reason 4." in text
    assert "reason 5." not in text
    assert "and 4 more, below." in text


def test_an_engine_that_could_not_be_compared(tmp_path):
    """A case with problems and no tensors is shown with its problem."""
    case = ParityCase(
        component="prefill-512", description="text", prompt_lengths=(512,),
        problems={"choice.src.0": "is missing"}, tensors=(), logits=None, kept_exact=False,
        kept_jaccard=0.0, sites=(),
    )  # fmt: skip
    page, markdown = write(lean(parity=(judged_parity(cases=(case,)),)), tmp_path)
    for text in (Page(page).text, unescape(markdown)):
        assert "No tensor could be compared." in text
        assert "choice.src.0 is missing" in text
        assert "not compared" in text


def test_an_inconclusive_speed_is_marked(tmp_path):
    """Drift, second run and fewer samples than asked for are all said."""
    drifted = judged_speed(2048, inconclusive=True, remeasured=True, samples_asked=40)
    page, markdown = write(lean(speed=(drifted,)), tmp_path)
    for text in (Page(page).text, markdown.replace("**", "")):
        assert "Inconclusive: latencies drifted by more than 5 % while being measured, and" in text
        assert "the fastest dense eager; inconclusive" in text
        assert "40 samples were asked for, and time allowed 20." in text
    again = judged_speed(2048, remeasured=True)
    page, _ = write(lean(speed=(again,)), tmp_path)
    assert "these are the second run's samples" in html.unescape(Page(page).text)


def test_a_baseline_that_was_left_out_is_named(tmp_path):
    """Why transformers took no part stands with the latencies."""
    speed = judged_speed(2048, left_out={"transformers": "it gates before the norm"})
    page, markdown = write(lean(speed=(speed,)), tmp_path)
    for text in (Page(page).text, markdown):
        assert "transformers was left out: it gates before the norm." in text


def test_a_dense_bucket_has_no_table(tmp_path):
    """A schedule without sites is called dense."""
    dense = Bucket(
        component="prefill-64", schedule=ReductionSchedule(method="none", length=64), rows=()
    )
    page, markdown = write(lean(buckets=(dense,)), tmp_path)
    for text in (Page(page).text, markdown):
        assert "Dense: no token is removed." in text


def test_different_environments_are_listed_with_what_ran_there(tmp_path):
    """Two machines: both shown, each with what was measured on it."""
    other = msgspec.structs.replace(
        ENVIRONMENT, processor="Another CPU", gpu="H200", driver="580.1"
    )
    page, _ = write(make_report(speed=(judged_speed(2048, environment=other),)), tmp_path)
    text = Page(page).text
    assert "Parity on onnxruntime" in text
    assert "Speed of prefill-2048 on onnxruntime" in text
    assert "Another CPU" in text
    assert "H200, driver 580.1" in text


def test_several_backends_keep_apart(tmp_path):
    """Records of two backends and batches get files and ids of their own."""
    parity = (judged_parity(), judged_parity(backend="tensorrt"))
    speed = (
        judged_speed(2048), judged_speed(2048, backend="tensorrt"), judged_speed(2048, batch=8)
    )  # fmt: skip
    page, _ = write(make_report(parity=parity, speed=speed), tmp_path)
    assert len(list((tmp_path / "plots").iterdir())) == 2 + 4 + 6
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    """Nothing on the pages depends on the time or on chance."""
    first = [file.read_bytes() for file in render(make_report(), tmp_path / "a")]
    second = [file.read_bytes() for file in render(make_report(), tmp_path / "b")]
    assert first == second


def test_the_report_survives_json():
    """What is rendered can be stored and read again."""
    report = make_report()
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    """A file where the folder should be is the environment's fault, not a traceback."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(EnvironmentUnable, match="cannot write to"):
        render(make_report(), tmp_path / "taken")


def test_the_worst_tensor_is_the_one_nearest_its_limit():
    """By error over limit, not by error: with 16-bit limits each tensor has its own."""
    tensors = (
        make_tensor("logits", 1e-3, noise_rel_l2=1e-3),
        make_tensor("present.conv_state.0", 4e-3, noise_rel_l2=2e-2),
        make_tensor("present.conv_state.1", 2e-3, noise_rel_l2=1e-3),
        make_tensor("present.ssm_state.0", 1e-9, noise_rel_l2=1e-3, nonfinite=1),
        make_tensor("present.ssm_state.1", 2.9e-3, noise_rel_l2=1e-3),
    )
    judged = msgspec.structs.replace(
        judged_parity(cases=(make_case(512, 1, tensors=tensors),)), tolerance=SIXTEEN_BIT
    )
    (view,) = component_views(judged)
    worst = {kind.label: kind for kind in view.kinds}
    assert list(worst) == ["logits", "conv state", "SSM state"]
    assert worst["conv state"].worst.tensor.name == "present.conv_state.1"
    assert worst["conv state"].failed == 0
    assert worst["SSM state"].worst.tensor.name == "present.ssm_state.0"
    assert worst["SSM state"].failed == 1
    assert worst["logits"].rule == "3\N{MULTIPLICATION SIGN} the noise floor up to 0.3"
    assert worst["logits"].worst.limit == pytest.approx(3e-3)


def test_each_tensor_once_kind_by_kind_and_layer_by_layer():
    """Over cases the worst of each name; layer 10 after layer 2."""
    (view, _) = component_views(judged_parity())
    rows = worst_by_name(view)
    names = [row.tensor.name for row in rows]
    states = [f"present.{kind}_state.{i}" for kind in ("conv", "ssm") for i in range(24)]
    assert names == ["logits", "kept_positions", *states]
    assert {row.case for row in rows if row.kind != "kept_positions"} == {2}


@pytest.mark.parametrize(
    ("write_out", "value", "expected"),
    [
        (sci, 0.0, "0"), (sci, 1e-4, "1e-4"), (sci, 1.26e-6, "1.3e-6"), (sci, 12.0, "1.2e1"),
        (sci, float("inf"), "inf"), (sci, float("nan"), "nan"),
        (limit_text, 0.0, "equal"), (limit_text, -1.0, "unknown"), (limit_text, 3e-3, "3e-3"),
        (percent, 1.0, "100 %"), (percent, 0.9999999, "99.999 %"), (percent, 0.98, "98 %"),
        (percent, 0.29, "29 %"), (percent, 0.0, "0 %"),
        (milliseconds, 4822.84, "4823"), (milliseconds, 94.899, "94.9"), (milliseconds, 0.5, "0.5"),
        (times, 1.236, "1.24\N{MULTIPLICATION SIGN}"),
        (size, 541_065_216, "516 MiB"), (size, 12, "12 bytes"), (size, 3 << 40, "3072 GiB"),
        (flops, 28_312_345_678, "28.3 G"), (flops, 12, "12"), (flops, 5 * 10**15, "5000 T"),
        (kind_of, "present.conv_state.11", "conv_state"), (kind_of, "logits", "logits"),
    ],
)  # fmt: skip
def test_numbers_in_words(write_out, value, expected):
    """Each way of writing a number, worked by hand."""
    assert write_out(value) == expected


def test_the_model_of_the_sample_is_described(pages):
    """Sizes on the page are those of the spec."""
    text = Page(pages[0]).text
    assert f"{MODEL.n_layer} layers, d_model {MODEL.d_model}, d_inner {MODEL.d_inner}" in text
    assert f"vocabulary {MODEL.vocab_size}" in text
