"""Tells models and adapters apart by what is in their files, wherever the files are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aft_ray.errors import ConfigError, InputError
from aft_ray.hub import origin
from aft_ray.models import resolve_adapter
from aft_ray.storage import Folder, file_hash


def model_identity(model: str) -> dict[str, Any]:
    """Identify a resolved model: one of the hub by its id and commit, any other folder by its config and weights.

    Raises InputError for a folder without config.json, and ConfigError for a hub id that cannot be reached.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"id": model, "revision": _hub_revision(model)}
    if (commit := origin(folder)) is not None:
        return {"id": commit.id, "revision": commit.revision}
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {model}: the folder has no config.json; expected a Hugging Face model folder")
    place = Folder.at(folder)
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    return {
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "weights": {file.name: file_hash(place, file.name, file.stat().st_size) for file in files},
    }


def base_name(identity: Mapping[str, Any], reference: str) -> tuple[str, str | None]:
    """Return the name by which others find a base model, and its commit: hub id, packaged name, URL or folder."""
    return identity.get("id", reference), identity.get("revision")


def _hub_revision(model: str) -> str | None:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model}: its config cannot be loaded: {str(error).splitlines()[0]}") from error


def adapter_identity(reference: str | None) -> str | None:
    """Identify an adapter by the sha256 of its weights, wherever it lies."""
    if reference is None:
        return None
    return hashlib.sha256((resolve_adapter(reference) / "adapter_model.safetensors").read_bytes()).hexdigest()
