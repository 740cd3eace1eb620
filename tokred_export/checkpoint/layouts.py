"""The two public layouts of Mamba-2 checkpoints: config -> ModelSpec -> expected tensors.

Sources: state-spaces/mamba 2.3.2 (``models/config_mamba.py``, ``models/mixer_seq_simple.py``,
``modules/mamba2.py``) and transformers 5.23 (``models/mamba2``). Defaults below are theirs.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from tokred_export.errors import CheckpointError
from tokred_export.specs import ModelSpec

Size = Annotated[int, msgspec.Meta(ge=1)]
# Every tensor of every layer is named before weights are looked at: a slip of the keyboard must not
# take all memory.
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Limit = float | str | dict[str, str]

KNOWN = (
    "known are transformers' Mamba2ForCausalLM (model_type mamba2) "
    "and mamba_ssm's Mamba2 (d_model, n_layer and ssm_cfg)"
)


class _TransformersConfig(msgspec.Struct):
    """``Mamba2Config``; what is not read here does not change the model's output.

    Published configs also carry ``norm_before_gate`` and ``rms_norm``: transformers reads neither.
    """

    architectures: list[str] | None = None
    vocab_size: Size = 32768
    hidden_size: Size = 4096
    num_hidden_layers: Layers = 64
    num_heads: Size = 128
    head_dim: Size = 64
    state_size: Size = 128
    expand: float = 2
    conv_kernel: Size = 4
    n_groups: Size = 8
    chunk_size: Size = 256
    hidden_act: str = "silu"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = False
    time_step_limit: tuple[Limit, Limit] = (0.0, math.inf)


class _MambaSsmConfig(msgspec.Struct):
    """``MambaConfig``."""

    d_model: Size
    n_layer: Layers
    d_intermediate: int | list[int] = 0
    vocab_size: Size = 50277
    ssm_cfg: dict[str, Any] | None = None
    attn_layer_idx: list[int] | None = None
    rms_norm: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: Size = 8
    tie_embeddings: bool = True


class _SsmConfig(msgspec.Struct, forbid_unknown_fields=True):
    """``ssm_cfg``: the arguments of ``mamba_ssm.modules.mamba2.Mamba2``.

    Unknown ones are refused, since each could change the model; the last block only sets
    initial weights or picks kernels, and is accepted and not used.
    """

    layer: str
    d_state: Size = 128
    d_conv: Size = 4
    expand: Size = 2
    headdim: Size = 64
    d_ssm: int | None = None
    ngroups: Size = 1
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_limit: tuple[Limit, Limit] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    chunk_size: Size = 256
    process_group: object = None

    conv_init: object = None
    A_init_range: object = None
    dt_min: object = None
    dt_max: object = None
    dt_init_floor: object = None
    use_mem_eff_path: object = None
    sequence_parallel: object = None
    layer_idx: object = None


class Expected(NamedTuple):
    """One tensor that a spec asks for: our name, and its shape in the file."""

    name: str
    shape: tuple[int, ...]


def model_spec(config: dict[str, Any], path: Path) -> ModelSpec:
    """Read a ``config.json`` of either layout.

    Args:
        config: the parsed file.
        path: where it came from, for messages.

    Raises:
        CheckpointError: an unknown architecture, an unsupported feature, a value of the wrong
            type, or sizes that contradict each other.
    """
    kind = config.get("model_type")
    try:
        if kind == "mamba2":
            return _transformers_spec(msgspec.convert(config, _TransformersConfig))
        # mamba_ssm writes no model_type; a config that has one is of something else.
        if kind in (None, "mamba_ssm") and config.keys() >= {"d_model", "n_layer"}:
            return _mamba_ssm_spec(msgspec.convert(config, _MambaSsmConfig))
    except (ValueError, CheckpointError) as error:  # ValidationError and ModelSpec's own
        raise CheckpointError(f"{path}: {error}") from error
    names = [config[key] for key in ("model_type", "architectures") if config.get(key)]
    found = f"architecture {' '.join(map(str, names))}" if names else "no known architecture"
    raise CheckpointError(f"{path}: {found}, expected a Mamba-2 language model; {KNOWN}")


def _transformers_spec(config: _TransformersConfig) -> ModelSpec:
    if config.architectures and "Mamba2ForCausalLM" not in config.architectures:
        raise CheckpointError(
            f"architectures is {', '.join(config.architectures)}, expected Mamba2ForCausalLM: "
            "save the model with its language-model head"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act is {config.hidden_act}, only silu is supported")
    d_inner = int(config.expand * config.hidden_size)
    dt_min, dt_max = _dt_limits("time_step_limit", config.time_step_limit)
    spec = ModelSpec(
        layout="transformers",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layer=config.num_hidden_layers,
        d_inner=d_inner,
        n_heads=config.num_heads,
        head_dim=config.head_dim,
        d_state=config.state_size,
        n_groups=config.n_groups,
        d_conv=config.conv_kernel,
        chunk_size=config.chunk_size,
        norm_group_size=max(1, d_inner // config.n_groups),
        norm_eps=config.layer_norm_epsilon,
        residual_in_fp32=config.residual_in_fp32,
        tie_embeddings=config.tie_word_embeddings,
        conv_bias=config.use_conv_bias,
        proj_bias=config.use_bias,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    if spec.n_groups > 1:
        warnings.warn(
            f"n_groups is {spec.n_groups}: the gated norm works on groups of "
            f"{spec.norm_group_size} channels here, as in mamba_ssm and in transformers 5.23; "
            f"earlier transformers normalise all {d_inner} at once and give other logits "
            "(huggingface/transformers#35943)",
            stacklevel=4,  # whoever called load_checkpoint
        )
    return spec


def _mamba_ssm_spec(config: _MambaSsmConfig) -> ModelSpec:
    layer = (config.ssm_cfg or {}).get("layer", "Mamba1")
    if layer != "Mamba2":
        raise CheckpointError(
            f"ssm_cfg.layer is {layer} (mamba_ssm takes Mamba1 where the key is missing), "
            f"expected Mamba2; {KNOWN}"
        )
    ssm = msgspec.convert(config.ssm_cfg, _SsmConfig)
    d_inner = ssm.expand * config.d_model
    for is_so, what in _unsupported(config, ssm, d_inner):
        if is_so:
            raise CheckpointError(f"{what}; convert or choose a checkpoint without it")
    dt_min, dt_max = _dt_limits("ssm_cfg.dt_limit", ssm.dt_limit)
    multiple = config.pad_vocab_size_multiple
    return ModelSpec(
        layout="mamba_ssm",
        vocab_size=-(-config.vocab_size // multiple) * multiple,
        d_model=config.d_model,
        n_layer=config.n_layer,
        d_inner=d_inner,
        n_heads=max(1, d_inner // ssm.headdim),
        head_dim=ssm.headdim,
        d_state=ssm.d_state,
        n_groups=ssm.ngroups,
        d_conv=ssm.d_conv,
        chunk_size=ssm.chunk_size,
        norm_group_size=max(1, d_inner // ssm.ngroups),
        norm_before_gate=ssm.norm_before_gate,
        residual_in_fp32=config.residual_in_fp32,
        tie_embeddings=config.tie_embeddings,
        conv_bias=ssm.conv_bias,
        proj_bias=ssm.bias,
        dt_min=dt_min,
        dt_max=dt_max,
    )


def _unsupported(
    config: _MambaSsmConfig, ssm: _SsmConfig, d_inner: int
) -> tuple[tuple[bool, str], ...]:
    """What mamba_ssm can build and we cannot: (is it asked for, what to say)."""
    attention, mlp = config.attn_layer_idx or [], config.d_intermediate
    return (
        (bool(attention), f"layers {attention} are attention, only Mamba-2 layers are supported"),
        (
            mlp != 0 and mlp != [0] * config.n_layer,
            f"d_intermediate is {mlp}: MLP blocks between the layers are not supported",
        ),
        (not config.rms_norm, "rms_norm is false: LayerNorm before the layers is not supported"),
        (not ssm.rmsnorm, "ssm_cfg.rmsnorm is false: a mixer without gated norm is not supported"),
        (ssm.D_has_hdim, "ssm_cfg.D_has_hdim is true: only one D per head is supported"),
        (
            ssm.d_ssm not in (None, d_inner),
            f"ssm_cfg.d_ssm is {ssm.d_ssm} of d_inner {d_inner}: a partial SSM is not supported",
        ),
        (
            ssm.process_group is not None,
            "ssm_cfg.process_group is set: weights split over processes are not supported",
        ),
    )


def _dt_limits(key: str, limits: tuple[Limit, Limit]) -> tuple[float, float | None]:
    """(dt_min, dt_max) of a clamp; transformers 5 writes infinity as {"__float__": "Infinity"}."""
    try:
        low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in limits)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{key} is {list(limits)}, expected two numbers") from error
    if low == math.inf or not max(low, 0.0) <= high:  # a NaN fails the second
        raise CheckpointError(f"{key} is {list(limits)}, expected 0 <= low <= high")
    # softplus is never negative, so a lower limit below zero does not act.
    return max(low, 0.0), None if high == math.inf else high


def expected_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """Every tensor of a checkpoint by its name in the file, ``lm_head.weight`` always included.

    Both layouts name and shape all but the embedding alike. Shapes are the file's: the
    convolution's weight is [C, 1, K] there.
    """
    plural = "s" if spec.layout == "transformers" else ""
    table = (spec.vocab_size, spec.d_model)
    expected = {f"backbone.embedding{plural}.weight": Expected("embedding.weight", table)}
    for i in range(spec.n_layer):
        for theirs, (ours, shape) in _layer_tensors(spec).items():
            expected[f"backbone.layers.{i}.{theirs}"] = Expected(f"layers.{i}.{ours}", shape)
    expected["backbone.norm_f.weight"] = Expected("norm_f_weight", (spec.d_model,))
    expected["lm_head.weight"] = Expected("lm_head.weight", table)
    return expected


def _layer_tensors(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    d, e, z = spec.d_model, spec.d_inner, spec.in_proj_dim
    tensors = {
        "norm.weight": ("norm_weight", (d,)),
        "mixer.in_proj.weight": ("in_proj.weight", (z, d)),
        "mixer.conv1d.weight": ("conv_weight", (spec.conv_dim, 1, spec.d_conv)),
        "mixer.dt_bias": ("dt_bias", (spec.n_heads,)),
        "mixer.A_log": ("a_log", (spec.n_heads,)),
        "mixer.D": ("d", (spec.n_heads,)),
        "mixer.norm.weight": ("gate_norm_weight", (e,)),
        "mixer.out_proj.weight": ("out_proj.weight", (d, e)),
    }
    if spec.conv_bias:
        tensors["mixer.conv1d.bias"] = ("conv_bias", (spec.conv_dim,))
    if spec.proj_bias:
        tensors["mixer.in_proj.bias"] = ("in_proj.bias", (z,))
        tensors["mixer.out_proj.bias"] = ("out_proj.bias", (d,))
    return tensors
