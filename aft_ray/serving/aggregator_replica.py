"""The deployment that answers: a replica runs the whole plan of a request, next to its own engine.

    Ingress --one streamed call--> Aggregator replica --streamed calls--> Proposer replicas

With topology `shared` its own engine writes the drafts too, and nothing leaves the process before the final answer.
With `split` drafts come from the proposer pools that it holds handles to; hidden layers and the final layer are
written here.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from aft_ray.config import EngineConfig, TracesConfig
from aft_ray.errors import AftError
from aft_ray.inference import Role
from aft_ray.inference.events import AnswerDelta, Event, Finished, LayerUsage
from aft_ray.records import Message
from aft_ray.serving.aggregator import Aggregator
from aft_ray.serving.replica import Bills, EngineReplica
from aft_ray.serving.replica_calls import Routed, by_own_transport
from aft_ray.serving.run_request import PoolInfo, RunFailed, RunRequest
from aft_ray.templates import AggregatorTemplate
from aft_ray.templates.loading import load_format

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class AggregatorReplica(EngineReplica):
    """Serve deployment class. `run` is called with `handle.options(stream=True)`, the rest plainly."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str],
        *proposers: DeploymentHandle,
        template: str,
        shares: Sequence[float],
        proposers_take_adapters: bool,
        stream_interval_s: float = 0.0,
        least_lora_rank: int = 0,
        traces: TracesConfig | None = None,
    ) -> None:
        super().__init__(config, adapters, "Aggregator", stream_interval_s, least_lora_rank, traces)
        self.proposers = tuple(by_own_transport(handle) for handle in proposers)
        self.template = AggregatorTemplate.load(template)
        self.shares = shares
        self.proposers_take_adapters = proposers_take_adapters
        self._connecting: asyncio.Task[Aggregator] | None = None
        self._usage: Bills[list[LayerUsage]] = Bills()

    async def connected(self) -> Aggregator:
        """Return the aggregator over its own engine and the proposer pools, which it first waits for."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Aggregator:
        from aft_ray.serving.handle_engine import HandleEngine

        own = Role(engine=self.hosted, format=await asyncio.to_thread(load_format, self.hosted.info))
        proposers: list[Role] = []
        for handle, share in zip(self.proposers, self.shares, strict=True):
            engine = await HandleEngine.connect(handle)
            prompt_format = await asyncio.to_thread(load_format, engine.info)
            proposers.append(Role(engine=engine, format=prompt_format, share=share))
        return Aggregator(
            proposers=tuple(proposers) or (own,),
            aggregator=own,
            template=self.template,
            proposers_take_adapters=self.proposers_take_adapters,
        )

    async def run(self, routed: Routed[RunRequest]) -> AsyncGenerator[Event | RunFailed, None]:
        """Yield what the ingress sends on: the final answer as it is written, and drafts where the client sees them.

        A run that fails ends with `RunFailed`. What a cancelled one cost is told by `usage_of`.
        """
        request = routed.payload
        usage: list[LayerUsage] = []
        with self._usage.keeping(request.run_id, lambda: usage):
            try:
                aggregator = await self.connected()
                events = (
                    aggregator.run(request, usage.append)
                    if self.traces is None or request.trace is None
                    else self.traces.run(request, request.trace, aggregator, usage.append)
                )
                async with aclosing(events):
                    async for event in events:
                        if isinstance(event, Finished):
                            yield dataclasses.replace(event, layers=event.layers[-1:], messages=())
                        elif isinstance(event, AnswerDelta) or request.shows_drafts:
                            yield event
            except AftError as error:
                yield RunFailed(error=error, usage=tuple(usage))

    async def run_whole(self, routed: Routed[RunRequest]) -> list[Event | RunFailed]:
        """Return what `run` yields, for a request that nobody watches: Serve then makes one call and no stream."""
        async with aclosing(self.run(routed)) as events:
            return [event async for event in events]

    async def usage_of(self, routed: Routed[str]) -> list[LayerUsage] | None:
        """Return what a cancelled run cost, by its id; None where it never began here."""
        return await self._usage.of(routed.payload)

    async def tokens_of(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        return await (await self.connected()).tokens_of(text)

    async def text_of(self, ids: Sequence[int]) -> str:
        return await (await self.connected()).text_of(ids)

    async def pool_info(self) -> PoolInfo:
        return (await self.connected()).info

    async def probe(self, adapter: str | None = None) -> None:
        await (await self.connected()).probe(adapter)
