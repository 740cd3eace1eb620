"""Parity: an engine's prefill against eager PyTorch, on the engine's own choices.

Two questions are kept apart. Given the same choices, are the numbers the same? The engine's
``choice.*`` outputs are replayed in eager for that. And are the choices the same? At every site
of the replay eager is asked what it would have done with the very tokens the engine saw there;
where they differ, :mod:`tokred_export.verify.margins` says by how little.

Nothing is judged here; see :mod:`tokred_export.verify.judge`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tokred_export.errors import InvalidRequest
from tokred_export.model import Mamba2
from tokred_export.reduction.methods import Choice
from tokred_export.specs import Dtype, ReductionSchedule
from tokred_export.verify.compare import compare, compare_logits, jaccard
from tokred_export.verify.margins import RowChoice, RowScores, find_flips
from tokred_export.verify.outputs import expected_shapes, find_problems
from tokred_export.verify.records import (
    Comparison,
    Flip,
    LogitsComparison,
    ParityCase,
    SiteAgreement,
)
from tokred_export.verify.replay import Replay, SiteView, choices_of, in_dtype, replay

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

_REDUCED_PRECISION = (
    "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
)


def noise_of(engine_dtype: Dtype) -> str:
    """What ``noise_rel_l2`` compares, in words, for engines of a dtype."""
    if engine_dtype == "float32":
        return "eager float64 against eager float32, same choices"
    return f"eager {engine_dtype} with float32 accumulation against eager float32, same choices"


def measure_case(
    model: Mamba2,
    run: Run,
    component: str,
    input_ids: np.ndarray,
    prompt_len: np.ndarray,
    description: str,
    engine_dtype: Dtype = "float32",
) -> ParityCase:
    """Run one batch of prompts through an engine and through eager, and measure both questions.

    Args:
        model: the baseline, float32, with the schedule of the engine. On a GPU it should be
            made of the plain functions, or the engine is compared with its own kernels.
        run: the engine; input arrays by name to output arrays by name.
        component: its name in the bundle.
        input_ids: int32 [B, L].
        prompt_len: int32 [B].
        description: of the prompts, for the report.
        engine_dtype: of the engine's weights; decides the noise floor.

    Raises:
        InvalidRequest: the model is not float32, or made for another length.
    """
    schedule = _schedule_of(model, input_ids.shape[1])
    input_ids = np.ascontiguousarray(input_ids, dtype=np.int32)
    prompt_len = np.ascontiguousarray(prompt_len, dtype=np.int32)
    found = run({"input_ids": input_ids, "prompt_len": prompt_len})
    shapes = expected_shapes(model.spec, schedule, len(input_ids), model.logits)
    problems = find_problems(found, shapes, schedule)
    said = {
        "component": component,
        "description": description,
        "prompt_lengths": tuple(int(n) for n in prompt_len),
        "problems": problems,
    }
    if any(name.startswith("choice.") for name in problems):  # then there is nothing to replay
        return ParityCase(
            **said, tensors=(), logits=None, kept_exact=False, kept_jaccard=0.0, sites=()
        )
    ids, lengths = torch.from_numpy(input_ids), torch.from_numpy(prompt_len)
    choices = choices_of(found, len(schedule.sites))
    base = replay(model, ids, lengths, choices)
    other = _replay_in_other_dtype(model, ids, lengths, choices, engine_dtype)
    exact, rounded = (other, base) if engine_dtype == "float32" else (base, other)
    sites = tuple(
        _measure_site(schedule, s, choices[s], base.sites[s], exact.sites[s], rounded.sites[s])
        for s in range(len(schedule.sites))
    )
    wanted = [name for name in shapes if name in base.outputs and name not in problems]
    kept_exact, kept_jaccard = False, 0.0
    if "kept_positions" not in problems:
        kept = _free_kept_positions(model, ids, lengths, base, sites)
        kept_exact = bool(np.array_equal(kept, found["kept_positions"]))
        kept_jaccard = _mean_jaccard(kept, found["kept_positions"])
    return ParityCase(
        **said,
        tensors=tuple(_measure_tensor(name, model, base, other, found) for name in wanted),
        logits=_measure_logits(model, base, found) if "logits" in wanted else None,
        kept_exact=kept_exact,
        kept_jaccard=kept_jaccard,
        sites=sites,
    )


def _schedule_of(model: Mamba2, length: int) -> ReductionSchedule:
    weight = model.embedding.weight
    if weight.dtype != torch.float32:
        raise InvalidRequest(
            f"the baseline of parity is {weight.dtype}, expected float32: build the model with "
            "dtype float32"
        )
    schedule = model.schedule or ReductionSchedule(method="none", length=length)
    if schedule.length != length:
        raise InvalidRequest(
            f"the prompts are {length} tokens wide, but the baseline's schedule is for "
            f"{schedule.length}: solve the schedule for {length}"
        )
    return schedule


def _replay_in_other_dtype(
    model: Mamba2, ids: Tensor, lengths: Tensor, choices: list[Choice], engine_dtype: Dtype
) -> Replay:
    """The run that shows how much rounding matters; its weights are gone when this returns."""
    other = torch.float64 if engine_dtype == "float32" else getattr(torch, engine_dtype)
    with _float32_sums():
        return replay(in_dtype(model, other), ids, lengths, choices)


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """16-bit products on a GPU accumulate in float32 within, as in the engine.

    Only within: what is timed later in this process runs as its users run it.
    """
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _REDUCED_PRECISION}
    try:
        for name in before:
            setattr(matmul, name, False)
        yield
    finally:
        for name, allowed in before.items():
            setattr(matmul, name, allowed)


def _measure_tensor(
    name: str, model: Mamba2, base: Replay, other: Replay, found: dict[str, np.ndarray]
) -> Comparison:
    arrays = base.outputs[name], found[name], other.outputs[name]
    if name == "logits":
        real = _rows_with_a_token(model, base)
        arrays = tuple(array[real] for array in arrays)
    return compare(name, *arrays)


def _measure_logits(
    model: Mamba2, base: Replay, found: dict[str, np.ndarray]
) -> LogitsComparison:
    real = _rows_with_a_token(model, base)
    return compare_logits(base.outputs["logits"][real], found["logits"][real])


def _rows_with_a_token(model: Mamba2, base: Replay) -> np.ndarray:
    """Mask of the logits that belong to a prompt token; those of padding mean nothing."""
    real = base.outputs["kept_positions"] >= 0
    return real if model.logits == "all" else real[:, -1]


def _free_kept_positions(
    model: Mamba2, ids: Tensor, lengths: Tensor, base: Replay, sites: tuple[SiteAgreement, ...]
) -> np.ndarray:
    """kept_positions of eager left to itself."""
    if not any(site.flips for site in sites):  # then the replay was such a run
        return base.outputs["kept_positions"]
    device = model.embedding.weight.device
    with torch.no_grad():
        return model(ids.to(device), lengths.to(device)).kept_positions.cpu().numpy()


def _mean_jaccard(mine: np.ndarray, theirs: np.ndarray) -> float:
    rows = [
        jaccard(a[a >= 0].tolist(), b[b >= 0].tolist()) for a, b in zip(mine, theirs, strict=True)
    ]
    return float(np.mean(rows))


def _measure_site(
    schedule: ReductionSchedule,
    index: int,
    engine: Choice,
    base: SiteView,
    exact: SiteView,
    rounded: SiteView,
) -> SiteAgreement:
    """Eager's free choice against the engine's at one site.

    Args:
        schedule: of both.
        index: the site's number.
        engine: the engine's choice.
        base: eager float32's view, whose choice counts as eager's.
        exact, rounded: the more and the less exact of the two views, for the margins.
    """
    site = schedule.sites[index]
    noise = _score_noise(exact, rounded), _similarity_noise(exact, rounded)
    # Where scores are NaN or infinite, rounding explains nothing.
    usable = [n if math.isfinite(n) else 0.0 for n in noise]
    mine, theirs = list(_rows(base.choice)), list(_rows(engine))
    flips: list[Flip] = []
    for row, pair in enumerate(zip(mine, theirs, strict=True)):
        if not all(map(np.array_equal, *pair)):
            protected = site.tokens_in - schedule.protect_tail
            flips += find_flips(index, row, *pair, _row_scores(exact, row, protected, *usable))
    same = [_same(*pair) for pair in zip(mine, theirs, strict=True)]
    return SiteAgreement(
        site=index,
        layer=site.layer,
        tokens_in=site.tokens_in,
        removed=site.removed,
        real_removed=int((engine.src.numpy() >= base.pads[:, None]).sum()),
        same_source=float(np.mean([row[0] for row in same])),
        same_target=float(np.mean([row[1] for row in same])),
        same_merge=float(np.mean([row[2] for row in same])),
        flips=tuple(flips),
        importance_noise=noise[0] if math.isfinite(noise[0]) else None,
        similarity_noise=noise[1] if math.isfinite(noise[1]) else None,
    )


def _rows(choice: Choice) -> Iterator[RowChoice]:
    return map(RowChoice, *(tensor.numpy() for tensor in choice))


def _row_scores(
    view: SiteView, row: int, protected: int, score_noise: float, similarity_noise: float
) -> RowScores:
    return RowScores(
        pads=int(view.pads[row]),
        protected=protected,
        score=None if view.score is None else view.score[row].astype(np.float64),
        lower=None if view.lower is None else view.lower[row],
        unit=None if view.unit is None else view.unit[row].double().numpy(),
        score_noise=score_noise,
        similarity_noise=similarity_noise,
    )


def _same(mine: RowChoice, theirs: RowChoice) -> tuple[float, float, float]:
    """Jaccard of the sources, and of the common ones the shares with equal target and side."""
    common, i, j = np.intersect1d(mine.src, theirs.src, assume_unique=True, return_indices=True)
    if not common.size:
        return jaccard(mine.src.tolist(), theirs.src.tolist()), 1.0, 1.0
    return (
        jaccard(mine.src.tolist(), theirs.src.tolist()),
        float((mine.dst[i] == theirs.dst[j]).mean()),
        float((mine.merge[i] == theirs.merge[j]).mean()),
    )


def _score_noise(exact: SiteView, rounded: SiteView) -> float:
    """Largest difference of the split's scores, over prompt tokens; 0 for a method without."""
    if exact.score is None:
        return 0.0
    real = np.arange(exact.score.shape[1]) >= exact.pads[:, None]
    difference = np.abs(exact.score.astype(np.float64) - rounded.score)
    return float(difference[real].max(initial=0.0))


def _similarity_noise(exact: SiteView, rounded: SiteView) -> float:
    """Largest difference of a similarity between the halves, over prompt tokens.

    The less exact similarities are products in their own precision, as the model takes them.
    """
    if exact.unit is None:
        return 0.0
    largest = 0.0
    for row, pads in enumerate(exact.pads):
        lower, upper = np.flatnonzero(exact.lower[row]), np.flatnonzero(~exact.lower[row])
        lower = lower[lower >= pads]
        if lower.size:
            unit = exact.unit[row].double()
            difference = unit[lower] @ unit[upper].T
            difference -= rounded.unit[row, lower] @ rounded.unit[row, upper].T
            largest = max(largest, float(difference.abs().max()))
    return largest
