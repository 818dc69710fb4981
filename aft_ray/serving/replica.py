"""One engine in one Serve replica: the deployment class behind `HandleEngine`.

The replica builds its engine from a config, in its own process, so nothing heavy is ever pickled. A caller that
disconnects cancels the call; closing the engine's generator then aborts the request in the engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from aft_ray.config import EngineConfig
from aft_ray.engines import EngineEvent, EngineInfo, GenerateRequest, Sampling, TokenDelta, build_engine
from aft_ray.errors import ConfigError, EngineError
from aft_ray.serving.metrics import engine_samples

UNREAD_DELTA_S = 0.25
"""Interval between two deltas of a sample that no client reads."""
PROBE_TIMEOUT_S = 30.0
"""How long an engine may take to write one token before its replica is replaced. Serve's own limit on a health check is
longer."""
SILENT_S = 30.0
"""A health check asks for a token only if the engine has written none for this long."""


@dataclass(frozen=True, kw_only=True)
class ReplicaActivity:
    """What one replica is doing now."""

    process_id: int
    num_requests: int
    """Number of requests being written. 0 after a cancelled request proves that nothing leaked."""
    num_samples: int
    """Number of samples of these requests."""
    num_tasks: int
    """Number of tasks on its event loop."""


def check_adapters(adapters: Mapping[str, str]) -> None:
    """Raise ConfigError at the start, not at the first request, unless every adapter folder holds a peft adapter."""
    for name, folder in adapters.items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ConfigError(
                f"serving.adapters.{name}: {folder} has no adapter_config.json; expected a peft adapter folder"
            )


class EngineReplica:
    """Serve deployment class. `generate` is called with `handle.options(stream=True)`, the rest plainly."""

    def __init__(
        self, config: EngineConfig, adapters: Mapping[str, str], pool: str, stream_interval_s: float = 0.0
    ) -> None:
        if config.type in {"vllm", "transformers"}:
            check_adapters(adapters)
        self.engine = build_engine(config)
        self._pool = pool
        self._stream_interval_s = stream_interval_s
        self._num_requests = 0
        self._num_samples = 0
        self._last_event = time.monotonic()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield the engine's events as they come. Cancelling the call closes the engine's generator."""
        interval_s = UNREAD_DELTA_S if request.is_unread else self._stream_interval_s
        self._count(1, len(request.seeds))
        try:
            async with aclosing(merged_deltas(self.engine.generate(request), interval_s)) as events:
                async for event in events:
                    self._last_event = time.monotonic()
                    yield event
        finally:
            self._count(-1, -len(request.seeds))

    def _count(self, num_requests: int, num_samples: int) -> None:
        self._num_requests += num_requests
        self._num_samples += num_samples
        engine_samples(self._pool, self._num_samples)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        return await self.engine.score(prompt_ids, continuation_ids, adapter)

    async def info(self) -> EngineInfo:
        return self.engine.info

    async def activity(self) -> ReplicaActivity:
        return ReplicaActivity(
            process_id=os.getpid(),
            num_requests=self._num_requests,
            num_samples=self._num_samples,
            num_tasks=len(asyncio.all_tasks()),
        )

    async def check_health(self) -> None:
        """Raise where the engine is dead or writes nothing. Serve calls this regularly and then replaces the replica.

        An engine that has just written something is healthy; only a silent one is asked for a token.
        """
        await self.engine.check()
        if self.engine.info.takes_messages or time.monotonic() - self._last_event < SILENT_S:
            return  # a replica cannot replace a remote endpoint, whose tokens cost money
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._probe()
        except TimeoutError:
            raise EngineError(f"the engine wrote no token in {PROBE_TIMEOUT_S:g} s") from None

    async def _probe(self) -> None:
        request = GenerateRequest(
            request_id=f"health-{time.monotonic_ns()}",
            prompt_ids=(1,),
            messages=(),
            sampling=Sampling(temperature=0, max_tokens=1),
            seeds=(0,),
        )
        async with aclosing(self.engine.generate(request)) as events:
            async for event in events:
                self._last_event = time.monotonic()
                if not isinstance(event, TokenDelta) and event.error is not None:
                    raise EngineError(f"the engine cannot write a token: {event.error}")

    async def __del__(self) -> None:
        """Close the engine. Serve awaits this after the last request, before it ends the process."""
        if hasattr(self, "engine"):  # the constructor may have raised
            await self.engine.close()


async def merged_deltas(
    events: AsyncGenerator[EngineEvent, None], interval_s: float
) -> AsyncGenerator[EngineEvent, None]:
    """Yield the events, with deltas of a sample merged that follow each other within `interval_s`.

    The first delta of a sample is never delayed, and its end releases what was held back. Serve does some work in two
    processes for each item, so without this a fast engine would wait for its own deltas to be sent.
    """
    held: dict[int, TokenDelta] = {}
    last_sent: dict[int, float] = {}
    async with aclosing(events):
        async for event in events:
            before = held.pop(event.index, None)
            if not isinstance(event, TokenDelta):
                if before is not None:
                    yield before
                yield event
                continue
            if before is not None:
                event = before.followed_by(event)
            now = time.monotonic()
            if now - last_sent.get(event.index, -interval_s) < interval_s:
                held[event.index] = event
                continue
            last_sent[event.index] = now
            yield event
