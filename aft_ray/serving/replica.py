"""One engine in one Serve replica: the deployment class of proposer pools, and the base of the aggregator's.

The replica builds its engine from a config, in its own process, so nothing heavy is ever pickled. A caller that
disconnects cancels the call; closing the engine's generator then aborts the request in the engine, and `bill` tells the
caller afterwards what was written until then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from aft_ray.config import EngineConfig, TracesConfig
from aft_ray.engines import Engine, EngineEvent, EngineInfo, GenerateRequest, Sampling, TokenDelta, build_engine
from aft_ray.engines.adapter_file import read_adapter, why_vllm_cannot
from aft_ray.errors import ConfigError, EngineDead, EngineError
from aft_ray.serving.metrics import engine_samples
from aft_ray.serving.replica_calls import Routed
from aft_ray.serving.traces import Traces, traces_of

logger = logging.getLogger("ray.serve.aft_ray")
T = TypeVar("T")

PROBE_TIMEOUT_S = 30.0
"""How long an engine may take to write one token before its replica is replaced. Serve's own limit on a health check is
longer."""
SILENT_S = 30.0
"""A health check asks for a token only if the engine has written none for this long."""
KEEP_BILL_S = 10.0
"""How long the bill of a call is kept after its end, for a caller that cancelled it before it saw the end."""


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
    num_tokens: int
    """Tokens that its engine has written since it started, for whomever, cancelled answers included."""


def check_adapters(adapters: Mapping[str, str], config: EngineConfig) -> None:
    """Raise ConfigError at the start, not at the first request, unless the engine can answer with every adapter."""
    for name, folder in adapters.items():
        try:
            adapter = read_adapter(folder)
        except EngineError as error:
            raise ConfigError(f"serving.adapters.{name}: {error}; expected a peft adapter folder") from None
        reason = why_vllm_cannot(adapter, config.max_lora_rank) if config.type == "vllm" else None
        if reason is not None:
            raise ConfigError(f"serving.adapters.{name}: {folder}: {reason}")


@contextmanager
def ending_with_its_engine() -> Iterator[None]:
    """End this process when the block finds its engine dead.

    A replica without an engine answers at once, so Serve would send it every request until three health checks have
    failed. A process that is gone gets none: Serve starts another one, and callers ask another replica.
    """
    try:
        yield
    except EngineDead as error:
        logger.error("this replica ends with its engine: %s", error)
        logging.shutdown()
        os._exit(1)


class Bills(Generic[T]):
    """What the calls of this replica cost, for callers that cancelled them and so never saw their end."""

    def __init__(self) -> None:
        self._bills: dict[str, tuple[asyncio.Event, Callable[[], T]]] = {}

    @contextmanager
    def keeping(self, call_id: str, cost: Callable[[], T]) -> Iterator[None]:
        """Keep the bill of a call while the block runs, and for `KEEP_BILL_S` longer."""
        ended = asyncio.Event()
        self._bills[call_id] = (ended, cost)
        try:
            yield
        finally:
            ended.set()
            asyncio.get_running_loop().call_later(KEEP_BILL_S, self._bills.pop, call_id, None)

    async def of(self, call_id: str) -> T | None:
        """Return what a call cost, when it has ended; None for a call that never began here."""
        ended, cost = self._bills.get(call_id, (None, None))
        if ended is None or cost is None:
            return None
        await ended.wait()
        return cost()


class HostedEngine:
    """The engine of this replica, as an `Engine` that counts its samples and ends the process when it is dead."""

    def __init__(self, engine: Engine, pool: str, stream_interval_s: float, traces: Traces | None = None) -> None:
        self.engine = engine
        self.traces = traces
        self.num_requests = 0
        self.num_samples = 0
        self.num_tokens = 0
        self.last_event = time.monotonic()
        self._pool = pool
        self._stream_interval_s = stream_interval_s

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield the engine's events, with deltas merged that follow each other closely."""
        written = Counter[int]() if request.written is None else request.written
        request = replace(request, written=written)
        self._count(1, len(request.seeds))
        try:
            with ending_with_its_engine():
                written_now = self.engine.generate(request)
                if self.traces is not None and request.trace is not None:
                    written_now = self.traces.samples(request, self.info, written_now)
                async with aclosing(merged_deltas(written_now, self._stream_interval_s)) as events:
                    async for event in events:
                        self.last_event = time.monotonic()
                        yield event
        finally:
            self.num_tokens += written.total()
            self._count(-1, -len(request.seeds))

    def _count(self, num_requests: int, num_samples: int) -> None:
        self.num_requests += num_requests
        self.num_samples += num_samples
        engine_samples(self._pool, self.num_samples)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        with ending_with_its_engine():
            return await self.engine.score(prompt_ids, continuation_ids, adapter)

    async def check(self) -> None:
        """Raise where the engine is dead or writes nothing.

        An engine that has just written something is healthy; only a silent one is asked for a token.
        """
        with ending_with_its_engine():
            await self.engine.check()
        if self.engine.info.takes_messages or time.monotonic() - self.last_event < SILENT_S:
            return  # a replica cannot replace a remote endpoint, whose tokens cost money
        try:
            with ending_with_its_engine():
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
                self.last_event = time.monotonic()
                if not isinstance(event, TokenDelta) and event.error is not None:
                    raise EngineError(f"the engine cannot write a token: {event.error}")

    async def close(self) -> None:
        await self.engine.close()


