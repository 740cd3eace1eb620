"""tokred-export plan"""

from __future__ import annotations

import click

from tokred_export.cli import _console
from tokred_export.cli._options import SIZE, reduction_options, shared_options
from tokred_export.specs import ReductionSpec


@click.command()
@click.argument("model", required=False)
@click.option(
    "--seq-len", "seq_lens", multiple=True, type=SIZE, default=("2048",), show_default=True,
    help="Prompt length, such as 2048 or 8k; may be given several times.",
)
@click.option("--revision", help="Revision of a hub model.")
@reduction_options
@shared_options
def command(
    model: str | None,
    seq_lens: tuple[int, ...],
    revision: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **reduction: object,
) -> None:
    """Show the token counts and FLOPs that a reduction target is solved to.

    MODEL is a local folder or a hub id; left out, the small model that ships with the package.
    Only its config is read.
    """
    from tokred_export.checkpoint import read_spec
    from tokred_export.reduction.schedule import (
        achieved_reduction,
        plan_rows,
        prefill_flops,
        solve_schedule,
    )

    _console.set_up(verbose, quiet)
    spec = read_spec(model, revision)
    asked = ReductionSpec(**reduction)
    plans = []
    for length in seq_lens:
        schedule = solve_schedule(spec, asked, length)
        rows = plan_rows(spec, schedule)
        achieved = {d: achieved_reduction(spec, schedule, d) for d in ("full", "paper")}
        plans.append({"schedule": schedule, "rows": rows, "achieved": achieved})
        if as_json:
            continue
        total = prefill_flops(spec, schedule).total
        _console.table(
            f"{asked.method}, {length} tokens in, {schedule.length_out} out: "
            f"{total / 1e9:.1f} GFLOP, {achieved['full']:.2%} saved "
            f"(paper's count {achieved['paper']:.2%})",
            ["after layer", "tokens in", "tokens out", "removed", "GFLOP so far", "of dense"],
            [
                [r.layer, r.tokens_in, r.tokens_out, r.removed,
                 f"{r.cumulative_flops / 1e9:.2f}", f"{r.share:.1%}"]
                for r in rows
            ],
        )
    if as_json:
        _console.print_json({"plans": plans})
