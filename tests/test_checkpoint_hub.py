"""Checkpoints from the hub: found in its cache, and every failure has its sentence."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
from checkpoints import refusal, write_mamba_ssm, write_transformers

from tokred_export.checkpoint import load_checkpoint
from tokred_export.errors import CheckpointError, EnvironmentUnable

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One intact checkpoint per layout; tests work on copies."""
    root = tmp_path_factory.mktemp("originals")
    write_transformers(root / "transformers")
    write_transformers(root / "sharded", max_shard_size="20KB")
    write_mamba_ssm(root / "mamba_ssm")
    return root


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize("layout", ["transformers", "sharded", "mamba_ssm"])
def test_a_hub_model_is_found_in_the_cache(layout, originals, hub_cache):
    """The commit behind the branch is recorded, and the id stays the source."""
    repo = hub_cache / "models--someone--tiny-mamba2"
    shutil.copytree(originals / layout, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    found = load_checkpoint("someone/tiny-mamba2")
    assert (found.source, found.revision) == ("someone/tiny-mamba2", COMMIT)
    assert found.weights_sha256 == load_checkpoint(str(originals / layout)).weights_sha256
    assert load_checkpoint("someone/tiny-mamba2", COMMIT).revision == COMMIT


def test_offline_without_a_cached_model_is_the_environments_fault(hub_cache):
    """The id may be right: exit code 3, and what to do."""
    message = refusal("someone/tiny-mamba2", EnvironmentUnable)
    assert "could not be fetched from the hub" in message


def raise_from_hub(monkeypatch, kind: str) -> None:
    """Let snapshot_download fail as the hub's HTTP answers make it fail."""
    error = getattr(huggingface_hub.errors, kind)
    if issubclass(error, huggingface_hub.errors.HfHubHTTPError):
        exception = error.__new__(error)  # its __init__ wants the HTTP library's response
        exception.args = ("404 Client Error.\nRequest ID: 1",)
    else:
        exception = error("no such name")

    def snapshot_download(*args, **kwargs):
        raise exception

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(
    ("kind", "raised", "complaint"),
    [
        ("RepositoryNotFoundError", CheckpointError, "neither a local folder nor a public hub"),
        ("HFValidationError", CheckpointError, "neither a local folder nor a public hub"),
        ("RevisionNotFoundError", CheckpointError, "has no revision"),
        ("GatedRepoError", EnvironmentUnable, "access to the hub model"),
        ("HfHubHTTPError", EnvironmentUnable, "could not be fetched from the hub (404 Client"),
        ("LocalEntryNotFoundError", EnvironmentUnable, "could not be fetched from the hub"),
        ("OfflineModeIsEnabled", EnvironmentUnable, "could not be fetched from the hub"),
    ],
)
def test_every_answer_of_the_hub_has_its_sentence(kind, raised, complaint, monkeypatch, tmp_path):
    """Not there, no such revision, not allowed, or not reached."""
    monkeypatch.chdir(tmp_path)
    raise_from_hub(monkeypatch, kind)
    assert complaint in refusal("someone/tiny-mamba2", raised)


def test_pickles_are_fetched_only_where_there_are_no_safetensors(
    originals, hub_cache, monkeypatch
):
    """A repository with both would otherwise be downloaded twice over."""
    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, "pytorch_model.bin" in allow_patterns))
        return str(originals / repo.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_checkpoint("someone/sharded")
    load_checkpoint("someone/mamba_ssm")
    assert asked == [
        ("someone/sharded", False), ("someone/mamba_ssm", False), ("someone/mamba_ssm", True)
    ]  # fmt: skip
