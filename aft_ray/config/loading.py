"""Reads the YAML file of a run into its `Config`: `base:` files, `--set` overrides, errors with file and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aft_ray.config.run import Config
from aft_ray.errors import ConfigError


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file of a run, a path or a URL; apply the `a.b=value` overrides and validate the result.

    Raises ConfigError, which names the file, the key, the value found and the value expected.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return validate(Config, raw, origin=str(path))


def validate(model: type[Any], raw: Any, origin: str) -> Any:
    """Return `raw` as an instance of `model`. Raises ConfigError with one line per problem."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {_key_of(e['loc'])}{_message_of(e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _key_of(loc: tuple[int | str, ...]) -> str:
    engines = {"vllm", "transformers", "openai", "scripted"}  # tags of the engine union, not keys
    key = ".".join(str(part) for part in loc if part not in engines)
    return f"{key}: " if key else ""


def _message_of(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in {"unknown_key", "value_error", "missing"}:
        return message[0].lower() + message[1:]
    return f"{message[0].lower()}{message[1:]}, found {error['input']!r}"


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read one YAML mapping. When it names a `base:` file, relative to itself, it is merged over that file."""
    try:
        raw = yaml.safe_load(_text_of(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. The configurations that come with the project are configs/*.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    if "base" in raw:
        return merge(read_yaml(base_of(path, raw.pop("base"))), raw)
    return raw


def base_of(path: Path | str, base: str) -> Path | str:
    """Return the place of a `base:` file, which is named relative to the file that names it."""
    if "://" in base:
        return base
    folder, _, _ = str(path).rpartition("/")
    return f"{folder}/{base}" if "://" in str(path) else Path(path).parent / base


def _text_of(path: Path | str) -> str:
    if "://" not in str(path):
        return Path(path).read_text()
    from aft_ray.storage import Folder

    folder, _, name = str(path).rpartition("/")
    return Folder.at(folder).read_bytes(name).decode()


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged over it, section by section. A section of another `type` is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        )
        merged[key] = merge(old, value) if same_kind and isinstance(old, dict) else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` override in place. The value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key.subkey=value")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
