"""Records laid out as the page's tables: which rows, in which order, in which words.

Nothing is measured or judged here. Rows are picked (the worst tensor of a kind, the lowest
agreement at a site) and numbers are written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokred_export.report.model import JudgedParity
from tokred_export.verify.judge import Limit, Tolerance, judge_tensor, limit_of
from tokred_export.verify.margins import unexplained
from tokred_export.verify.records import Comparison, Flip, ParityCase

KINDS = {
    "logits": "logits",
    "kept_positions": "kept positions",
    "conv_state": "conv state",
    "ssm_state": "SSM state",
}


class TensorRow(NamedTuple):
    """One tensor of one case beside its limit; ``wrong`` says in words what is, if anything."""

    case: int  # number of the case on the page, from 1
    kind: str
    tensor: Comparison
    limit: float
    wrong: str | None


class KindRow(NamedTuple):
    """All tensors of one kind over all cases: the one nearest its limit, and how many there are."""

    label: str
    count: int
    failed: int
    worst: TensorRow
    rule: str
    reason: str


class SiteRow(NamedTuple):
    """Free choices at one site, the lowest agreement over all cases."""

    site: int
    layer: int
    tokens_in: int
    removed: int
    same_source: float
    same_target: float
    same_merge: float
    flips: int
    margin: str  # largest over the flips, in words


class CaseView(NamedTuple):
    """One case and its tensors."""

    number: int
    case: ParityCase
    rows: tuple[TensorRow, ...]
    flips: tuple[tuple[Flip, bool], ...]  # and whether rounding explains it


class ComponentView(NamedTuple):
    """All cases of one component of a parity record."""

    component: str
    kinds: tuple[KindRow, ...]
    sites: tuple[SiteRow, ...]
    cases: tuple[CaseView, ...]


def component_views(judged: JudgedParity) -> list[ComponentView]:
    """A parity record by component, in the order in which they first occur."""
    numbered: dict[str, list[CaseView]] = {}
    for number, case in enumerate(judged.record.cases, start=1):
        believed = {id(flip) for flip in unexplained(case)}
        view = CaseView(
            number=number,
            case=case,
            rows=tuple(_tensor_row(number, tensor, judged.tolerance) for tensor in case.tensors),
            flips=tuple((f, id(f) not in believed) for site in case.sites for f in site.flips),
        )
        numbered.setdefault(case.component, []).append(view)
    return [
        ComponentView(
            component=component,
            kinds=tuple(_kind_rows(cases, judged.tolerance)),
            sites=tuple(_site_rows([view.case for view in cases])),
            cases=tuple(cases),
        )
        for component, cases in numbered.items()
    ]


def worst_by_name(view: ComponentView) -> list[TensorRow]:
    """Of each tensor the case nearest its limit, kind by kind and layer by layer."""
    worst: dict[str, TensorRow] = {}
    for row in (row for case in view.cases for row in case.rows):
        known = worst.get(row.tensor.name)
        if known is None or _badness(row) > _badness(known):
            worst[row.tensor.name] = row
    kinds = list(KINDS)
    order = {kind: i for i, kind in enumerate(kinds)}
    return sorted(
        worst.values(), key=lambda row: (order.get(row.kind, len(kinds)), _layer(row.tensor.name))
    )


def kind_of(name: str) -> str:
    """``conv_state`` of ``present.conv_state.3``; a name without a layer is its own kind."""
    if name.startswith("present."):
        return name.removeprefix("present.").rpartition(".")[0]
    return name


def sci(value: float) -> str:
    """``1.2e-6``; 0 is exact."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def limit_text(value: float) -> str:
    """A limit as :func:`limit_of` returns it: 0 allows nothing, below 0 is no limit at all."""
    if value < 0:
        return "unknown"
    return "equal" if value == 0 else sci(value)


def percent(share: float) -> str:
    """``99.5 %``; never rounded up, so that only 1 is written as 100 %."""
    return f"{math.floor(share * 1e5 + 1e-9) / 1e3:g} %"


def tenths(share: float) -> str:
    """A share where a tenth of a percent is fine enough."""
    return f"{100 * share:.1f} %"


def flops(count: int) -> str:
    """FLOPs in thousands of thousands: ``28.3 G``."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T" if value < 1000 else f"{value:.0f} T"


def milliseconds(value: float) -> str:
    """Four digits are more than the samples hold."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def times(value: float) -> str:
    """``1.86`` and a multiplication sign."""
    return f"{value:.2f}\N{MULTIPLICATION SIGN}"


def size(count: int) -> str:
    """Bytes in binary units."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def _tensor_row(number: int, tensor: Comparison, tolerance: Tolerance) -> TensorRow:
    limit = limit_of(tensor, tolerance)
    wrong = judge_tensor(tensor, tolerance)
    return TensorRow(number, kind_of(tensor.name), tensor, limit, wrong)


def _badness(row: TensorRow) -> tuple[bool, int, float]:
    """What is wrong comes first, then what is not finite, then what is nearest its limit."""
    error = row.tensor.rel_l2
    share = error / row.limit if row.limit > 0 else error
    return row.wrong is not None, row.tensor.nonfinite, share


def _kind_rows(cases: Sequence[CaseView], tolerance: Tolerance) -> Iterator[KindRow]:
    rows = [row for case in cases for row in case.rows]
    present = dict.fromkeys(row.kind for row in rows)
    for kind in [*(k for k in KINDS if k in present), *(k for k in present if k not in KINDS)]:
        of_kind = [row for row in rows if row.kind == kind]
        limit = getattr(tolerance, kind, None)
        yield KindRow(
            label=KINDS.get(kind, kind),
            count=len(of_kind),
            failed=sum(row.wrong is not None for row in of_kind),
            worst=max(of_kind, key=_badness),
            rule="no tolerance" if limit is None else _rule(limit),
            reason="" if limit is None else limit.reason,
        )


def _rule(limit: Limit) -> str:
    parts = []
    if limit.rel_l2:
        parts.append(sci(limit.rel_l2))
    if limit.noise_multiple:
        times_noise = f"{limit.noise_multiple:g}{times(1)[-1]} the noise floor"
        parts.append(f"{times_noise} up to {limit.most:g}")
    return " or ".join(parts) + (", the larger" if len(parts) == 2 else "") or "must be equal"


def _site_rows(cases: Sequence[ParityCase]) -> Iterator[SiteRow]:
    for number in dict.fromkeys(site.site for case in cases for site in case.sites):
        sites = [site for case in cases for site in case.sites if site.site == number]
        flips = [flip for site in sites for flip in site.flips]
        yield SiteRow(
            site=number,
            layer=sites[0].layer,
            tokens_in=sites[0].tokens_in,
            removed=sites[0].removed,
            same_source=min(site.same_source for site in sites),
            same_target=min(site.same_target for site in sites),
            same_merge=min(site.same_merge for site in sites),
            flips=len(flips),
            margin=_largest_margin(flips),
        )


def _largest_margin(flips: Sequence[Flip]) -> str:
    if not flips:
        return ""
    margins = [flip.margin for flip in flips if flip.margin is not None]
    return "beyond rounding" if len(margins) < len(flips) else margin_text(max(margins))


def margin_text(margin: float | None) -> str:
    """How far scores would have to move for a flip."""
    return "beyond rounding" if margin is None else f"{margin:.2g}{times(1)[-1]} rounding"


def _layer(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1
