"""The deployment that receives HTTP: it runs the API of `http/api.py` and makes one streamed call per request.

Keys, limits, parsing and server-sent events are its work; it knows no token and no template. A client that disconnects
cancels its run, and with it every request in the engines. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI

from aft_ray.config import ServingConfig
from aft_ray.serving.aggregator_pool import AggregatorPool
from aft_ray.serving.http.admin import keep_watching
from aft_ray.serving.http.api import make_api
from aft_ray.serving.http.inside import InsideReply, InsideRequest
from aft_ray.serving.limits.gate import ControlActorClient, Gate
from aft_ray.serving.limits.keys import KeyRing, refuse_open_server
from aft_ray.serving.limits.ledger import RequestLedger
from aft_ray.serving.replica_calls import by_own_transport
from aft_ray.serving.service import Service, check_plan_fits
from aft_ray.serving.traces import traces_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class Ingress:
    """Serve deployment class. Serve asks for its app once, when the replica starts."""

    def __init__(self, config: ServingConfig, key_digests: Sequence[str], aggregator: DeploymentHandle) -> None:
        self.config = config
        self.keys = KeyRing(key_digests, config.keys_file)
        self.tasks: list[asyncio.Task[None]] = []
        self.aggregator = by_own_transport(aggregator)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Connect to the aggregators, which waits until they run, and build the app."""
        if self.config.route_prefix is not None:
            refuse_open_server(await asyncio.to_thread(bound_host), self.keys.is_required)
        service = Service(
            config=self.config,
            answers=await AggregatorPool.connect(self.aggregator, writes_drafts=self.config.topology == "shared"),
            keys=self.keys,
            gate=Gate(ControlActorClient(), self.config),
            ledger=RequestLedger(self.config.ledger),
            traces=traces_of(self.config.traces, "Ingress"),
        )
        check_plan_fits(self.config.plan, service.answers.info)
        await service.gate.renew()
        self.service = service
        self.tasks = [asyncio.create_task(service.gate.keep_renewing()), asyncio.create_task(keep_watching(service))]
        self.api = make_api(service)
        return self.api

    async def http(self, request: InsideRequest) -> InsideReply:
        """Answer a request that came over a Serve handle: as over HTTP, through the same API."""
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, timeout=None) as client:
            reply = await client.request(
                request.method, request.url, headers=list(request.headers), content=request.body
            )
        return InsideReply(status=reply.status_code, headers=tuple(reply.headers.items()), body=reply.content)

    async def drain(self) -> None:
        """Refuse new requests at all ingress replicas."""
        await self.service.gate.change(drain=True)

    async def activity(self) -> dict[str, int]:
        """Return what this replica is doing now, to find leaks."""
        return {"process_id": os.getpid(), "num_tasks": len(asyncio.all_tasks())}

    async def num_open(self) -> int:
        """Return the number of requests under way at all ingress replicas."""
        found = await self.service.gate.open_requests()
        return int(found["num_requests"])


def bound_host() -> str:
    """Return the host that Serve listens on. It may not be the config's: `serve deploy` binds to 0.0.0.0 by default."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "a replica runs under a Serve controller"
    return client.http_config.host or "127.0.0.1"  # None means that there is no HTTP server
