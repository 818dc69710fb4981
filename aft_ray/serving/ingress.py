"""The deployment that receives HTTP: it runs the API of `api.py` over one or more pools of engine replicas.

Serve cannot pass a streaming response on from one deployment to another, so the algorithm runs here, over
`HandleEngine`s, and the tokens of the last layer are sent as they are written. A client that disconnects cancels its
run, and with it every request in the engines. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI

from aft_ray.config import ServingConfig
from aft_ray.inference import Role
from aft_ray.serving.admin import keep_watching
from aft_ray.serving.api import make_api
from aft_ray.serving.gate import ControlActorClient, Gate
from aft_ray.serving.handle_engine import HandleEngine
from aft_ray.serving.keys import KeyRing, refuse_open_server
from aft_ray.serving.ledger import RequestLedger
from aft_ray.serving.service import Service
from aft_ray.templates import AggregatorTemplate
from aft_ray.templates.loading import load_format

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class Ingress:
    """Serve deployment class. Serve asks for its app once, when the replica starts."""

    def __init__(
        self,
        config: ServingConfig,
        key_digests: Sequence[str],
        aggregator: DeploymentHandle,
        *proposers: DeploymentHandle,
    ) -> None:
        self.config = config
        self.keys = KeyRing(key_digests, config.keys_file)
        self.tasks: list[asyncio.Task[None]] = []
        self.aggregator = aggregator
        self.proposers = proposers

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Connect to the engine pools, which waits until they run, and build the app."""
        refuse_open_server(await asyncio.to_thread(bound_host), self.keys.is_required)
        aggregator = await self._role_over(self.aggregator)
        service = Service(
            config=self.config,
            aggregator=aggregator,
            proposers=await self._proposer_roles() or (aggregator,),
            template=AggregatorTemplate.load(self.config.templates.aggregator),
            keys=self.keys,
            gate=Gate(ControlActorClient(), self.config),
            ledger=RequestLedger(self.config.ledger),
        )
        await service.gate.renew()
        self.service = service
        self.tasks = [asyncio.create_task(service.gate.keep_renewing()), asyncio.create_task(keep_watching(service))]
        return make_api(service)

    async def _role_over(self, handle: DeploymentHandle) -> Role:
        """Return the engines behind a handle as a role, with the prompt format of their model."""
        engine = await HandleEngine.connect(handle)
        in_context = self.config.templates.in_context
        return Role(engine=engine, format=await asyncio.to_thread(load_format, engine.info.tokenizer, in_context))

    async def _proposer_roles(self) -> tuple[Role, ...]:
        roles = [await self._role_over(handle) for handle in self.proposers]
        shares = [pool.share for pool in self.config.proposers] or [1.0] * len(roles)
        return tuple(dataclasses.replace(role, share=share) for role, share in zip(roles, shares, strict=True))

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
