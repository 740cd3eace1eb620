"""What is measured, as stored in ``reports/*.json``: numbers only, no verdicts.

A stored record can be judged again with other tolerances (:mod:`tokred_export.verify.judge`),
and the report pages are renderings of these records that compute nothing themselves.
"""

from __future__ import annotations

import msgspec

from tokred_export.specs import ReductionSchedule, Spec

# What a record's backend ends with where no engine was run.
ITSELF = "the ONNX file itself"


class Comparison(Spec, kw_only=True):
    """One tensor of a candidate against the same tensor of the baseline."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    rel_l2: float  # |candidate - baseline|_2 / |baseline|_2
    cosine: float
    nonfinite: int  # NaN or infinite values in either; the measures leave them out
    noise_rel_l2: float  # the same measure for the baseline's own rounding noise


class LogitsComparison(Spec, kw_only=True):
    """What the errors in the logits mean for a reader of probabilities."""

    kl: float | None  # mean KL(baseline || candidate) over finite rows, nats; None: no such row
    top1_agreement: float  # share of rows
    top5_agreement: float  # mean share of the baseline's top 5 found in the candidate's


class Flip(Spec, kw_only=True):
    """One token on whose fate the free choices differ, and by how little."""

    site: int
    row: int
    position: int
    what: str  # "removed", "kept", "target" or "merge"
    # How far scores must move for it, in multiples of their rounding noise at this site; None:
    # no rounding of scores leads there.
    margin: float | None


class SiteAgreement(Spec, kw_only=True):
    """Free choices of eager against the engine's at one site, both seeing the same tokens."""

    site: int
    layer: int
    tokens_in: int
    removed: int
    real_removed: int  # prompt tokens among them, over all rows
    same_source: float  # Jaccard of removed positions, mean over rows
    same_target: float  # share of common sources with the same target
    same_merge: float  # share of common sources on the same side of the prune/merge boundary
    # Largest rounding difference of importances of prompt tokens, and of similarities between the
    # two halves; None where some are NaN or infinite.
    importance_noise: float | None = 0.0
    similarity_noise: float | None = 0.0
    flips: tuple[Flip, ...] = ()


class ParityCase(Spec, kw_only=True):
    """One batch of prompts through one component."""

    component: str  # "prefill-2048"
    description: str
    prompt_lengths: tuple[int, ...]
    # Outputs that are missing or misshapen and choices that nobody can replay: name -> what is
    # wrong. They are not compared below; after a problem with a choice nothing is.
    problems: dict[str, str] = msgspec.field(default_factory=dict)
    # Logits, kept positions, then states, on the replay of the engine's choices.
    tensors: tuple[Comparison, ...]
    logits: LogitsComparison | None
    kept_exact: bool  # kept positions of the free eager run equal the engine's
    kept_jaccard: float
    sites: tuple[SiteAgreement, ...]


class Environment(Spec, kw_only=True):
    """Where a measurement was taken."""

    platform: str
    processor: str
    cores: int
    python: str
    packages: dict[str, str]
    gpu: str | None = None
    driver: str | None = None


class ParityRecord(Spec, kw_only=True):
    """All parity cases of a bundle's engine against eager PyTorch."""

    backend: str
    baseline: str  # "eager float32 CPU"
    noise: str  # what noise_rel_l2 compares
    cases: tuple[ParityCase, ...]
    environment: Environment
    command: str


class Latency(Spec, kw_only=True):
    """Samples of one thing timed, in milliseconds, in the order taken."""

    name: str  # "eager chunk 64", "transformers", "engine dense", "engine reduced"
    samples_ms: tuple[float, ...]
    median_ms: float
    p95_ms: float
    drift: float  # |median of the last half / median of the first half - 1|


class SpeedRecord(Spec, kw_only=True):
    """Latencies of one component, taken interleaved in one run."""

    component: str
    backend: str
    batch: int
    schedule: ReductionSchedule
    threads: int
    timed: str  # what is inside the timed region
    baselines: tuple[Latency, ...]  # every candidate for the fastest honest dense eager
    baseline: str  # the name of the fastest of them
    # Candidates that could not run, and why.
    left_out: dict[str, str] = msgspec.field(default_factory=dict)
    engine_dense: Latency
    engine_reduced: Latency
    engine_gain: float  # baseline / engine dense
    reduction_gain: float  # engine dense / engine reduced
    speedup: float  # baseline / engine reduced
    samples_asked: int | None = None  # more than were taken where time was short
    remeasured: bool = False  # drifted by more than 5 % the first time
    inconclusive: bool  # and again the second time
    environment: Environment
    command: str
