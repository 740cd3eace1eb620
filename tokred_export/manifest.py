"""The content of `export.json`: frozen structs, checked when made, and makers of their parts."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib import metadata
from typing import Literal

import msgspec

from tokred_export import __version__
from tokred_export.disk import FileRecord
from tokred_export.specs import Dtype, Logits, ModelSpec, ReductionSchedule, ReductionSpec, Spec

SCHEMA_VERSION = 1
EXPORT_FORMAT = "tokred-export"

# What a build's result may depend on; recorded in each bundle and part of every cache key.
_LIBRARIES = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "triton", "transformers", "safetensors",
    "tokenizers", "numpy", "msgspec",
)  # fmt: skip


class ComponentMetadata(Spec, kw_only=True):
    """What one graph of the bundle computes, and for which sizes.

    With ``dynamic_batch`` any batch from 1 to ``max_batch`` may be fed, else exactly
    ``max_batch`` rows. ``sites`` are 0-based layer indices.
    """

    phase: Literal["prefill", "decode", "extend"]
    seq_len: int | None = None  # L; None for a graph that takes one token
    length_out: int | None = None  # L_out: tokens that leave the last reduction site
    max_batch: int = 1
    dynamic_batch: bool = False
    dtype: Dtype = "float32"
    logits: Logits = "last"
    chunk_size: int = 64  # Q of the exported scan
    opset: int
    sites: tuple[int, ...] = ()


class Component(Spec, kw_only=True):
    """One graph: its ONNX file, relative to the bundle, and what it computes."""

    file: str
    metadata: ComponentMetadata


class ChoiceNames(Spec, kw_only=True):
    """Names of the three outputs that say what one reduction site chose."""

    src: str
    dst: str
    merge: str


class ComponentIO(Spec, kw_only=True):
    """The graph's tensor names by meaning, so that nobody has to parse a name.

    Tuples run over layers (states) and sites (choices). A name that the graph lacks is None.
    """

    input_ids: str | None = None
    prompt_len: str | None = None
    token: str | None = None
    conv_state_inputs: tuple[str, ...] = ()
    ssm_state_inputs: tuple[str, ...] = ()
    logits: str = "logits"
    kept_positions: str | None = None
    choices: tuple[ChoiceNames, ...] = ()
    conv_states: tuple[str, ...] = ()
    ssm_states: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input name, in the order of the graph."""
        named = (self.input_ids, self.prompt_len, self.token)
        return (
            *(name for name in named if name is not None),
            *self.conv_state_inputs,
            *self.ssm_state_inputs,
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output name; the graph may order them otherwise."""
        kept = () if self.kept_positions is None else (self.kept_positions,)
        choices = (name for site in self.choices for name in (site.src, site.dst, site.merge))
        return (self.logits, *kept, *choices, *self.conv_states, *self.ssm_states)


class BundleSpec(Spec, kw_only=True):
    """What was asked for and what it was solved to; ``schedules`` is keyed by length L."""

    model: ModelSpec
    reduction: ReductionSpec
    schedules: dict[int, ReductionSchedule]


class Provenance(Spec, kw_only=True):
    """Where the bundle comes from; ``command`` is the command line that makes it again."""

    model_source: str
    revision: str | None = None
    weights_sha256: str
    tool_version: str
    libraries: dict[str, str]
    command: str
    created: str  # UTC, ISO 8601


class Manifest(Spec, kw_only=True):
    """The content of ``export.json``."""

    schema_version: int = SCHEMA_VERSION
    export_format: str = EXPORT_FORMAT
    components: dict[str, Component]
    spec: BundleSpec
    io: dict[str, ComponentIO]
    provenance: Provenance
    files: dict[str, FileRecord] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.components:
            raise ValueError("there are no components")
        if self.components.keys() != self.io.keys():
            raise ValueError(
                f"io describes {sorted(self.io)}, but the components are {sorted(self.components)}"
            )
        for name, component in self.components.items():
            io, sites = self.io[name], component.metadata.sites
            if len(io.choices) != len(sites):
                raise ValueError(f"{name} has {len(sites)} sites, but io {len(io.choices)} choices")
            layers = self.spec.model.n_layer
            if (len(io.conv_states), len(io.ssm_states)) != (layers, layers):
                raise ValueError(f"io of {name} must name one state for each of {layers} layers")
            needed = (component.metadata.seq_len, io.input_ids, io.prompt_len, io.kept_positions)
            if component.metadata.phase != "prefill":
                continue
            if None in needed:
                raise ValueError(f"prefill {name} lacks seq_len or a name in its I/O map")
            schedule = self.spec.schedules.get(component.metadata.seq_len)
            if schedule is None or tuple(site.layer for site in schedule.sites) != sites:
                raise ValueError(f"the spec has no schedule that fits prefill {name}")


def describe_reduction(reduction: ReductionSpec) -> str:
    """What was asked for, as a person would say it: ``utrc 20%``."""
    if reduction.method == "none":
        return "none"
    if reduction.keep_ratio is not None:
        return f"{reduction.method}, every site keeps {reduction.keep_ratio:g}"
    return f"{reduction.method} {100 * reduction.target:g}%"


def prefill_io(n_layer: int, n_sites: int) -> ComponentIO:
    """The names that every prefill graph of this tool uses."""
    return ComponentIO(
        input_ids="input_ids",
        prompt_len="prompt_len",
        kept_positions="kept_positions",
        choices=tuple(
            ChoiceNames(src=f"choice.src.{s}", dst=f"choice.dst.{s}", merge=f"choice.merge.{s}")
            for s in range(n_sites)
        ),
        conv_states=tuple(f"present.conv_state.{i}" for i in range(n_layer)),
        ssm_states=tuple(f"present.ssm_state.{i}" for i in range(n_layer)),
    )


def decode_io(n_layer: int) -> ComponentIO:
    """The names that every decode graph of this tool uses."""
    return ComponentIO(
        token="token",
        conv_state_inputs=tuple(f"conv_state.{i}" for i in range(n_layer)),
        ssm_state_inputs=tuple(f"ssm_state.{i}" for i in range(n_layer)),
        conv_states=tuple(f"present.conv_state.{i}" for i in range(n_layer)),
        ssm_states=tuple(f"present.ssm_state.{i}" for i in range(n_layer)),
    )


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a build's result may depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def make_provenance(
    model_source: str, weights_sha256: str, command: str, revision: str | None = None
) -> Provenance:
    """Provenance of a bundle that is being built now, by this version, with these libraries."""
    return Provenance(
        model_source=model_source,
        revision=revision,
        weights_sha256=weights_sha256,
        tool_version=__version__,
        libraries=library_versions(),
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
