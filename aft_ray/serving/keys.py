"""Who may ask. The accepted keys come from an environment variable; only their sha256 leaves the process that reads it.

`serve_app` and `build_app` read the variable where they run; replicas and Serve's own records see digests.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence

from aft_ray.config import ServingConfig
from aft_ray.errors import ConfigError


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
    """Digests of the accepted keys; none when the server asks for no key."""
    if config.api_keys_env is None:
        return ()
    keys = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            f"serving.api_keys_env: the environment variable {config.api_keys_env} is not set or empty; "
            "expected the accepted keys, comma separated"
        )
    return tuple(digest(key) for key in keys)


def refuse_open_server(host: str, has_keys: bool) -> None:
    """ConfigError when anyone on the network could use the server."""
    if not has_keys and not is_loopback(host):
        raise ConfigError(
            f"serving.host: {host} can be reached from other machines, and there are no API keys. "
            "Set serving.api_keys_env to the name of an environment variable with keys, or bind to 127.0.0.1"
        )


def is_accepted(authorization: str | None, digests: Sequence[str]) -> bool:
    """Whether an `Authorization: Bearer <key>` header holds an accepted key. Takes the same time for any key."""
    scheme, _, key = (authorization or "").partition(" ")
    found = digest(key.strip())
    matches = [hmac.compare_digest(found, accepted) for accepted in digests]
    return scheme.lower() == "bearer" and any(matches)
