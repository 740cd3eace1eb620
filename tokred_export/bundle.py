"""The bundle: a folder that holds everything a deployment needs, and `export.json` that says so.

A bundle is built in a temporary sibling of its target and renamed when it is whole; a killed
build leaves the target as it was. The manifest lists every other file with its size and hash.
Nothing here needs more than msgspec, for the runtime reads bundles too.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from tokred_export import __version__
from tokred_export.disk import (
    clear_disk_errors,
    find_damage,
    hash_tree,
    process_alive,
    resolve_inside,
    sync_folder,
    write_atomic,
)
from tokred_export.errors import BundleError, EnvironmentUnable, InvalidRequest
from tokred_export.manifest import EXPORT_FORMAT, SCHEMA_VERSION, Manifest

MANIFEST = "export.json"


class Bundle(NamedTuple):
    """A bundle on disk: its folder and its decoded manifest."""

    path: Path
    manifest: Manifest


@contextmanager
def writing_bundle(target: Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; at the end of the block it becomes ``target``.

    The block writes the files and, last, the manifest with `write_manifest`. If it raises, the
    folder is removed and ``target`` stays as it was. Leftovers of killed builds of the same
    target are cleaned first.

    Raises:
        InvalidRequest: ``target`` is a file or a folder with something else in it, or a bundle
            and ``force`` is off.
        EnvironmentUnable: the disk is full or the parent folder cannot be written.
        BundleError: the block left no valid manifest.
    """
    target = Path(os.path.realpath(target))  # a linked target is replaced where it really is
    with clear_disk_errors(target.parent, writable=True):
        _clean_leftovers(target)
        _refuse_target(target, force)
        temp = _sibling(target, "tmp")
        temp.mkdir(parents=True)
    try:
        with clear_disk_errors(target.parent):
            yield temp
            read_bundle(temp)
            _refuse_target(target, force)  # somebody may have been faster
            _swap_in(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in ``folder`` into the manifest, write it there, and return it.

    Each file is also flushed to the disk, so that the rename that follows publishes real data.

    Raises:
        BundleError: the folder holds a link or a special file.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    try:
        files = hash_tree(folder, sync=True)
    except ValueError as error:
        raise BundleError(f"{error}; a bundle is copied around: write the file itself") from error
    manifest = msgspec.structs.replace(manifest, files=files)
    write_atomic(folder / MANIFEST, _encode(manifest))
    return manifest


def update_files(path: Path, under: Literal["reports", "engines"] = "reports") -> Bundle:
    """Record anew the files below one subfolder, after a report or an engine was added.

    Everything else keeps its recorded hash: a damaged weight file is not blessed on the way.

    Raises:
        InvalidRequest, BundleError: as `read_bundle`.
        EnvironmentUnable: the disk is full or the bundle cannot be written.
    """
    bundle = read_bundle(path)
    prefix = f"{under}/"
    files = {n: r for n, r in bundle.manifest.files.items() if not n.startswith(prefix)}
    try:
        fresh = hash_tree(path / under, sync=True)
    except ValueError as error:
        raise BundleError(f"{error}; a bundle is copied around: write the file itself") from error
    files |= {prefix + name: record for name, record in fresh.items()}
    manifest = msgspec.structs.replace(bundle.manifest, files=files)
    with clear_disk_errors(path, writable=True):
        write_atomic(path / MANIFEST, _encode(manifest))
    return Bundle(path, manifest)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest and check that it is one this version understands.

    Contents are not hashed here; see `verify_files`.

    Raises:
        InvalidRequest: there is no folder at ``path``.
        BundleError: no manifest, another schema version, an unknown key, a wrong value, or a
            component whose file is not listed or not there.
    """
    path = Path(path)
    if not path.is_dir():
        raise InvalidRequest(f"{path} is not a folder, expected a bundle: name the folder that "
                             "`tokred-export build -o` wrote")
    try:
        data = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BundleError(f"{path} has no {MANIFEST}, so it is not a bundle: name the folder that "
                          "`tokred-export build -o` wrote") from error
    manifest = _decode(path, data)
    for name, component in manifest.components.items():
        file = component.file
        if file not in manifest.files:
            raise BundleError(f"{path}: component {name} is in {file}, which {MANIFEST} does not "
                              f"list under files: {rebuild_hint(manifest)}")
        if not _inside(path, file, manifest).is_file():
            raise BundleError(f"{path}: {file} of component {name} is missing: copy the whole "
                              f"bundle again, or {rebuild_hint(manifest)}")
    return Bundle(path, manifest)


def require_writable(bundle: Bundle) -> None:
    """Before something is measured that is to be stored in it.

    Raises:
        EnvironmentUnable: nothing can be written there.
    """
    for folder in (bundle.path, bundle.path / "reports"):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise EnvironmentUnable(
                f"cannot write to {folder}, where records and report pages go: make it writable, "
                "or copy the bundle to where you may write"
            )


def unlisted_files(bundle: Bundle) -> list[str]:
    """Files below the bundle's folder that its manifest says nothing of."""
    there = (path for path in sorted(bundle.path.rglob("*")) if not path.is_dir())
    names = (path.relative_to(bundle.path).as_posix() for path in there)
    return [name for name in names if name != MANIFEST and name not in bundle.manifest.files]


def verify_files(bundle: Bundle, skip: tuple[str, ...] = ()) -> None:
    """Check size and sha256 of every listed file, but for names that start with one of ``skip``.

    Raises:
        BundleError: a file is missing, differs, or its listed path leaves the bundle.
    """
    records = {n: r for n, r in bundle.manifest.files.items() if not n.startswith(skip)}
    damage = next(find_damage(bundle.path, records), None)
    if damage is None:
        return
    remedy = rebuild_hint(bundle.manifest)
    if damage.startswith("reports/"):  # these can be made anew
        remedy = f"measure again with `tokred-export verify {bundle.path}`"
    raise BundleError(f"{bundle.path}: {damage}: copy the whole bundle again, or {remedy}")


def rebuild_hint(manifest: Manifest) -> str:
    """The words that tell a user how to make this bundle again."""
    return f"build it again with `{manifest.provenance.command}`"


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


class _Head(msgspec.Struct):
    """The two keys that say whether the rest can be read at all."""

    schema_version: int
    export_format: str


def _decode(path: Path, data: bytes) -> Manifest:
    """Decode a manifest, its version first, for another version has other keys."""
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.export_format != EXPORT_FORMAT:
            raise BundleError(f"{path}/{MANIFEST} is of format {head.export_format!r}, expected "
                              f"{EXPORT_FORMAT!r}: name a folder that `tokred-export build` wrote")
        if head.schema_version != SCHEMA_VERSION:
            raise BundleError(
                f"{path}/{MANIFEST} has schema version {head.schema_version}, this is "
                f"tokred-export {__version__}, which reads version {SCHEMA_VERSION}: install the "
                "version that wrote it, or build it again with this one"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}/{MANIFEST} is damaged ({error}), expected the manifest that "
                          "`tokred-export build` writes: build the bundle again") from error


