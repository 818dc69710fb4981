"""HTTP without a network: an httpx transport that asks an application of this Ray cluster over its Serve handle.

    client = httpx.AsyncClient(transport=ServeTransport("aft-quickstart-0a1b2c3d"))
    await client.get("http://aft-quickstart-0a1b2c3d/health")

It works from any process on any node: where Serve's HTTP server listens, and whether there is one, does not matter.
Everything behind the socket is what an HTTP client meets. A request whose ingress replica is lost is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

MAX_LOST = 3
"""Number of ingress replicas that one request may lose before it fails."""


@dataclass(frozen=True, kw_only=True)
class InsideRequest:
    """An HTTP request as it crosses a Serve handle."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class InsideReply:
    """The reply to it, which is whole: nothing streams."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class ServeTransport(httpx.AsyncBaseTransport):
    """Sends requests to one application. Errors of Ray and Serve become `httpx.TransportError`."""

    def __init__(self, app_name: str) -> None:
        self.app_name = app_name
        self._handle: Any = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        from ray import serve
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
        from ray.serve.exceptions import RayServeException

        asked = InsideRequest(
            method=request.method,
            url=str(request.url),
            headers=tuple(request.headers.items()),
            body=await request.aread(),
        )
        for attempt in range(MAX_LOST + 1):
            try:
                if self._handle is None:
                    self._handle = serve.get_deployment_handle("Ingress", app_name=self.app_name)
                reply: InsideReply = await self._handle.http.remote(asked)
            except (ActorDiedError, ActorUnavailableError) as error:
                if attempt == MAX_LOST:
                    raise httpx.ReadError(f"{self.app_name} lost {attempt + 1} ingress replicas in a row") from error
            except (RayError, RayServeException) as error:
                reason = f"{self.app_name} does not answer: {type(error).__name__}: {error}"
                raise httpx.ConnectError(reason) from error
            else:
                return httpx.Response(reply.status, headers=list(reply.headers), content=reply.body, request=request)
        raise AssertionError("unreachable")
