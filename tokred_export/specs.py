"""The values that travel along the line: frozen, checked when made, written as JSON.

Letters: B batch, L tokens, D d_model, E d_inner, H heads, P head dim, N d_state, G groups,
K conv width, Q chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["float32", "float16", "bfloat16"]
Logits = Literal["last", "all"]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every spec: immutable and strict about unknown keys; subclasses add kw_only."""


class ModelSpec(Spec, kw_only=True):
    """A Mamba-2 language model's sizes and conventions, whatever layout its weights came in.

    Raises:
        ValueError: sizes that contradict each other (msgspec reports it as a ValidationError
            when the spec is decoded from a file).
    """

    layout: Literal["mamba_ssm", "transformers"]
    vocab_size: int  # V: rows of the embedding and of the logits, padding rows included
    d_model: int
    n_layer: int
    d_inner: int
    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int = 1
    d_conv: int = 4
    chunk_size: int = 256
    # E / G: each group is normalised by itself. transformers before 5.23 took all of E at once.
    norm_group_size: int
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    conv_bias: bool = True
    proj_bias: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None  # None: no upper clamp (JSON has no infinity)

    @property
    def conv_dim(self) -> int:
        """Channels C of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def in_proj_dim(self) -> int:
        """Columns of the input projection: gate z, then the conv channels, then dt."""
        return self.d_inner + self.conv_dim + self.n_heads

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "d_model", "n_layer", "d_inner", "n_heads", "head_dim",
            "d_state", "n_groups", "d_conv", "chunk_size", "norm_group_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_heads * self.head_dim != self.d_inner:
            raise ValueError(
                f"n_heads {self.n_heads} x head_dim {self.head_dim} is not d_inner {self.d_inner}"
            )
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups {self.n_groups} does not divide n_heads {self.n_heads}")
        if self.d_inner % self.norm_group_size:
            raise ValueError(
                f"norm_group_size {self.norm_group_size} does not divide d_inner {self.d_inner}"
            )


class ReductionSpec(Spec, kw_only=True):
    """What the user asks of token reduction, before it is solved for a length.

    ``target`` is the share of prefill FLOPs to save, 0 to below 1. ``flops`` says by which
    count: "full" counts projections, conv, scan and the reduction itself; "paper" is the mean
    over layers of the share of tokens entering them (UTRC's own log line).
    ``keep_ratio`` bypasses the solver: every site keeps ceil(tokens * keep_ratio).
    """

    method: str = "utrc"
    target: float = 0.2
    flops: Literal["full", "paper"] = "full"
    keep_ratio: float | None = None
    sites: tuple[int, ...] | None = None  # 0-based layer indices; None: the default sites
    prune_permille: int = 500  # q of the hybrid, in thousandths: the most similar links prune
    protect_tail: int = 1  # the last tokens of the prompt, never removed
    round_to: int = 1  # kept counts are rounded to the nearest multiple of this


class Site(Spec, kw_only=True):
    """One reduction site: after layer ``layer`` (0-based), ``tokens_in`` become ``tokens_out``."""

    layer: int
    tokens_in: int
    tokens_out: int

    @property
    def removed(self) -> int:
        """r: how many tokens this site takes away."""
        return self.tokens_in - self.tokens_out


class ReductionSchedule(Spec, kw_only=True):
    """A solved schedule for one length: pure integers, nothing left to decide at run time.

    An empty ``sites`` is the dense model by construction.
    """

    method: str
    length: int
    sites: tuple[Site, ...] = ()
    prune_permille: int = 500
    protect_tail: int = 1

    @property
    def length_out(self) -> int:
        """Tokens that leave the last site."""
        return self.sites[-1].tokens_out if self.sites else self.length

    def site_after(self, layer: int) -> Site | None:
        """The site that follows ``layer``, if any."""
        return next((site for site in self.sites if site.layer == layer), None)

    def tokens_entering(self, n_layer: int) -> tuple[int, ...]:
        """Tokens entering each of ``n_layer`` layers."""
        counts, now = [], self.length
        for layer in range(n_layer):
            counts.append(now)
            site = self.site_after(layer)
            now = site.tokens_out if site else now
        return tuple(counts)


Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


class BuildSpec(Spec, kw_only=True):
    """Everything a build is asked for; two equal specs on equal weights give equal bundles.

    ``dtype`` None means float32 where ONNX Runtime is among the backends, else float16.
    """

    model: str | None = None  # a folder or hub id; None is the model that ships with the package
    revision: str | None = None
    seq_lens: tuple[int, ...] = (2048,)
    reduction: ReductionSpec = ReductionSpec()
    max_batch: int = 1
    dtype: Dtype | None = None
    logits: Logits = "last"
    backends: tuple[Backend, ...] = ("onnxruntime",)
    device: Literal["cpu", "cuda"] = "cpu"  # of onnxruntime
    # Chunk of the exported scan, whatever chunk the checkpoint was trained with: in function
    # bodies on a CPU, 64 and 128 took about the same time at 130m and 32 took more; compare with
    # tools/bench_cpu.py --chunk-size.
    chunk_size: int = 64
    # TensorRT's builder optimisation level, 0 to 5; None for its default.
    opt_level: int | None = None

    @property
    def tensor_dtype(self) -> Dtype:
        """The dtype of weights and activations."""
        if self.dtype is not None:
            return self.dtype
        return "float32" if "onnxruntime" in self.backends else "float16"