def _inside(path: Path, name: str, manifest: Manifest) -> Path:
    try:
        return resolve_inside(path, name)
    except ValueError as error:
        raise BundleError(f"{path}: {error}: do not use this bundle; "
                          f"{rebuild_hint(manifest)}") from error


def _sibling(target: Path, kind: Literal["tmp", "old"]) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def _refuse_target(target: Path, force: bool) -> None:
    """Raise unless ``target`` is absent, empty, or a bundle that may be replaced."""
    if target.is_mount():
        raise InvalidRequest(f"{target} is a mount point, which no finished folder can take the "
                             "place of: choose a folder below it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not _looks_like_bundle(target):
        raise InvalidRequest(f"{target} exists and is not a bundle, expected a new or empty "
                             "folder: choose another one, for it will not be overwritten")
    if not force:
        raise InvalidRequest(f"{target} already holds a bundle: add --force to replace it, or "
                             "choose another folder")


def _looks_like_bundle(folder: Path) -> bool:
    """Whether ``folder`` holds a manifest of this format, of whatever version."""
    try:
        head = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Head)
    except (FileNotFoundError, IsADirectoryError, msgspec.MsgspecError):
        return False
    return head.export_format == EXPORT_FORMAT


def _clean_leftovers(target: Path) -> None:
    """Remove what killed builds of ``target`` left; bring back a bundle they had moved aside."""
    name = glob.escape(target.name)
    for kind in ("old", "tmp"):
        for folder in target.parent.glob(f".{name}.{kind}-*"):
            pid = folder.name.rpartition("-")[2]
            # Our own number on a folder that we have not made yet: an earlier process had it.
            if not pid.isdigit() or (int(pid) != os.getpid() and process_alive(int(pid))):
                continue
            if kind == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _swap_in(temp: Path, target: Path) -> None:
    """Rename ``temp`` to ``target``; an old bundle is moved aside first and removed last."""
    sync_folder(temp)
    aside = _sibling(target, "old")
    replacing = target.exists()
    if replacing:
        target.rename(aside)
    try:
        temp.rename(target)
    except OSError:
        if replacing:
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
