"""From a folder or a hub id to the files of a checkpoint, and from weight files to tensors.

Nothing here knows what a tensor means. Weights are memory-mapped, one file at a time, and
come from safetensors or from ``torch.load(weights_only=True)``: no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open

from tokred_export.errors import CheckpointError, EnvironmentUnable, InvalidRequest

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"

# What a bundle carries along, word for word.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")

# All that torch's weights_only unpickler was seen to raise on files with flipped bytes.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError,
    AttributeError, struct.error,
)  # fmt: skip


class _Index(msgspec.Struct):
    """``*.index.json``: which shard holds which tensor."""

    weight_map: dict[str, str]


def find_folder(
    model: str | None, revision: str | None, weights: bool = True
) -> tuple[Path, str | None]:
    """Find a checkpoint's folder, downloading it if ``model`` is a hub id.

    Args:
        model: a local folder, a hub id (owner/name), or None for the demo model.
        revision: branch, tag or commit; hub ids only.
        weights: whether a download fetches them too, or only config and tokenizer.

    Returns:
        The folder, and the hub commit it holds (None for a local folder).

    Raises:
        InvalidRequest: neither a folder nor a hub id, or a revision of a local folder.
        CheckpointError: the hub has no such model or revision.
        EnvironmentUnable: the hub cannot be reached, access is refused, or the disk is full.
    """
    if model is None:
        if not DEMO.is_dir():
            raise EnvironmentUnable(
                f"the demo model is missing from this installation (no folder {DEMO}): "
                "name a checkpoint folder or a hub id"
            )
        model = str(DEMO)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InvalidRequest(
                f"revision {revision} was asked of the local folder {model}: "
                "only hub models have revisions, leave it out"
            )
        return folder.resolve(), None
    if folder.is_file():
        raise InvalidRequest(f"{model} is a file, expected a folder: give {folder.parent}")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise InvalidRequest(
            f"there is no folder {model}, and it is no hub id (owner/name): "
            "give an existing checkpoint folder or a hub id"
        )
    return _download(model, revision, weights)


def _download(repo: str, revision: str | None, weights: bool) -> tuple[Path, str]:
    """Fetch config, tokenizer and weights of a hub model; pickles only without safetensors."""
    try:
        for wanted in (SAFETENSORS, PICKLES) if weights else ((),):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=[*COMPANIONS, *wanted]
                )
            )
            if any((folder / name).exists() for name in wanted[:2]):
                break
    except hub.GatedRepoError as error:
        raise EnvironmentUnable(
            f"access to the hub model {repo} is refused: accept its terms on its page, "
            "then log in with `hf auth login`"
        ) from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise CheckpointError(
            f"{repo} is neither a local folder nor a public hub model: check the spelling, "
            "and for a private model log in with `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub model {repo} has no revision {revision}: give a branch, tag or commit of it"
        ) from error
    # The hub's own name for its HTTP library's base error, which it changed between releases.
    except (OSError, hub.HTTPError) as error:
        raise EnvironmentUnable(
            f"there is no folder {repo}, and it could not be fetched from the hub "
            f"({_first_line(error)}): connect, or download it once and give its folder"
        ) from error
    return folder, folder.name  # a snapshot's folder is named after its commit


def companion_files(folder: Path) -> dict[str, str]:
    """Name -> path of the config and tokenizer files in ``folder``, for verbatim copies."""
    return {name: str(folder / name) for name in COMPANIONS if (folder / name).is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ``Infinity`` is allowed, as both upstream libraries write it.

    Raises:
        CheckpointError: no such file, not readable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: expected a checkpoint folder with one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # both what JSON and what UTF-8 complain with
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}, expected an object: download it again"
        )
    return value


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, safetensors before pickles, single before sharded.

    Raises:
        CheckpointError: there are none, or the index is damaged or names a missing shard.
    """
    for single, index, _ in (SAFETENSORS, PICKLES):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".safetensors", ".bin", ".pt"})
    found = f"only {', '.join(others[:3])}" if others else "none"
    raise CheckpointError(
        f"{folder} has no weights under a known name (found {found}): "
        "expected model.safetensors, pytorch_model.bin, or the .index.json of either"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(msgspec.convert(read_json(index), _Index).weight_map.values()))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{index} is not a weight index: {error}") from error
    if not names:
        raise CheckpointError(f"{index} names no shards: download it again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} shards, and {len(missing)} of them "
            f"({name_some(missing)}) are missing beside it: download them"
        )
    return [index.parent / name for name in names]


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, memory-mapped tensor) from every weight file of a checkpoint.

    Raises:
        CheckpointError: no weights, a damaged file, or a pickle that holds more than tensors.
    """
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            yield from _read_safetensors(file)
        else:
            yield from _read_pickle(file)


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _read_pickle(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (*_UNREADABLE, OSError) as error:
        blocked = re.search(r"GLOBAL:? (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and blocked:
            raise CheckpointError(
                f"{file} would run Python code when loaded ({blocked[1]}), expected only "
                "tensors: nothing of it was run, ask its author for safetensors"
            ) from error
        raise _damaged(file, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{file} holds a {type(state).__name__}, expected a dict of tensors by name"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{file} holds a {type(tensor).__name__} under {name}, expected only tensors: "
                "save the model's state_dict by itself"
            )
        yield name, tensor.detach()


def _damaged(file: Path, error: Exception) -> CheckpointError:
    """The sentence for a weight file that its own library cannot read."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as refused:
        return CheckpointError(f"{file} cannot be read: {refused.strerror}")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{file} is a Git LFS pointer, expected the weights: run `git lfs pull` beside it"
        )
    return CheckpointError(
        f"{file} ({file.stat().st_size} bytes) is damaged or incomplete "
        f"({_first_line(error)}): download it again"
    )


def _first_line(error: Exception) -> str:
    """The first sentence of someone else's error: theirs go on for paragraphs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def name_some(names: list[str], most: int = 3) -> str:
    """``a, b, c and 23 more``."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
