"""A cache of finished build stages, so that building the same thing again redoes nothing.

An entry is named by the hash of everything its content depends on. It is made in a temporary
folder and renamed when whole, with its files' hashes beside them; every use checks these.

    <key>/files/...      what the stage wrote
    <key>/hashes.json    size and sha256 of each; its modification time is the last use
    .tmp-<random>-<pid>  an entry being made or removed, or left so by a killed process
    .use-<key>-<pid>     a process that was handed the entry, and keeps it from eviction
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from functools import cache
from importlib import util
from pathlib import Path

import msgspec

from tokred_export.disk import (
    FileRecord,
    clear_disk_errors,
    find_damage,
    hash_tree,
    process_alive,
    sync_folder,
    write_atomic,
)
from tokred_export.errors import BuildFailed, InvalidRequest
from tokred_export.manifest import library_versions
from tokred_export.units import parse_size

DEFAULT_LIMIT = "20G"
_HASHES = "hashes.json"
_SOURCES = {".py", ".cpp", ".h", ".cu"}
_HIDDEN = re.compile(r"\.[a-z]+-([0-9a-z]+)-([0-9]+)")
_KEY = re.compile(r"[0-9a-f]{64}")  # nothing else below the root is ever touched
# A temporary folder this old is nobody's, whoever may have its process number now.
_STALE_NS = 7 * 24 * 3600 * 10**9

_log = logging.getLogger(__name__)


def default_root() -> Path:
    """`$TOKRED_CACHE`, else `tokred-export` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("TOKRED_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokred-export"


def default_limit() -> int:
    """`$TOKRED_CACHE_LIMIT` in bytes, else 20G.

    Raises:
        InvalidRequest: the variable is not a size such as 500M or 20G.
    """
    try:
        return parse_size(os.environ.get("TOKRED_CACHE_LIMIT") or DEFAULT_LIMIT)
    except InvalidRequest as error:
        raise InvalidRequest(f"TOKRED_CACHE_LIMIT: {error}") from error


def stage_key(**parts: object) -> str:
    """Hex sha256 of everything a stage's result depends on.

    The code of this package and the versions of the libraries it builds with are always among
    the parts. Others may be any JSON value or spec; their order does not matter.

    Raises:
        TypeError: a part that has no JSON form.
    """
    whole = {"parts": parts, "source": source_digest(), "libraries": library_versions()}
    return hashlib.sha256(msgspec.json.encode(whole, order="sorted")).hexdigest()


@cache
def source_digest() -> str:
    """Hex sha256 over the source files of `tokred_export` and `tokred_plugins`."""
    digest = hashlib.sha256()
    for package in ("tokred_export", "tokred_plugins"):
        spec = util.find_spec(package)  # finds without importing
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in _SOURCES:
                    name = f"{package}/{path.relative_to(root).as_posix()}"
                    digest.update(f"{name}\0{path.stat().st_size}\0".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache(msgspec.Struct, frozen=True):
    """A stage cache below ``root`` that holds about ``limit`` bytes."""

    root: Path = msgspec.field(default_factory=default_root)
    limit: int = msgspec.field(default_factory=default_limit)

    def get_or_make(self, key: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of the stage ``key``, made with ``make(folder)`` if need be.

        The folder is to be read and copied from, not written to. It stays for as long as this
        process runs. Two processes may make the same key at once: the first to finish wins and
        both use its result. An entry that does not match its hashes is made again, with a
        warning in the log.

        Raises:
            EnvironmentUnable: the disk is full or the cache cannot be written.
            BuildFailed: ``make`` left a link or a special file.
            ValueError: ``key`` is not one that `stage_key` made.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a stage key, expected 64 hexadecimal digits")
        with clear_disk_errors(self.root, writable=True):
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            (self.root / f".use-{key}-{os.getpid()}").touch()
        if not self._ready(key):
            temp = self._temp()
            try:
                with clear_disk_errors(self.root):
                    _fill(temp, make)
                    self._publish(temp, key)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
            self._evict()
        return self.root / key / "files"

    def _ready(self, key: str) -> bool:
        """Whether the entry is there and whole; a damaged one is removed."""
        entry = self.root / key
        if not entry.exists():
            return False
        records = _read_hashes(entry)
        if records is None:
            damage = f"its {_HASHES} cannot be read"
        else:
            damage = next(find_damage(entry / "files", records), None)
        if damage is None:
            os.utime(entry / _HASHES)
            return True
        _log.warning("cache entry %s is damaged (%s): making it again", entry, damage)
        self._remove(entry)
        return False

    def _publish(self, temp: Path, key: str) -> None:
        """Rename a finished entry into place, unless another process already has."""
        entry = self.root / key
        try:
            temp.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not self._ready(key):  # theirs was damaged and is gone now
                temp.rename(entry)
        sync_folder(self.root)

    def _evict(self) -> None:
        """Remove the entries used longest ago until the rest fits; entries in use stay."""
        entries = [path for path in self.root.iterdir() if _KEY.fullmatch(path.name)]
        usage = sorted((_last_use_ns(entry), _size(entry), entry) for entry in entries)
        total = sum(size for _, size, _ in usage)
        for _, size, entry in usage:
            if total <= self.limit:
                break
            if any(key == entry.name for _, key, _ in self._hidden("use")):
                continue
            _log.info("cache is above %d bytes: removing %s", self.limit, entry)
            self._remove(entry)
            total -= size

    def _clean(self) -> None:
        """Remove what dead processes left: temporary folders and marks of use."""
        for path, _, pid in self._hidden("use"):
            if not process_alive(pid):
                path.unlink(missing_ok=True)
        for path, _, pid in self._hidden("tmp"):
            if not process_alive(pid) or time.time_ns() - _last_use_ns(path) > _STALE_NS:
                shutil.rmtree(path, ignore_errors=True)

    def _hidden(self, kind: str) -> list[tuple[Path, str, int]]:
        """Marks or temporary folders: path, what it is about, and its process number."""
        found = ((path, _HIDDEN.fullmatch(path.name)) for path in self.root.glob(f".{kind}-*"))
        return [(path, match[1], int(match[2])) for path, match in found if match]

    def _temp(self) -> Path:
        return self.root / f".tmp-{secrets.token_hex(4)}-{os.getpid()}"

    def _remove(self, entry: Path) -> None:
        """Remove an entry so that no moment shows half of it under its name."""
        temp = self._temp()
        try:
            entry.rename(temp)
        except FileNotFoundError:  # another process removed it first
            return
        shutil.rmtree(temp, ignore_errors=True)


def _fill(temp: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` write below ``temp`` and put the hashes of what it wrote beside it."""
    files = temp / "files"
    files.mkdir(parents=True)
    make(files)
    try:
        records = hash_tree(files, sync=True)
    except ValueError as error:
        raise BuildFailed(f"a build stage left something that cannot be kept: {error}") from error
    write_atomic(temp / _HASHES, msgspec.json.encode(records))


def _read_hashes(entry: Path) -> dict[str, FileRecord] | None:
    try:
        data = (entry / _HASHES).read_bytes()
        return msgspec.json.decode(data, type=dict[str, FileRecord])
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _size(entry: Path) -> int:
    """Bytes that an entry's files have, or had when it was made."""
    return sum(record.bytes for record in (_read_hashes(entry) or {}).values())


def _last_use_ns(entry: Path) -> int:
    """When the entry was last used, or else its folder changed; 0 if it is gone by now."""
    for path in (entry / _HASHES, entry):
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return 0
