"""The aggregator replicas as the ingress asks them: one streamed call per request.

A run whose replica is lost begins again at another one, with the same seeds, unless a client has already read part of
its answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from aft_ray.inference.events import AnswerDelta, Event, Finished, LayerUsage
from aft_ray.records import Message
from aft_ray.serving.replica_calls import MAX_LOST, ReplicaCalls, ReplicaLost, answer_of, sent
from aft_ray.serving.run_request import PoolInfo, RunFailed, RunRequest

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.aft_ray")


class AggregatorPool:
    """`Answers` over a `DeploymentHandle` of `AggregatorReplica`s."""

    def __init__(self, handle: DeploymentHandle, info: PoolInfo, *, writes_drafts: bool) -> None:
        self._handle = handle
        self._calls = ReplicaCalls(handle, method="run", bill="usage_of", whole="run_whole")
        self._info = info
        self._writes_drafts = writes_drafts

    @classmethod
    async def connect(cls, handle: DeploymentHandle, *, writes_drafts: bool) -> AggregatorPool:
        """Wait until a replica describes its engines. `writes_drafts`: whether the replicas write them themselves."""
        return cls(handle, await handle.pool_info.remote(), writes_drafts=writes_drafts)

    @property
    def info(self) -> PoolInfo:
        return self._info

    def num_samples(self, request: RunRequest) -> int:
        """Return the most samples that a replica's own engine writes at once for a request."""
        num_hidden = request.plan.num_layers - (0 if self._writes_drafts else 1)
        return request.plan.num_proposals if num_hidden > 0 else request.final.num_choices

    async def run(self, request: RunRequest, on_usage: Callable[[LayerUsage], None]) -> AsyncGenerator[Event, None]:
        is_billed = False

        def bill(usage: Sequence[LayerUsage]) -> None:
            """Report a run once: as it tells at its end, or as its replica tells when it is cancelled."""
            nonlocal is_billed
            for layer in () if is_billed else usage:
                on_usage(layer)
            is_billed = True

        for attempt in range(MAX_LOST + 1):
            run_id = f"{request.run_id}/again-{attempt}" if attempt else request.run_id
            asked = dataclasses.replace(request, run_id=run_id)
            is_read, failure = False, None
            calls = self._calls.events(run_id, asked, self.num_samples(request), bill, at_once=not request.is_watched)
            try:
                async with aclosing(calls) as events:
                    async for event in events:
                        if isinstance(event, RunFailed):
                            bill(event.usage)
                            failure = event.error
                            continue
                        if isinstance(event, Finished):  # a layer that agreement made unnecessary has cost nothing
                            bill([usage for usage in event.usage if usage.decided_by != "agreement"])
                        is_read = is_read or (isinstance(event, AnswerDelta) and request.final.is_read)
                        yield event
            except ReplicaLost:
                # what killed one replica may kill the next: of what clients send, only schemas are compiled by engines
                if is_read or attempt == MAX_LOST or request.final.has_grammar:
                    raise
                logger.warning("run %s: lost a replica, asking another one", request.run_id)
                continue
            if failure is not None:
                raise failure
            return

    async def tokens_of(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        ids: tuple[int, ...] = await answer_of(sent(self._handle.tokens_of, text))
        return ids

    async def text_of(self, ids: Sequence[int]) -> str:
        text: str = await answer_of(sent(self._handle.text_of, ids))
        return text

    async def probe(self, adapter: str | None = None) -> None:
        await answer_of(sent(self._handle.probe, adapter))
