"""A pool of engine replicas as an `Engine`, so that the code that runs on a local engine runs unchanged on replicas.

    engine = await HandleEngine.connect(handle)
    async with aclosing(engine.generate(request)) as events: ...

The answers that a lost replica was writing are requested from another one, unless a client has already read part of
them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta
from aft_ray.serving.replica_calls import MAX_LOST, ReplicaCalls, ReplicaLost, answer_of, sent

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.aft_ray")


class HandleEngine:
    """An `Engine` over a `DeploymentHandle` of `EngineReplica`s."""

    def __init__(self, handle: DeploymentHandle, info: EngineInfo) -> None:
        self._handle = handle
        self._calls = ReplicaCalls(handle, method="generate", bill="num_written")
        self._info = info

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> HandleEngine:
        """Wait until a replica describes its engine, and return the engine over the handle."""
        return cls(handle, await handle.info.remote())

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        left = list(range(len(request.seeds)))
        """Positions of the samples that have not ended yet."""
        for attempt in range(MAX_LOST + 1):
            positions, begun = tuple(left), set[int]()
            asked = dataclasses.replace(
                request,
                request_id=f"{request.request_id}/again-{attempt}" if attempt else request.request_id,
                seeds=tuple(request.seeds[position] for position in positions),
                written=None,
            )

            def count(written: Counter[int], positions: Sequence[int] = positions) -> None:
                for number, num_tokens in written.items():
                    request.count(positions[number], num_tokens)

            calls = self._calls.events(asked.request_id, asked, len(asked.seeds), count)
            try:
                async with aclosing(calls) as events:
                    async for event in events:
                        event = dataclasses.replace(event, index=positions[event.index])
                        if isinstance(event, TokenDelta):
                            begun.add(event.index)
                        else:
                            left.remove(event.index)
                        yield event
                return
            except ReplicaLost as error:
                for position in begun & set(left):
                    left.remove(position)
                    yield Sample.failed(position, str(error), seed=request.seeds[position])
                if not left:
                    return
                if attempt == MAX_LOST or request.json_schema is not None:  # what killed one may kill the next
                    raise
                logger.warning("request %s: lost a replica, asking another one", request.request_id)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        for _ in range(MAX_LOST):
            try:
                return await self._score(prompt_ids, continuation_ids, adapter)
            except ReplicaLost:
                logger.warning("scoring %d tokens: lost a replica, asking another one", len(continuation_ids))
        return await self._score(prompt_ids, continuation_ids, adapter)

    async def _score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None
    ) -> list[float]:
        scores: list[float] = await answer_of(
            sent(self._handle.score, list(prompt_ids), list(continuation_ids), adapter)
        )
        return scores

    async def check(self) -> None:
        """Check one replica. Serve checks every replica by itself and restarts those that fail."""
        await answer_of(self._handle.check_health.remote())

    async def close(self) -> None:
        """Do nothing: the replicas belong to Serve."""
