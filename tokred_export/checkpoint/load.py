"""A checkpoint, checked and under our own tensor names, and the model made of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import torch

from tokred_export.checkpoint.files import (
    companion_files,
    find_folder,
    name_some,
    read_json,
    read_weights,
)
from tokred_export.checkpoint.layouts import expected_tensors, model_spec
from tokred_export.errors import CheckpointError
from tokred_export.specs import Dtype, Logits, ModelSpec, ReductionSchedule

if TYPE_CHECKING:
    from tokred_plugins.opset import OpSet

    from tokred_export.model import Mamba2

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The decay's parameters: their rounding is raised to the power of the sequence length.
KEPT_FLOAT32 = (".dt_bias", ".a_log", ".d")
PIECE = 1 << 24  # elements looked at in one go, so that a check needs little memory


DEMO_SOURCE = "demo"  # what a bundle calls the model that ships with the package


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A Mamba-2 checkpoint that passed every check.

    ``tensors`` are memory-mapped, in the checkpoint's own dtypes, under the names of
    ``model.Mamba2``'s state dict; ``conv_weight`` is [C, K]; a tied head is not among them.
    """

    spec: ModelSpec
    tensors: dict[str, torch.Tensor]
    source: str  # the folder, or the hub id
    revision: str | None  # the hub commit
    files: dict[str, str]  # config and tokenizer files to copy verbatim: name -> path
    weights_sha256: str  # of the tensors' content, whatever files it came in


def read_spec(model: str | None, revision: str | None = None) -> ModelSpec:
    """The sizes of a checkpoint, from its config alone.

    Args:
        model, revision: as for :func:`load_checkpoint`.

    Raises:
        InvalidRequest, CheckpointError, EnvironmentUnable: as :func:`load_checkpoint`, except
            for what is wrong with weights.
    """
    folder, _ = find_folder(model, revision, weights=False)
    config = folder / "config.json"
    return model_spec(read_json(config), config)


def load_checkpoint(model: str | None, revision: str | None = None) -> Checkpoint:
    """Load a checkpoint in mamba_ssm's or transformers' layout, and check all of it.

    Args:
        model: a local folder, a hub id (owner/name), or None for the demo model that ships
            with the package.
        revision: branch, tag or commit of a hub id.

    Raises:
        InvalidRequest: ``model`` is neither a folder nor a hub id.
        CheckpointError: config or weights are missing, damaged, inconsistent, not finite, or
            of an architecture other than Mamba-2.
        EnvironmentUnable: the hub cannot be reached, or no demo model is installed.

    Warns:
        UserWarning: the layout is known to mean different models to different libraries.
    """
    folder, commit = find_folder(model, revision)
    config = folder / "config.json"
    spec = model_spec(read_json(config), config)
    tensors = _load_tensors(folder, spec)
    return Checkpoint(
        spec=spec,
        tensors=tensors,
        source=DEMO_SOURCE if model is None else str(folder) if commit is None else model,
        revision=commit,
        files=companion_files(folder),
        weights_sha256=content_hash(tensors),
    )


