"""Template files: YAML with a fixed set of keys, either packaged with this module or given by the user.

    read_fields("aft", kind="aggregator template", ...)         a packaged file
    read_fields("my/template.yaml", ...)                        the user's file

Unknown keys are refused with the nearest known name; a key that is missing or of the wrong type is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aft_ray.errors import ConfigError, nearest

_FOLDER = Path(__file__).parent


def read_fields(
    reference: str,
    *,
    kind: str,
    packaged: Mapping[str, str],
    required: Mapping[str, type],
    optional: Mapping[str, type],
) -> dict[str, Any]:
    """Return the checked keys of a template file. `packaged` maps known names to file names in this package."""
    path = _path_of(reference, kind, packaged)
    fields = _parse(path, kind)
    known = {**required, **optional}
    for key in fields:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}' in {kind}; {nearest(key, known)}")
    for key in required:
        if key not in fields:
            raise ConfigError(f"{path}: {kind} has no '{key}'; required keys: {', '.join(required)}")
    for key, value in fields.items():
        if not isinstance(value, known[key]):
            found = type(value).__name__
            raise ConfigError(f"{path}: '{key}' is of type {found} ({value!r}), expected {known[key].__name__}")
    return {"name": path.stem if reference not in packaged else reference, **fields}


def _path_of(reference: str, kind: str, packaged: Mapping[str, str]) -> Path:
    if reference in packaged:
        return _FOLDER / packaged[reference]
    path = Path(reference).expanduser()
    if not path.is_file():
        raise ConfigError(f"{kind} {reference}: no such file, and not a packaged one ({', '.join(packaged)})")
    return path


def _parse(path: Path, kind: str) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: contains {type(fields).__name__}, expected `key: value` lines ({kind})")
    return fields
