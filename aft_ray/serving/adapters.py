"""Adapters by content: a model name stands for a folder that is named by a hash of its content.

    aft  ->  /runs/mine/model/.versions/3f9c0a1b2c3d/        adapter_config.json, adapter_model.safetensors
    aft  ->  s3://bucket/mine/model/.versions/3f9c0a1b2c3d   the same on object storage
    aft  ->  owner/name#a09a354...                           a commit of the hub, which never changes

An engine caches weights and attention keys by folder, so a folder must never change. A new adapter is copied to a new
folder and tried there; only then is the name moved to it, in one step and in one place (`control.Control`). What a name
stands for is a reference: every replica fetches it to its own node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from aft_ray.errors import ConfigError
from aft_ray.hub import is_hub_id, origin, snapshot
from aft_ray.storage import Folder, Stamp, cache_dir, local_copy

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VERSIONS = ".versions"
VERSION = re.compile(r"[0-9a-f]{12}(\.[0-9a-f]{8}\.partial)?")
"""Name of a version's folder; while it is copied it has a longer one."""
AdapterStamp = tuple[tuple[str, Stamp], ...]
"""Name and stamp of each of an adapter's files."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter that a model name stands for."""

    path: str
    """What engines are asked for: a folder, a URL, or a commit of the hub."""
    version: str
    """12 characters of the sha256 of its files; `configured` for an adapter of the config that is served from its own
    place."""

    @classmethod
    def configured(cls, path: str) -> Adapter:
        """Return an adapter of a config, whose version is known where it is a kept one."""
        store, _, version = path.rpartition("/")
        is_kept = store.endswith(f"/{VERSIONS}") and VERSION.fullmatch(version) is not None
        return cls(path=path, version=version if is_kept else "configured")


def check_name(name: str, base_name: str) -> None:
    """Raise ConfigError unless `name` can be the name of an adapter."""
    if not NAME.fullmatch(name) or name == base_name:
        raise ConfigError(
            f"'{name[:100]}' cannot name an adapter: expected up to 64 letters, digits, '.', '_' and '-', and not the "
            f"base model's name '{base_name}'"
        )


def is_adapter(folder: Folder) -> bool:
    """Whether the folder holds a complete peft adapter."""
    files = folder.files()
    return CONFIG in files and any(name in files for name in WEIGHTS)


def version_of(folder: Path) -> str:
    """Return the identity of an adapter: 12 characters of a sha256 over its config and weights."""
    found = hashlib.sha256()
    for name in (CONFIG, *WEIGHTS):
        file = folder / name
        if file.is_file():
            found.update(name.encode())
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:12]


def keep_version(reference: str, store: Folder | None = None) -> Adapter:
    """Copy the adapter at a path or URL to where it will never change: `store`, or `.versions` beside it.

    A repository of the hub is not copied: its commits never change. A copy appears completely or not at all. Raises
    ConfigError where there is no complete adapter, and StorageError where it cannot be read or its copy be written.
    """
    if is_hub_id(reference):
        return _commit_of(reference)
    place = Folder.at(reference)
    if not is_adapter(place):
        raise _no_adapter(reference)
    folder = local_copy(reference)
    with place.reached("read"):
        version = version_of(folder)
    beside = place.parent if place.parent.name == VERSIONS else place.parent.child(VERSIONS)
    kept = (store or beside).child(version)
    if not is_adapter(kept):
        here = Path(kept.path).parent if kept.is_local else cache_dir()
        partial = here / f"{version}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with kept.reached("written"):
                _copy(folder, partial)
            if version_of(partial) != version or local_copy(reference) != folder:  # a URL is fetched file by file
                raise ConfigError(
                    f"{reference}: the adapter changed while it was copied; try again when it is complete"
                )
            _move(partial, kept)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    touch(kept.location)
    return Adapter(path=kept.location, version=version)


def _no_adapter(reference: str) -> ConfigError:
    return ConfigError(f"{reference}: found no adapter; expected {CONFIG} and {WEIGHTS[0]}, as training writes them")


def _commit_of(reference: str) -> Adapter:
    """Return the adapter that a repository of the hub holds at one commit."""
    folder = snapshot(reference)
    commit = origin(folder)
    if commit is None or not is_adapter(Folder.at(folder)):
        raise _no_adapter(reference)
    return Adapter(path=commit.reference, version=version_of(folder))


def _copy(folder: Path, partial: Path) -> None:
    partial.mkdir(parents=True)
    for name in (CONFIG, *WEIGHTS):
        if (folder / name).is_file():
            shutil.copy(folder / name, partial / name)  # with its mode: who may not read it may not read the copy


def _move(partial: Path, kept: Folder) -> None:
    """Move a complete copy to its place, where another process may have been faster with the same content."""
    if kept.is_local:
        with contextlib.suppress(OSError):
            partial.rename(kept.path)
        return
    for name in (*WEIGHTS, CONFIG):  # the config comes last: a folder without one is no adapter yet
        if (partial / name).is_file():
            with kept.reached("written", name):
                pafs.copy_files(str(partial / name), kept.file(name), pafs.LocalFileSystem(), kept.fs)


def touch(path: str) -> None:
    """Note that a version in a folder was in use until now (`prune_versions`)."""
    version = Path(path)
    if version.parent.name == VERSIONS and version.is_dir():
        os.utime(version)


def prune_versions(store: Path, *, keep: int, in_use: Collection[str], grace_s: float) -> list[Path]:
    """Remove the versions in `store` that nobody needs, and return their folders.

    The newest `keep` stay, those whose paths are `in_use`, and those that were touched within `grace_s`: a request that
    began with one may still run, and one that was just copied may not yet have its name. What a copy that was cut off
    left behind goes too.
    """
    found = [Path(entry.path) for entry in os.scandir(store) if entry.is_dir(follow_symlinks=False)]
    ages = {folder: time.time() - folder.stat().st_mtime for folder in found if VERSION.fullmatch(folder.name)}
    whole = sorted((folder for folder in ages if folder.suffix != ".partial"), key=ages.__getitem__)
    needed = {Path(path).resolve() for path in in_use}
    removed = [
        folder
        for folder, age in ages.items()
        if age > grace_s and folder not in whole[:keep] and folder.resolve() not in needed
    ]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def found_in(folder: Folder) -> dict[str, Folder]:
    """Return the adapters of a watched folder, by model name."""
    if not folder.is_local:
        names = folder.folder_names()
    elif Path(folder.path).is_dir():
        names = [entry.name for entry in os.scandir(folder.path) if entry.is_dir(follow_symlinks=False)]
    else:
        names = []
    places = {name: folder.child(name) for name in names if NAME.fullmatch(name)}
    return {name: place for name, place in places.items() if is_own_adapter(place)}


def is_own_adapter(folder: Folder) -> bool:
    """Whether a folder holds an adapter whose files are all its own: a link could name any file of the server."""
    links = [name for name in (CONFIG, *WEIGHTS) if folder.is_local and Path(folder.file(name)).is_symlink()]
    return not links and is_adapter(folder)


def stamp_of(folder: Folder) -> AdapterStamp:
    """Return a stamp that changes whenever the adapter's files do, without reading their content."""
    files = folder.files()
    return tuple((name, folder.stamp(name, files[name])) for name in (CONFIG, *WEIGHTS) if name in files)
