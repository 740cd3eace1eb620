"""The README's table and the plot of engine speeds, from docs/results/speed.jsonl.

    python tools/gpu/results_table.py            write both
    python tools/gpu/results_table.py --check    fail if the README is not what it would write
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "speed.jsonl"
PLOT = ROOT / "docs" / "results" / "speed.svg"
BEGIN, END = "<!-- speed table: tools/gpu/results_table.py -->", "<!-- end of speed table -->"
HEAD = (
    "| model | batch | FLOPs saved | engine ms | x mamba-ssm eager | x mamba-ssm CUDA graph | "
    "x its products alone | sites | peak GB (mamba-ssm) | logits off by (noise) | build s |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def read_results(path: Path) -> list[dict]:
    """The latest record of every case, with mamba-ssm in its run and without, by model size, batch
    and share."""
    latest = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = (record["model"], record["batch"], record["length"], record["flops_reduction"],
               record.get("round_to", 1), tuple(record.get("sites", ())), record["method"],
               record["runtime"], record["gpu"], record["graph_ms"] is None)
        latest[key] = record
    return sorted(latest.values(), key=lambda r: (r["gpu"], r["runtime"], _size(r["model"]),
                                                  r["batch"], r["flops_reduction"],
                                                  r.get("round_to", 1), r.get("sites", [])))


def _size(model: str) -> float:
    """2.7b -> 2.7e9; models without a size in their name first."""
    factor = {"m": 1e6, "b": 1e9}.get(model[-1], 0.0)
    try:
        return float(model[:-1]) * factor
    except ValueError:
        return 0.0


def table(records: list[dict]) -> list[str]:
    """Markdown lines, one group a GPU and runtime."""
    lines = []
    for place in dict.fromkeys((r["gpu"], r["runtime"]) for r in records):
        group = [r for r in records if (r["gpu"], r["runtime"]) == place]
        commits = ", ".join(dict.fromkeys(r["commit"][:7] for r in group))
        versions = group[-1]["versions"]
        against = f", mamba-ssm {versions['mamba_ssm']}" if "mamba_ssm" in versions else ""
        lines += [
            f"{place[0]}, {place[1]}, float16 engines, {group[0]['length']} tokens{against} "
            f"in bfloat16 (commit {commits}):", "", *HEAD,
            *map(_row, group), "",
        ]
    return lines


def _row(r: dict) -> str:
    eager = "" if r["eager_ms"] is None else f"{r['eager_ms'] / r['median_ms']:.2f}"
    graph = "" if r["graph_ms"] is None else f"{r['graph_ms'] / r['median_ms']:.2f}"
    theirs = r["mamba_ssm_peak_gb"]
    memory = f"{r['peak_gb']:.2f}" + ("" if theirs is None else f" ({theirs:.2f})")
    parity = r["parity"]
    wrong = " **outside its gate**" if parity["wrong"] else ""
    cells = (
        r["model"], str(r["batch"]), _saved(r),
        f"{r['median_ms']:.3f}", eager, graph, f"{r['median_ms'] / r['gemm_floor_ms']:.2f}",
        f"{r['sites_ms'] / r['profile_ms']:.1%}" if r["flops_reduction"] else "",
        memory, f"{parity['logits_rel_l2']:.1e} ({parity['noise_floor']:.1e}){wrong}",
        f"{r['build_s']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _saved(r: dict, apart: str = " ") -> str:
    """What was asked for, of what kept counts are multiples, and where, if that was asked for."""
    by = r.get("round_to", 1)
    sites = ",".join(map(str, r.get("sites", ())))
    return f"{100 * r['flops_reduction']:.0f} %" + "".join((
        f"{apart}by {by}" if by > 1 else "", f"{apart}at {sites}" if sites else "",
    ))


def with_table(readme: str, lines: list[str]) -> str:
    """The README with the table between its two marks.

    Raises:
        SystemExit: the marks are not there.
    """
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"README.md lacks the line {BEGIN!r} or {END!r}")
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return "\n".join([before + BEGIN, "", *lines]) + "\n" + END + after


def plot(records: list[dict], path: Path) -> None:
    """Milliseconds of mamba-ssm's graph, the dense and the reduced engines, a panel a case."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    timed = [r for r in records if r["graph_ms"] is not None]
    cases = list(dict.fromkeys((r["gpu"], r["model"], r["batch"]) for r in timed))
    figure, axes = plt.subplots(1, len(cases), figsize=(2.2 * len(cases), 3.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        group = [r for r in timed if (r["gpu"], r["model"], r["batch"]) == case]
        names = ["graph", *(_saved(r, "\n").replace(",", ",\n") for r in group)]
        values = [group[0]["graph_ms"], *(r["median_ms"] for r in group)]
        colours = ["#999999", *["#2b6cb0"] * len(group)]
        bars = axis.bar(names, values, color=colours)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
        axis.margins(y=0.12)  # room for the labels
        axis.set_title(f"{case[1]}, batch {case[2]}", fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("ms a prefill")
    figure.suptitle("mamba-ssm in a CUDA graph, and engines by FLOPs saved", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    records = read_results(RESULTS) if RESULTS.is_file() else []
    lines = table(records) if records else ["No engine has been timed with this version yet.", ""]
    readme = ROOT / "README.md"
    wanted = with_table(readme.read_text(encoding="utf-8"), lines)
    if options.check:
        sys.exit(0 if wanted == readme.read_text(encoding="utf-8") else 1)
    readme.write_text(wanted, encoding="utf-8")
    if records:
        plot(records, PLOT)


if __name__ == "__main__":
    main()
