"""API keys. Only the sha256 of a key is ever stored: a key in an environment variable is hashed where it is read, and a
key file holds hashes that its author made.

    alice: {sha256: 0a4f..., max_requests: 4, tokens_per_minute: 200000}
    ops:   {sha256: 93bc..., admin: true}

The file is read again when it changes; if it cannot be read then, the keys stay as they were. Ledger, metrics and
limits know a key by its name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aft_ray.config import KeyConfig, KeyLimits, ServingConfig, validate
from aft_ray.config.loading import read_yaml
from aft_ray.errors import ConfigError
from aft_ray.serving.errors import HttpError

logger = logging.getLogger("ray.serve.aft_ray")

LOOK_S = 1.0
"""Shortest interval between two looks at the file."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, which may mean another address tomorrow


def digest(key: str) -> str:
    """Return the sha256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def key_digests(config: ServingConfig) -> tuple[str, ...]:
    """Return the digests of the keys in the environment variable; none where the config names no variable."""
    if config.api_keys_env is None:
        return ()
    keys = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            f"serving.api_keys_env: the environment variable {config.api_keys_env} is not set or empty; "
            "expected the accepted keys, comma separated"
        )
    return tuple(digest(key) for key in keys)


def read_keys(file: str) -> dict[str, KeyConfig]:
    """Return the keys of a file by name. Raises ConfigError, which names file and key and never quotes a hash."""
    raw = read_yaml(Path(file))
    keys = {}
    for name, entry in raw.items():
        try:
            keys[str(name)] = validate(KeyConfig, entry, origin=f"{file}: {name}")
        except ConfigError as error:
            if "sha256" in str(error):
                raise ConfigError(f"{file}: {name}: sha256: expected 64 digits 0-9a-f, the sha256 of a key") from None
            raise
        if keys[str(name)].sha256 == digest(""):
            raise ConfigError(
                f"{file}: {name}: sha256: this is the hash of an empty key, so anybody would get in. The variable "
                "that was hashed was not set"
            )
        if re.fullmatch(r"key-\d+", str(name)):
            raise ConfigError(f"{file}: {name}: the keys of serving.api_keys_env have such names; choose another one")
    if not keys:
        raise ConfigError(f"{file}: found no keys; expected lines such as  alice: {{sha256: ...}}")
    return keys


def requires_keys(config: ServingConfig) -> bool:
    """Whether every request needs a key."""
    return config.api_keys_env is not None or config.keys_file is not None


def refuse_open_server(host: str, has_keys: bool) -> None:
    """Raise ConfigError when anyone on the network could use the server."""
    if not has_keys and not is_loopback(host):
        raise ConfigError(
            f"serving.host: {host} can be reached from other machines, and there are no API keys. "
            "Set serving.api_keys_env to the name of an environment variable with keys, or serving.keys_file to a file "
            "of hashed ones, or bind to 127.0.0.1"
        )


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The sender of a request, as its key identifies it."""

    name: str
    """Name of the key; empty where the server asks for none."""
    limits: KeyLimits
    is_admin: bool = False
    """Whether the key may use `/admin`."""


class KeyRing:
    """The accepted keys of one ingress replica."""

    def __init__(self, digests: Sequence[str] = (), file: str | None = None) -> None:
        self._from_environment = {f"key-{n}": KeyConfig(sha256=found) for n, found in enumerate(digests, start=1)}
        self._file = file
        self._from_file = {} if file is None else read_keys(file)
        self._stamp = self._look()
        self._looked = time.monotonic()

    @property
    def is_required(self) -> bool:
        """Whether a request needs a key. With all keys revoked it still does, so nobody is admitted."""
        return bool(self._from_environment) or self._file is not None

    def find(self, authorization: str | None) -> tuple[str, KeyConfig] | None:
        """Return name and config of the key in an `Authorization: Bearer <key>` header. Any key takes the same time."""
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        found = digest(key)
        keys = {**self._from_environment, **self._from_file}
        matches = [name for name, accepted in keys.items() if hmac.compare_digest(found, accepted.sha256)]
        if scheme.lower() != "bearer" or not key or not matches:
            return None
        return matches[0], keys[matches[0]]

    def caller(self, authorization: str | None, default: KeyLimits) -> Caller:
        """Return the sender of a request from its `Authorization` header. `default`: limits of keys without their own.

        Raises HttpError 401 where the server asks for keys and the header holds none that it accepts.
        """
        if not self.is_required:
            return Caller(name="", limits=KeyLimits())
        found = self.find(authorization)
        if found is None:
            message = "no valid API key: send Authorization: Bearer <key>"
            raise HttpError(401, message, code="invalid_api_key", type="authentication_error")
        name, key = found
        return Caller(name=name, limits=limits_of(key, default), is_admin=key.admin)

    def _refresh(self) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            self._from_file = read_keys(self._file)
            self._stamp = stamp
        except ConfigError as error:
            logger.error("cannot read the API keys again, keeping those read before: %s", error)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._file or "")
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


def limits_of(key: KeyConfig, default: KeyLimits) -> KeyLimits:
    """Return the limits of a key: its own where it has them, else the default ones."""
    own = {name: getattr(key, name) for name in KeyLimits.model_fields}
    return default.model_copy(update={name: value for name, value in own.items() if value is not None})