class EngineReplica:
    """Serve deployment class of a pool. `generate` is called with `handle.options(stream=True)`, the rest plainly."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str],
        pool: str,
        stream_interval_s: float = 0.0,
        least_lora_rank: int = 0,
        traces: TracesConfig | None = None,
    ) -> None:
        if config.type in {"vllm", "transformers"}:
            check_adapters(adapters, config)
        engine = build_engine(config, adapters=adapters.values(), least_lora_rank=least_lora_rank, is_server=True)
        self.traces = traces_of(traces, pool)
        self.hosted = HostedEngine(engine, pool, stream_interval_s, self.traces)
        self._written: Bills[Counter[int]] = Bills()

    async def generate(self, routed: Routed[GenerateRequest]) -> AsyncGenerator[EngineEvent, None]:
        """Yield the engine's events. Cancelling the call closes the engine's generator."""
        written = Counter[int]()
        request = replace(routed.payload, written=written)
        with self._written.keeping(request.request_id, lambda: written):
            async with aclosing(self.hosted.generate(request)) as events:
                async for event in events:
                    yield event

    async def num_written(self, routed: Routed[str]) -> Counter[int] | None:
        """Return the tokens of each sample of a cancelled request, by its id; None where it never began here."""
        return await self._written.of(routed.payload)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        return await self.hosted.score(prompt_ids, continuation_ids, adapter)

    async def info(self) -> EngineInfo:
        return self.hosted.info

    async def activity(self) -> ReplicaActivity:
        return ReplicaActivity(
            process_id=os.getpid(),
            num_requests=self.hosted.num_requests,
            num_samples=self.hosted.num_samples,
            num_tasks=len(asyncio.all_tasks()),
            num_tokens=self.hosted.num_tokens,
        )

    def record_routing_stats(self) -> dict[str, int]:
        """Report the samples under way to every caller's `SampleRouter`."""
        return {"num_samples": self.hosted.num_samples}

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """Report the samples under way to the pool's autoscaling (`scaling.BySamples`)."""
        return {"num_samples": self.hosted.num_samples}

    async def check_health(self) -> None:
        """Raise where the engine is dead or silent. Serve calls this regularly and then replaces the replica."""
        await self.hosted.check()

    async def __del__(self) -> None:
        """Close the engine. Serve awaits this after the last request, before it ends the process."""
        if hasattr(self, "hosted"):  # the constructor may have raised
            await self.hosted.close()


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