def _load_tensors(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Map, check and rename every tensor of ``folder``, one at a time."""
    expected, tensors, unknown = expected_tensors(spec), {}, []
    for name, tensor in read_weights(folder):
        # Old transformers wrote mamba_ssm's spelling, and still reads it.
        if spec.layout == "transformers" and name == "backbone.embedding.weight":
            name = "backbone.embeddings.weight"
        if name not in expected:
            unknown.append(name)
            continue
        ours, shape = expected[name]
        if ours in tensors:
            raise CheckpointError(f"{folder} holds {name} twice, expected one: remove a shard")
        _check(name, tensor, shape)
        tensors[ours] = tensor.squeeze(1) if ours.endswith(".conv_weight") else tensor
    missing = [theirs for theirs, (ours, _) in expected.items() if ours not in tensors]
    if spec.tie_embeddings and missing == ["lm_head.weight"]:
        missing = []
    if missing:
        rest = f"; {len(unknown)} have unknown names ({name_some(unknown)})" if unknown else ""
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors ({name_some(missing)})"
            f"{rest}: expected those that config.json describes, save the model again"
        )
    if unknown:
        raise CheckpointError(
            f"{folder} holds {len(unknown)} tensors that config.json does not describe "
            f"({name_some(unknown)}): the config and the weights are not of one model"
        )
    if spec.tie_embeddings:
        _drop_tied_head(folder, tensors)
    # In the order of the model, whatever the order of the shards.
    return {ours: tensors[ours] for ours, _ in expected.values() if ours in tensors}


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Shape, dtype and finiteness of one tensor, under its name in the file."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, expected {list(shape)} by config.json: "
            "the config and the weights are not of one model"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{name} is {dtype_name(tensor)}, expected float32, float16 or bfloat16: "
            "save the model in one of these, or give the original of a quantised one"
        )
    if count := _count_not_finite(tensor):
        raise CheckpointError(
            f"{name} holds {count} values that are NaN or infinite (of {tensor.numel()}), "
            "expected finite weights: the checkpoint is damaged or its training diverged"
        )


def _count_not_finite(tensor: torch.Tensor) -> int:
    # A NaN or an infinity shows in the extremes, and these are found thirty times faster than
    # every element is judged (16-bit ones on a CPU above all).
    if torch.stack(torch.aminmax(tensor)).isfinite().all():
        return 0
    pieces = tensor.reshape(-1).split(PIECE)
    return sum(piece.numel() - int(piece.isfinite().sum()) for piece in pieces)


def _drop_tied_head(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors["embedding.weight"]):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embedding, but config.json ties them: "
            "set tie_word_embeddings (transformers) or tie_embeddings (mamba_ssm) to false there "
            "if the head was trained by itself"
        )


def content_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {dtype_name(tensor)} {list(tensor.shape)}\n".encode())
        for piece in tensor.reshape(-1).split(PIECE):
            digest.update(piece.view(torch.uint8).numpy())
    return digest.hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """``bfloat16`` rather than ``torch.bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def build_model(
    checkpoint: Checkpoint,
    schedule: ReductionSchedule | None = None,
    dtype: Dtype | Literal["float64"] = "float32",
    ops: OpSet | None = None,
    logits: Logits = "last",
) -> Mamba2:
    """Make the model of a checkpoint, for inference.

    Args:
        checkpoint: what ``load_checkpoint`` returned; where its dtype is already right, the
            model shares its memory.
        schedule: token reduction; None: the dense model.
        dtype: of every parameter but dt_bias, a_log and d, which stay float32;
            float64 is for verification and takes these along.
        ops: the implementation of the tokred ops; None: the custom ops.
        logits: of the last token or of all.

    Returns:
        ``model.Mamba2`` on the CPU, in eval mode, with no gradients.

    Raises:
        CheckpointError: a weight lies beyond float16's range.
    """
    from tokred_plugins.opset import CUSTOM

    from tokred_export.model import Mamba2

    spec, target = checkpoint.spec, getattr(torch, dtype)
    # On the meta device nothing is allocated or initialised, only to be overwritten.
    with torch.device("meta"):
        model = Mamba2(spec, schedule, ops=CUSTOM if ops is None else ops, logits=logits)
    state = {name: _convert(name, t, target) for name, t in checkpoint.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    if not spec.conv_bias:  # a buffer of zeros then, which is in no checkpoint
        for layer in model.layers:
            layer.conv_bias = torch.zeros(spec.conv_dim, dtype=target)
    return model.eval().requires_grad_(False)


def _convert(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.float64 and name.endswith(KEPT_FLOAT32):
        dtype = torch.float32
    converted = tensor.to(dtype)
    # What was float16 before was found finite when it was loaded.
    narrowed = dtype == torch.float16 != tensor.dtype
    if narrowed and (count := _count_not_finite(converted)):
        raise CheckpointError(
            f"{name} holds {count} values beyond float16's range (65504): "
            "build with bfloat16 or float32"
        )
    return converted
