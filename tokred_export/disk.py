"""Files that are either whole or absent: hashing, atomic writes, leftovers of dead processes.

Shared by the bundle and the stage cache. Both write into a temporary sibling whose name carries
the writer's process number and rename it into place, so that a killed writer leaves nothing
but that sibling, and the next writer can tell that its owner is gone.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event

from tokred_export.errors import EnvironmentUnable
from tokred_export.specs import Spec

_BLOCK = 1 << 20
_AT_ONCE = 4  # files; the few large ones of a bundle are what takes time
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EBUSY, errno.ELOOP,
    errno.ENAMETOOLONG,
}


class FileRecord(Spec, kw_only=True):
    """What a file must be: its size in bytes and the hex sha256 of its content."""

    bytes: int
    sha256: str


def hash_file(path: Path, sync: bool = False, stop: Event | None = None) -> FileRecord:
    """Read ``path`` once and describe it; ``sync`` also waits until its data is on the disk.

    Raises:
        CancelledError: ``stop`` was set before the end.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def hash_tree(folder: Path, sync: bool = False) -> dict[str, FileRecord]:
    """Describe every file below ``folder``, keyed by its path relative to it with "/" between.

    ``sync`` also waits until the data of all and the entries of ``folder`` and of those below are
    on the disk.

    Raises:
        ValueError: something that is neither a file nor a folder; a link would say one thing
            here and another on the machine the folder is copied to.
    """
    files = []
    if sync and folder.is_dir():
        sync_folder(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or a special file, expected a plain file")
        if path.is_file():
            files.append(path)
        elif sync:
            sync_folder(path)
    names = (path.relative_to(folder).as_posix() for path in files)
    stop = Event()
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # reading and hashing let other threads run
        records = pool.map(partial(hash_file, sync=sync, stop=stop), files)
        try:
            return dict(zip(names, records, strict=True))
        except BaseException:  # the pool waits for its threads, which may be at a large file
            stop.set()
            raise


def resolve_inside(folder: Path, name: str) -> Path:
    """The file that the relative path ``name`` means, which must lie below ``folder``.

    Raises:
        ValueError: ``name`` is absolute, climbs with "..", or passes through a link that leads out.
    """
    parts = PurePosixPath(name).parts
    plain = parts and "\\" not in name and ":" not in parts[0] and not name.startswith("/")
    if not plain or ".." in parts:
        raise ValueError(f"the path {name!r} leaves the folder")
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the path {name!r} leaves the folder through a link")
    return path


def find_damage(folder: Path, records: Mapping[str, FileRecord]) -> Iterator[str]:
    """Yield one clause per file of ``records`` that is not, byte for byte, what was recorded."""
    for name, record in records.items():
        try:
            path = resolve_inside(folder, name)
        except ValueError as error:
            yield str(error)
            continue
        if not path.is_file():
            yield f"{name} is missing, expected a file of {record.bytes} bytes"
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{name} has {size} bytes, expected {record.bytes}"
        elif (found := hash_file(path).sha256) != record.sha256:
            yield f"{name} has sha256 {found[:12]}..., expected {record.sha256[:12]}..."


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader sees the old content or the new, never less."""
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's own entries (names, renames) are on the disk, where that exists."""
    if os.name == "nt":
        return  # Windows has no such call for folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def process_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    if os.name == "nt":  # os.kill would end the process there, whatever the signal
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True


@contextmanager
def clear_disk_errors(place: Path, writable: bool = False) -> Iterator[None]:
    """Turn "disk full" inside the block into one clear sentence about ``place``.

    ``writable`` also covers "permission denied", "read-only file system" and a file where a folder
    should be; leave it off around code that opens files elsewhere, which is another story.

    Raises:
        EnvironmentUnable: the disk is full, or (``writable``) the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentUnable(
                f"the disk ran full while writing to {place} ({_free(place)} bytes are free "
                "there): free some space or choose a folder on another disk; nothing half "
                "written was kept"
            ) from error
        if writable and error.errno in _REFUSED:
            raise EnvironmentUnable(
                f"cannot write to {place} ({error.strerror}): choose a folder that you may "
                "write to"
            ) from error
        raise


def _free(place: Path) -> int:
    """Bytes free on the disk of ``place`` or of its nearest parent that exists."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
