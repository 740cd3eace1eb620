"""Hashing, atomic writes, and the words for a disk that will not take more."""

import errno
import hashlib
import os
import subprocess
import sys
from concurrent.futures import CancelledError
from threading import Event

import pytest

from tokred_export import disk
from tokred_export.disk import (
    FileRecord,
    clear_disk_errors,
    find_damage,
    hash_file,
    hash_tree,
    process_alive,
    resolve_inside,
    write_atomic,
)
from tokred_export.errors import EnvironmentUnable


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_file(tmp_path, size):
    """Size and sha256 are right around the read block."""
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    digest = hashlib.sha256(data[:size]).hexdigest()
    assert hash_file(tmp_path / "a", sync=True) == FileRecord(bytes=size, sha256=digest)


def test_hash_tree(tmp_path):
    """Names are relative with slashes, folders are walked, hidden files count."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    (tmp_path / ".hidden").write_bytes(b"2")
    paths = {"a/b/c": tmp_path / "a" / "b" / "c", ".hidden": tmp_path / ".hidden"}
    for i in range(20):
        paths[f"n{i}"] = tmp_path / f"n{i}"
        paths[f"n{i}"].write_bytes(b"x" * i)
    assert hash_tree(tmp_path) == {name: hash_file(path) for name, path in paths.items()}
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="loop is a link"):
        hash_tree(tmp_path)


def test_hash_tree_waits_for_the_disk(tmp_path, monkeypatch):
    """For every file and for the entries of every folder, its own first; only where asked to."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    (tmp_path / "d").write_bytes(b"2")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    hash_tree(tmp_path)
    assert synced == []
    hash_tree(tmp_path, sync=True)
    everything = [tmp_path, *tmp_path.rglob("*")]
    assert sorted(synced) == sorted(path.stat().st_ino for path in everything)


def test_hashing_stops_at_a_failure(tmp_path, monkeypatch):
    """As at an interrupt: files that other threads are at are not read to their end."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
    begun, stopped = Event(), []

    def hash_one(path, sync, stop):
        if path.name == "a":
            begun.wait(30)
            raise OSError("a")
        begun.set()
        stopped.append(stop.wait(30))

    monkeypatch.setattr(disk, "hash_file", hash_one)
    with pytest.raises(OSError, match="a"):
        hash_tree(tmp_path)
    assert stopped == [True]
    stop = Event()
    stop.set()
    with pytest.raises(CancelledError):
        hash_file(tmp_path / "a", stop=stop)


@pytest.mark.parametrize("name", ["a", "a/b", "a/./b", ".hidden", "..."])
def test_paths_inside(tmp_path, name):
    """Ordinary relative paths stay below the folder."""
    assert resolve_inside(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../..", "a/../b", "C:/a", "a\\..\\b"])
def test_paths_outside(tmp_path, name):
    """Anything that could lead out is refused, also where it would lead back in."""
    with pytest.raises(ValueError, match="leaves the folder"):
        resolve_inside(tmp_path, name)


def test_damage_is_found_in_order(tmp_path):
    """Each damaged file gives one clause; a whole one gives none."""
    for name in ("good", "short", "changed"):
        (tmp_path / name).write_bytes(b"12")
    records = hash_tree(tmp_path) | {"gone": FileRecord(bytes=1, sha256="0" * 64)}
    (tmp_path / "short").write_bytes(b"1")
    (tmp_path / "changed").write_bytes(b"13")
    clauses = sorted(find_damage(tmp_path, records))
    assert [clause.split()[0] for clause in clauses] == ["changed", "gone", "short"]


def test_write_atomic(tmp_path):
    """The content is replaced, and no temporary file stays."""
    write_atomic(tmp_path / "a", b"1")
    write_atomic(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_process_alive():
    """We and the first process live, whether or not we may signal it; an ended one does not."""
    assert process_alive(os.getpid()) and process_alive(1)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert not process_alive(process.pid)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, number):
    """Full means full, quota or disk, also for a folder that does not exist yet."""
    with pytest.raises(EnvironmentUnable, match="bytes are free"), clear_disk_errors(
        tmp_path / "not" / "there"
    ):
        raise OSError(number, "full")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST])
def test_permissions(tmp_path, number):
    """Permission is about this place only where the caller says so."""
    with pytest.raises(EnvironmentUnable, match="cannot write to"), clear_disk_errors(
        tmp_path, writable=True
    ):
        raise OSError(number, "no")
    with pytest.raises(OSError) as caught, clear_disk_errors(tmp_path):
        raise OSError(number, "no")
    assert caught.value.errno == number
