"""The README's table of engine speeds is what the results say, and says when there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu"))

import results_table  # noqa: E402


def record(**changes):
    """A line of speed.jsonl."""
    fields = {
        "model": "130m", "batch": 1, "length": 2048, "length_out": 882, "flops_reduction": 0.3,
        "method": "utrc", "runtime": "TensorRT 8.6.0", "median_ms": 2.0, "eager_ms": 40.0,
        "graph_ms": 3.0, "gemm_floor_ms": 0.5, "peak_gb": 0.4, "mamba_ssm_peak_gb": 0.7,
        "build_s": 61.2, "gpu": "GPU", "commit": "0123456789", "versions": {"mamba_ssm": "2.3"},
        "parity": {"logits_rel_l2": 2e-3, "noise_floor": 1.9e-3, "wrong": []},
        "profile_ms": 2.5, "sites_ms": 0.25,
    }
    return fields | changes


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return results_table.read_results(path)


def test_the_readme_is_up_to_date():
    """Nobody edits the table by hand, or forgets to write it anew."""
    script = ROOT / "tools" / "gpu" / "results_table.py"
    done = subprocess.run([sys.executable, script, "--check"], check=False)
    assert done.returncode == 0, "run tools/gpu/results_table.py"


def test_ratios_are_of_the_engine(tmp_path):
    """x eager, x graph and x products are quotients with the engine's median."""
    (line,) = results_table.table(write(tmp_path / "r", [record()]))[-2:-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:7] == ["2.000", "20.00", "1.50", "4.00"]
    assert cells[7:9] == ["10.0%", "0.40 (0.70)"] and "outside" not in line


def test_the_latest_record_of_a_case_counts(tmp_path):
    """Files are appended to; sizes are in order of size, not of letters."""
    records = [record(median_ms=9.0), record(model="2.7b"), record(median_ms=1.0)]
    found = write(tmp_path / "r", records)
    assert [(r["model"], r["median_ms"]) for r in found] == [("130m", 1.0), ("2.7b", 2.0)]


def test_sites_asked_for_are_a_case_of_their_own(tmp_path):
    """The row names them; the default ones have a row without."""
    found = write(tmp_path / "r", [record(sites=[5, 11], median_ms=1.9), record()])
    assert [r["median_ms"] for r in found] == [2.0, 1.9]
    plain, asked = results_table.table(found)[-3:-1]
    assert "| 30 % |" in plain and "| 30 % at 5,11 |" in asked


def test_rounded_counts_are_a_case_of_their_own(tmp_path):
    """Fewer FLOPs may be left than without, and the row says why."""
    found = write(tmp_path / "r", [record(), record(round_to=64, median_ms=1.9)])
    lines = results_table.table(found)[-3:-1]
    assert [line.split("|")[3].strip() for line in lines] == ["30 %", "30 % by 64"]


def test_what_failed_parity_says_so(tmp_path):
    """A speed beside wrong numbers must not look like a result."""
    wrong = record(parity={"logits_rel_l2": 0.1, "noise_floor": 1e-3, "wrong": ["logits"]})
    assert "**outside its gate**" in "\n".join(results_table.table(write(tmp_path / "r", [wrong])))


def test_a_case_without_baseline(tmp_path):
    """The demo model has no mamba-ssm beside it."""
    demo = record(model="demo", eager_ms=None, graph_ms=None, mamba_ssm_peak_gb=None)
    lines = results_table.table(write(tmp_path / "r", [demo]))
    assert "| demo | 1 | 30 % | 2.000 |  |  |" in "\n".join(lines)


def test_a_later_record_without_baseline_hides_none(tmp_path):
    """What was measured against mamba-ssm stays until it is measured again."""
    alone = record(eager_ms=None, graph_ms=None, mamba_ssm_peak_gb=None, median_ms=1.5)
    lines = results_table.table(write(tmp_path / "r", [record(), alone]))[-3:-1]
    assert [line.split("|")[4:7] for line in lines] == [
        [" 2.000 ", " 20.00 ", " 1.50 "], [" 1.500 ", "  ", "  "],
    ]


def test_only_between_the_marks():
    """The rest of the README stays; without the marks nothing is written."""
    before = f"a\n{results_table.BEGIN}\nold\n{results_table.END}\nb\n"
    made = results_table.with_table(before, ["new", ""])
    assert made == f"a\n{results_table.BEGIN}\n\nnew\n\n{results_table.END}\nb\n"
    with pytest.raises(SystemExit, match="lacks the line"):
        results_table.with_table("a\n", [])


def test_the_plot_shows_every_case(tmp_path):
    """One panel a model and batch, and the same file from the same results."""
    records = write(tmp_path / "r", [record(), record(flops_reduction=0.0), record(batch=8)])
    results_table.plot(records, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count('id="axes_') == 2
