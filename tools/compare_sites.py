"""What the number of reduction sites costs the demo model, at the same share of FLOPs.

    python tools/compare_sites.py --sites 2,4,6,8 2,5,8 2,5 3,6 --shares 0.1 0.2 0.3

Prompts are pieces of the held-out files of this Python's library, all as long as the bucket. For
each schedule: the negative log-likelihood of the token that follows, and the divergence of the
next token's distribution from the dense model's, both also as differences from the default sites
on the same prompts, with their standard errors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu")]

from bench_engines import sites_of  # noqa: E402
from demo_agreement import held_out_prompts  # noqa: E402
from tokred_plugins.opset import PLAIN  # noqa: E402

from tokred_export import pipeline  # noqa: E402
from tokred_export.specs import BuildSpec, ReductionSchedule, ReductionSpec  # noqa: E402

BATCH = 16


def prompts(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int32 [count, length], and int64 [count] of the tokens that follow."""
    found = held_out_prompts(2 * count, length + 1, length, seed=3)
    ids = torch.from_numpy(np.stack([p for p in found if len(p) == length + 1][:count]))
    return ids[:, :-1].int(), ids[:, -1].long()


@torch.no_grad()
def log_probabilities(
    line: pipeline.Line, schedule: ReductionSchedule | None, ids: torch.Tensor
) -> torch.Tensor:
    """Of the next token, float32 [count, V]."""
    model = pipeline.eager(line, schedule, "float32", PLAIN)
    made = []
    for some in ids.split(BATCH):
        lengths = torch.full((len(some),), ids.shape[1], dtype=torch.int32)
        made.append(F.log_softmax(model(some, lengths).logits.float(), dim=-1))
    return torch.cat(made)


def mean(values: torch.Tensor) -> str:
    """With its standard error."""
    return f"{values.mean():+.3f} +- {values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", nargs="*", type=sites_of, default=[(2, 5, 8)],
                        help="layers such as 2,5,8, compared with the default ones")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3])
    parser.add_argument("--method", default="utrc")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=400)
    options = parser.parse_args()
    ids, follows = prompts(options.prompts, options.length)

    def measured(logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood and divergence from the dense model of each prompt."""
        apart = F.kl_div(logs, dense, log_target=True, reduction="none").sum(dim=-1)
        return F.nll_loss(logs, follows, reduction="none"), apart

    line = pipeline.start_line(BuildSpec(seq_lens=(options.length,)))
    dense = log_probabilities(line, None, ids)
    print(f"{len(ids)} prompts; dense: nll {mean(measured(dense)[0])}", flush=True)
    for share in options.shares:
        default = None
        for sites in (None, *options.sites):
            asked = ReductionSpec(target=share, method=options.method, sites=sites)
            spec = BuildSpec(seq_lens=(options.length,), reduction=asked)
            (schedule,) = pipeline.schedules(line._replace(spec=spec)).values()
            nll, apart = measured(log_probabilities(line, schedule, ids))
            default = default or (nll, apart)
            print(f"{share:g} at {','.join(str(s.layer) for s in schedule.sites)}: "
                  f"nll {mean(nll)} ({mean(nll - default[0])}), "
                  f"divergence {mean(apart)} ({mean(apart - default[1])})", flush=True)


if __name__ == "__main__":
    main()
