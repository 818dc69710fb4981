"""Adapters by content: a model name stands for a folder that is named by a hash of its content.

    aft  ->  /runs/mine/model/.versions/3f9c0a1b2c3d/        adapter_config.json, adapter_model.safetensors

An engine caches weights and attention keys by folder, so a folder must never change. A new adapter is copied to a new
folder and tried there; only then is the name moved to it, in one step and in one place (`control.Control`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from aft_ray.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VERSIONS = ".versions"
VERSION = re.compile(r"[0-9a-f]{12}(\.[0-9a-f]{8}\.partial)?")
"""Name of a version's folder; while it is copied it has a longer one."""
Stamp = tuple[tuple[str, int, int], ...]
"""Name, modification time and size of each of an adapter's files."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter that a model name stands for."""

    path: str
    version: str
    """12 characters of the sha256 of its files; `configured` for an adapter of the config that was never replaced."""


def check_name(name: str, base_name: str) -> None:
    """Raise ConfigError unless `name` can be the name of an adapter."""
    if not NAME.fullmatch(name) or name == base_name:
        raise ConfigError(
            f"'{name[:100]}' cannot name an adapter: expected up to 64 letters, digits, '.', '_' and '-', and not the "
            f"base model's name '{base_name}'"
        )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a complete peft adapter."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


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


def keep_version(folder: Path, store: Path | None = None) -> Adapter:
    """Copy the adapter in `folder` to where it will never change: `store`, or `.versions` beside the folder.

    Raises ConfigError when the folder holds no complete adapter. A copy appears completely or not at all.
    """
    if not is_adapter(folder):
        raise ConfigError(f"{folder}: found no adapter; expected {CONFIG} and {WEIGHTS[0]}, as training writes them")
    store = store or folder.parent / VERSIONS
    version = version_of(folder)
    kept = store / version
    if not kept.is_dir():
        partial = store / f"{version}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir(parents=True)
        for name in (CONFIG, *WEIGHTS):
            if (folder / name).is_file():
                shutil.copy(folder / name, partial / name)  # with its mode: who may not read it may not read the copy
        if version_of(partial) != version:
            shutil.rmtree(partial)
            raise ConfigError(f"{folder}: the adapter changed while it was copied; try again when it is complete")
        try:
            partial.rename(kept)
        except OSError:  # another process was faster with the same content
            shutil.rmtree(partial)
    touch(kept)
    return Adapter(path=str(kept), version=version)


def touch(version: Path) -> None:
    """Note that a version was in use until now (`prune_versions`)."""
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


def found_in(folder: Path) -> dict[str, Path]:
    """Return the adapters of a watched folder, by model name."""
    if not folder.is_dir():
        return {}
    return {
        entry.name: Path(entry.path)
        for entry in os.scandir(folder)
        if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and is_own_adapter(Path(entry.path))
    }


def is_own_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter whose files are all its own: a link could name any file of the server."""
    return is_adapter(folder) and not any((folder / name).is_symlink() for name in (CONFIG, *WEIGHTS))


def stamp_of(folder: Path) -> Stamp:
    """Return a stamp that changes whenever the adapter's files do, without reading their content."""
    files = [folder / name for name in (CONFIG, *WEIGHTS)]
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
