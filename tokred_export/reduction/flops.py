"""Exact FLOPs of a prefill, by layer: batch 1, two FLOPs for each multiply-add.

For ``n`` tokens entering a layer (letters as in ``specs``, C = E + 2GN, Z = E + C + H):

    in_proj    2 n D Z
    conv       2 n C K
    scan       per chunk of q tokens (q = Q, in the last chunk what is left):
                   2 G q q N     scores C B^T, the causally masked half too
                 + 2 H q q P     decayed scores times x
                 + 2 H q P N     the chunk's own state, B^T x
                 + 2 H q P N     what the state entering the chunk adds to its outputs, C h
                 + 2 H P N       the state carried to the next chunk
    norms      4 n (D + E)       square, add, times rms, times weight; block norm and gated norm
    out_proj   2 n E D

In the last layer, unless a site follows it, only the last token goes on behind the scan: gated
norm and out_proj count one token there.

The site after a layer, taking r of its ``n`` tokens away:

    importance   n E                                   one add for each scan output
    matching     2 floor(n/2) ceil(n/2) D + 3 n D      cosine matrix; normalising its vectors
    merging      2 r D                                 one add in the hidden, one in the residual

The head is the last token's final norm (4 D) and logits (2 D V).

Not counted, being elementwise and about one percent of the rest: activations, exponentials, decay
factors, gates, biases, the D skip, residual adds. Sorting and gathering are no FLOPs, but they do
take time: how much faster an engine gets is measured, never read off this page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from tokred_export.errors import InvalidRequest
from tokred_export.specs import ModelSpec, ReductionSchedule, Site, Spec


class Steps(NamedTuple):
    """Which of a site's steps a method needs at run time."""

    importance: bool = False
    matching: bool = False
    merging: bool = False


# The one list of methods. "utrc-code" scores and matches nothing: what it picks does not depend
# on the input, so all that is left of it is the merge.
METHOD_STEPS = {
    "utrc": Steps(importance=True, matching=True, merging=True),
    "utrc-code": Steps(merging=True),
    "evit": Steps(importance=True),
    "pumer": Steps(matching=True, merging=True),
    "none": Steps(),
}


class LayerFlops(Spec, kw_only=True):
    """FLOPs of one layer and of the site after it, for the ``tokens`` that enter the layer."""

    layer: int
    tokens: int
    in_proj: int
    conv: int
    scan: int
    norms: int
    out_proj: int
    reduction: int = 0

    @property
    def total(self) -> int:
        """All of the layer's FLOPs, its site's included."""
        return (
            self.in_proj + self.conv + self.scan + self.norms + self.out_proj + self.reduction
        )


class Flops(Spec, kw_only=True):
    """FLOPs of one prefill: a row for each layer, and the head for one token."""

    layers: tuple[LayerFlops, ...]
    head: int

    @property
    def total(self) -> int:
        """All FLOPs of the prefill."""
        return sum(row.total for row in self.layers) + self.head


class PlanRow(Spec, kw_only=True):
    """Where a prefill stands after ``layer`` and its site.

    ``cumulative_flops`` counts from the first layer to here, in the last row the head too;
    ``cumulative_flops_dense`` is the same without reduction; ``share`` is their quotient.
    """

    layer: int
    tokens_in: int
    tokens_out: int
    removed: int
    cumulative_flops: int
    cumulative_flops_dense: int
    share: float


def prefill_flops(model: ModelSpec, schedule: ReductionSchedule) -> Flops:
    """Counts the FLOPs of one prefill (B = 1, logits of the last token).

    Args:
        model: sizes of the model.
        schedule: a solved schedule; empty sites count the dense model.

    Returns:
        Exact integer FLOPs by layer, and the head's.

    Raises:
        InvalidRequest: the schedule has sites, but its method is unknown or takes no tokens away.
    """
    tokens = schedule.tokens_entering(model.n_layer)
    sites = {site.layer: site for site in schedule.sites}
    dense_layer = {count: _layer_flops(model, count) for count in set(tokens)}
    layers = []
    for layer, count in enumerate(tokens):
        reduction = site_flops(model, schedule.method, sites[layer]) if layer in sites else 0
        parts = dense_layer[count]
        if layer == model.n_layer - 1 and layer not in sites:
            parts = parts | _last_token_only(model, count)
        layers.append(LayerFlops(layer=layer, tokens=count, reduction=reduction, **parts))
    return Flops(layers=tuple(layers), head=model.d_model * (2 * model.vocab_size + 4))


def _layer_flops(model: ModelSpec, tokens: int) -> dict[str, int]:
    """FLOPs of one layer's parts for ``tokens`` tokens, without a site."""
    return {
        "in_proj": 2 * tokens * model.d_model * model.in_proj_dim,
        "conv": 2 * tokens * model.conv_dim * model.d_conv,
        "scan": scan_flops(model, tokens),
        "norms": 4 * tokens * (model.d_model + model.d_inner),
        "out_proj": 2 * tokens * model.d_inner * model.d_model,
    }


