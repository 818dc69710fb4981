"""Adapters by content: a model's name stands for a folder whose own name is a hash of what is in it.

    aft  ->  /runs/mine/model/.versions/3f9c0a1b2c3d/        adapter_config.json, adapter_model.safetensors

An engine keeps weights and cached keys by folder, so a folder must never change. A new adapter is copied to a folder of
its own, tried, and only then does the name move, in one step and in one place (`control.Control`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from aft_ray.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VERSIONS = ".versions"
Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of an adapter's files."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a model's name stands for."""

    path: str
    version: str
    """12 characters of the sha256 of its files; `configured` for one named in the config and never moved."""


def check_name(name: str, base_name: str) -> None:
    """ConfigError unless it can be the name of an adapter."""
    if not NAME.fullmatch(name) or name == base_name:
        raise ConfigError(
            f"'{name[:100]}' cannot name an adapter: expected up to 64 letters, digits, '.', '_' and '-', and not the "
            f"base model's name '{base_name}'"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a peft adapter is complete in this folder."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def version_of(folder: Path) -> str:
    """The identity of an adapter: 12 characters of a sha256 over its config and weights."""
    found = hashlib.sha256()
    for name in (CONFIG, *WEIGHTS):
        file = folder / name
        if file.is_file():
            found.update(name.encode())
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:12]


def keep_version(folder: Path, store: Path | None = None) -> Adapter:
    """The adapter in `folder`, copied to where it will never change: `store`, or `.versions` beside the folder.

    Raises ConfigError when there is no whole adapter. A copy appears whole or not at all.
    """
    if not is_adapter(folder):
        raise ConfigError(f"{folder}: no adapter there; expected {CONFIG} and {WEIGHTS[0]}, as training leaves them")
    store = store or folder.parent / VERSIONS
    version = version_of(folder)
    kept = store / version
    if not kept.is_dir():
        half = store / f"{version}.{uuid.uuid4().hex[:8]}.partial"
        half.mkdir(parents=True)
        for name in (CONFIG, *WEIGHTS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, half / name)
        if version_of(half) != version:
            shutil.rmtree(half)
            raise ConfigError(f"{folder}: the adapter changed while it was read; try again when it is whole")
        try:
            half.rename(kept)
        except OSError:  # another process was faster with the same content
            shutil.rmtree(half)
    return Adapter(path=str(kept), version=version)


def found_in(folder: Path) -> dict[str, Path]:
    """The adapters of a watched folder, by model name."""
    if not folder.is_dir():
        return {}
    return {
        entry.name: Path(entry.path)
        for entry in os.scandir(folder)
        if NAME.fullmatch(entry.name) and entry.is_dir() and is_adapter(Path(entry.path))
    }


def stamp_of(folder: Path) -> Stamp:
    """Changes whenever the adapter's files do: cheap to look at, unlike their content."""
    files = [folder / name for name in (CONFIG, *WEIGHTS)]
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
