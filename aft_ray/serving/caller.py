"""Who sent a request, from its key: name, limits, and whether it may use `/admin`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aft_ray.config import KeyLimits
from aft_ray.serving.http_errors import HttpError
from aft_ray.serving.keys import limits_of

if TYPE_CHECKING:
    from aft_ray.serving.service import Service


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Empty name: the server asks for no key."""

    name: str
    limits: KeyLimits
    is_admin: bool = False


def caller_of(authorization: str | None, service: Service) -> Caller:
    """HttpError 401 without an accepted key, where the server asks for one."""
    default = service.config.admission.per_key
    if not service.keys.is_asked_for:
        return Caller(name="", limits=KeyLimits())
    found = service.keys.find(authorization)
    if found is None:
        message = "no valid API key: send Authorization: Bearer <key>"
        raise HttpError(401, message, code="invalid_api_key", type="authentication_error")
    name, key = found
    return Caller(name=name, limits=limits_of(key, default), is_admin=key.admin)