def _last_token_only(model: ModelSpec, tokens: int) -> dict[str, int]:
    """What differs in a last layer whose outputs are wanted for one token only."""
    return {
        "norms": 4 * (tokens * model.d_model + model.d_inner),
        "out_proj": 2 * model.d_inner * model.d_model,
    }


def scan_flops(model: ModelSpec, tokens: int) -> int:
    """Counts the chunked SSD scan over ``tokens`` tokens; the last chunk is as long as is left.

    Args:
        model: sizes of the model; ``chunk_size`` is Q.
        tokens: L, at least 0.

    Returns:
        FLOPs by the formula at the top of this module (the block decomposition of Mamba-2,
        arXiv 2405.21060, section 6, with no saving from the causal mask).
    """
    full, rest = divmod(tokens, model.chunk_size)
    squares = full * model.chunk_size**2 + rest**2
    chunks = full + (rest > 0)
    inside = 2 * squares * (model.n_groups * model.d_state + model.d_inner)
    states = 2 * model.d_inner * model.d_state * (2 * tokens + chunks)
    return inside + states


def site_flops(model: ModelSpec, method: str, site: Site) -> int:
    """Counts one reduction site.

    Merging is counted as if every removed token merged in both branches: a static graph masks
    the pruned ones, it does not skip them.

    Args:
        model: sizes of the model.
        method: a name in ``METHOD_STEPS`` that takes tokens away.
        site: how many tokens enter and leave.

    Returns:
        FLOPs of scoring, matching and merging.

    Raises:
        InvalidRequest: ``method`` is unknown, or is "none".
    """
    steps = METHOD_STEPS.get(method, Steps())
    if not any(steps):
        known = ", ".join(name for name, needs in METHOD_STEPS.items() if any(needs))
        raise InvalidRequest(
            f"a schedule with sites names the method {method!r}; expected one of {known}; "
            "take its sites away or choose one of these"
        )
    tokens = site.tokens_in
    half = tokens // 2
    importance = tokens * model.d_inner
    matching = 2 * half * (tokens - half) * model.d_model + 3 * tokens * model.d_model
    merging = 2 * site.removed * model.d_model
    return importance * steps.importance + matching * steps.matching + merging * steps.merging


def achieved_reduction(
    model: ModelSpec, schedule: ReductionSchedule, definition: Literal["full", "paper"] = "full"
) -> float:
    """Says what share of the dense prefill a schedule saves.

    Args:
        model: sizes of the model.
        schedule: a solved schedule.
        definition: "full" compares ``prefill_flops`` with the dense model's; "paper" is
            1 - mean over layers of (tokens entering the layer / length), the "Model Sparsity"
            that the official UTRC code logs (arXiv 2410.14725, wuyushuwys/ToR_SSM).

    Returns:
        The share; negative where reducing costs more than it saves.

    Raises:
        InvalidRequest: as ``prefill_flops``.
    """
    if definition == "paper":
        tokens = schedule.tokens_entering(model.n_layer)
        return 1 - sum(tokens) / (schedule.length * model.n_layer)
    return 1 - prefill_flops(model, schedule).total / _dense_flops(model, schedule).total


def plan_rows(model: ModelSpec, schedule: ReductionSchedule) -> list[PlanRow]:
    """Lays a schedule out as a table: one row for each site, and a last one for the whole prefill.

    Args:
        model: sizes of the model.
        schedule: a solved schedule; without sites only the last row is left.

    Returns:
        Rows in the order of layers, counts exact. In the last row ``layer`` is the last layer
        and nothing is removed.

    Raises:
        InvalidRequest: as ``prefill_flops``.
    """
    end = Site(
        layer=model.n_layer - 1, tokens_in=schedule.length_out, tokens_out=schedule.length_out
    )
    reduced = list(_running_totals(prefill_flops(model, schedule)))
    dense = list(_running_totals(_dense_flops(model, schedule)))
    rows = []
    for site, at in [*((site, site.layer) for site in schedule.sites), (end, model.n_layer)]:
        rows.append(
            PlanRow(
                layer=site.layer,
                tokens_in=site.tokens_in,
                tokens_out=site.tokens_out,
                removed=site.removed,
                cumulative_flops=reduced[at],
                cumulative_flops_dense=dense[at],
                share=reduced[at] / dense[at],
            )
        )
    return rows


def _dense_flops(model: ModelSpec, schedule: ReductionSchedule) -> Flops:
    return prefill_flops(model, ReductionSchedule(method="none", length=schedule.length))


def _running_totals(flops: Flops) -> Iterator[int]:
    """FLOPs up to and with each layer, then with the head."""
    so_far = 0
    for row in flops.layers:
        so_far += row.total
        yield so_far
    yield so_far + flops.head
