"""Who may ask. Only the sha256 of a key is ever kept: of those in an environment variable, made where it is read; of
those in a file, by whoever wrote the file.

    alice: {sha256: 0a4f..., max_requests: 4, tokens_per_minute: 200000}
    ops:   {sha256: 93bc..., admin: true}

The file is read again when it changes; one that cannot be read leaves the keys as they were. A key is known by its name
in ledger, metrics and limits.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aft_ray.config import KeyConfig, KeyLimits, ServingConfig, validate
from aft_ray.config.loading import read_yaml
from aft_ray.errors import ConfigError
from aft_ray.serving.http_errors import HttpError

logger = logging.getLogger("ray.serve.aft_ray")

LOOK_S = 1.0
"""How often the file is looked at, at most."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name: whatever it means today, it may mean another address tomorrow


def digest(key: str) -> str:
    """What is kept of a key: its sha256."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def key_digests(config: ServingConfig) -> tuple[str, ...]:
    """Digests of the keys in the environment variable; none when the config names none."""
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
    """The keys of a file by name. ConfigError names the file, the key and what is wrong; a hash is never quoted."""
    raw = read_yaml(Path(file))
    keys = {}
    for name, settings in raw.items():
        try:
            keys[str(name)] = validate(KeyConfig, settings, origin=f"{file}: {name}")
        except ConfigError as error:
            if "sha256" in str(error):
                raise ConfigError(f"{file}: {name}: sha256: expected 64 digits 0-9a-f, the sha256 of a key") from None
            raise
    if not keys:
        raise ConfigError(f"{file}: no keys in it; expected lines such as  alice: {{sha256: ...}}")
    return keys


def asks_for_keys(config: ServingConfig) -> bool:
    """Whether nobody is answered without a key."""
    return config.api_keys_env is not None or config.keys_file is not None


def refuse_open_server(host: str, has_keys: bool) -> None:
    """ConfigError when anyone on the network could use the server."""
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
    def is_asked_for(self) -> bool:
        """Whether a request needs a key. Not whether there is one: with all keys revoked nobody gets in."""
        return bool(self._from_environment) or self._file is not None

    def find(self, authorization: str | None) -> tuple[str, KeyConfig] | None:
        """Name and settings of the key in an `Authorization: Bearer <key>` header. Takes the same time for any key."""
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        found = digest(key.strip())
        keys = {**self._from_environment, **self._from_file}
        matches = [name for name, accepted in keys.items() if hmac.compare_digest(found, accepted.sha256)]
        if scheme.lower() != "bearer" or not matches:
            return None
        return matches[0], keys[matches[0]]

    def caller(self, authorization: str | None, default: KeyLimits) -> Caller:
        """Return the sender of a request from its `Authorization` header. `default`: limits of keys without their own.

        Raises HttpError 401 where the server asks for keys and the header holds none that it accepts.
        """
        if not self.is_asked_for:
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
            logger.error("keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._file or "")
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


def limits_of(key: KeyConfig, default: KeyLimits) -> KeyLimits:
    """The limits of a key: its own where it has them."""
    own = {name: getattr(key, name) for name in KeyLimits.model_fields}
    return default.model_copy(update={name: value for name, value in own.items() if value is not None})
