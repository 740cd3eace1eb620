"""Writers of small random checkpoints in both public layouts, for any test that needs a model.

    from checkpoints import MAMBA_SSM, TRANSFORMERS, write_mamba_ssm, write_transformers

    model = write_transformers(tmp_path, **TRANSFORMERS["groups"])   # transformers' own model
    state = write_mamba_ssm(tmp_path, **MAMBA_SSM["untied"])         # the state dict, their names

The weights are random but not arbitrary: projections keep the scale of what they are given, dt
spans about 0.0005 to 2, decays exp(dt A) span almost 1 to almost 0, and norms, D and biases are
neither 0 nor 1. So a test sees every branch of the arithmetic, and no term can go missing
unnoticed because it happened to be zero. The same seed gives the same weights.

``edit_config`` and ``edit_weights`` make other or broken checkpoints of them, and ``refusal``
is the sentence that loading such a one must end in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokred_export.checkpoint import load_checkpoint
from tokred_export.errors import CheckpointError, TokredError

if TYPE_CHECKING:
    from transformers import Mamba2ForCausalLM

# Sizes are pairwise different wherever a mix-up of two would otherwise go unnoticed.
TRANSFORMERS_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "expand": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 12,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 8,
    "tie_word_embeddings": False,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "groups": {"n_groups": 2},
    "group-per-head": {"n_groups": 4},
    "biases": {"use_bias": True},
    "no-conv-bias": {"use_conv_bias": False},
    "small-heads": {"num_heads": 8, "head_dim": 8},
    "wide-conv": {"conv_kernel": 7},
    "dt-limits": {"time_step_limit": (0.01, 0.2)},
    "residual-16bit": {"residual_in_fp32": False},
    "eight-layers": {"num_hidden_layers": 8},
}

MAMBA_SSM_BASE: dict[str, Any] = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 12, "headdim": 16, "chunk_size": 8},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# An ``ssm_cfg`` here or in a call is laid over the base's, key by key.
MAMBA_SSM: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "groups": {"ssm_cfg": {"ngroups": 2}},
    "norm-before-gate": {"ssm_cfg": {"norm_before_gate": True}},
    "groups-norm-before-gate": {"ssm_cfg": {"ngroups": 4, "norm_before_gate": True}},
    "biases": {"ssm_cfg": {"bias": True}},
    "no-conv-bias": {"ssm_cfg": {"conv_bias": False}},
    "dt-limits": {"ssm_cfg": {"dt_limit": [0.01, 0.2]}},
    "eight-layers": {"n_layer": 8},
}


def write_transformers(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    **overrides: Any,
) -> Mamba2ForCausalLM:
    """Write a random checkpoint as transformers itself does.

    Args:
        folder: where to; made if need be.
        seed: of the random weights.
        dtype: of the weights in the file.
        max_shard_size: small ("20KB") for several shards and an index.
        overrides: of ``TRANSFORMERS_BASE``, by the names of ``Mamba2Config``.

    Returns:
        The model that was saved, in eval mode.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**{**TRANSFORMERS_BASE, **overrides})
    model = Mamba2ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # a tied head comes once
        parameter.copy_(random_weight(name, tuple(parameter.shape), generator))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_mamba_ssm(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    weights: Literal["bin", "safetensors"] = "bin",
    **overrides: Any,
) -> dict[str, torch.Tensor]:
    """Write a random checkpoint in mamba_ssm's layout: config.json and one weight file.

    Args:
        folder: where to; made if need be.
        seed: of the random weights.
        dtype: of the weights in the file; D stays float32, as mamba_ssm makes it.
        weights: "bin" is what mamba_ssm's ``save_pretrained`` writes (with a tied head in it),
            "safetensors" what converters make of it (without).
        overrides: of ``MAMBA_SSM_BASE``.

    Returns:
        The tensors that were saved, by mamba_ssm's names, a tied head included.
    """
    config = {**MAMBA_SSM_BASE, **overrides}
    config["ssm_cfg"] = {**MAMBA_SSM_BASE["ssm_cfg"], **(overrides.get("ssm_cfg") or {})}
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: random_weight(name, shape, generator).to(
            torch.float32 if name.endswith(".D") else dtype
        )
        for name, shape in mamba_ssm_shapes(config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    if weights == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config["tie_embeddings"]:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    if weights == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    return state


def mamba_ssm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``MambaLMHeadModel``'s parameters, written from its source."""
    ssm = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1}
    ssm |= config["ssm_cfg"]
    d_model, multiple = config["d_model"], config["pad_vocab_size_multiple"]
    d_inner = ssm["expand"] * d_model
    heads = d_inner // ssm["headdim"]
    conv = d_inner + 2 * ssm["ngroups"] * ssm["d_state"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (rows, d_model)}
    for i in range(config["n_layer"]):
        mixer = f"backbone.layers.{i}.mixer"
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
        for name in ("dt_bias", "A_log", "D"):
            shapes[f"{mixer}.{name}"] = (heads,)
        shapes[f"{mixer}.in_proj.weight"] = (d_inner + conv + heads, d_model)
        shapes[f"{mixer}.conv1d.weight"] = (conv, 1, ssm["d_conv"])
        shapes[f"{mixer}.norm.weight"] = (d_inner,)
        shapes[f"{mixer}.out_proj.weight"] = (d_model, d_inner)
        if ssm.get("conv_bias", True):
            shapes[f"{mixer}.conv1d.bias"] = (conv,)
        if ssm.get("bias", False):
            shapes[f"{mixer}.in_proj.bias"] = (d_inner + conv + heads,)
            shapes[f"{mixer}.out_proj.bias"] = (d_model,)
    shapes["backbone.norm_f.weight"] = (d_model,)
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (rows, d_model)
    return shapes


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A float32 weight that suits the parameter ``name`` ends in, either layout's name."""
    kind = name.rpartition("mixer.")[2]
    normal = torch.randn(shape, generator=generator)
    if kind == "dt_bias":  # softplus(dt_bias) log-uniform over 0.001 to 0.5
        dt = 0.001 * 500 ** torch.rand(shape, generator=generator)
        return torch.log(torch.expm1(dt))
    if kind == "A_log":  # A = -16 to -1, as both libraries start from
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if kind == "D" or name.endswith(("norm.weight", "norm_f.weight")):
        return 1 + 0.3 * normal
    if name.endswith(".bias"):
        return 0.2 * normal
    if "embedding" in name:  # half, so that the logits of a tied head stay moderate
        return 0.5 * normal
    # Projections and the convolution: output variance 1 for input variance 1.
    return normal / math.sqrt(shape[-1])


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrite keys of a checkpoint's config.json, to make it another or a broken one."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``change`` edit the dict of tensors in model.safetensors."""
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    file.unlink()  # whoever still maps the old file keeps it
    save_file(state, file)


def refusal(model: str | Path, kind: type[TokredError] = CheckpointError) -> str:
    """The message of the error that loading ``model`` must raise: one line, ended for a person."""
    with pytest.raises(kind) as caught:
        load_checkpoint(str(model))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600, message
    return message
