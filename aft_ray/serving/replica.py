"""One engine in one Serve replica: the deployment class behind `HandleEngine`.

The replica builds its engine from a config, in its own process, so that nothing heavy is ever pickled. A caller that
goes away cancels the call; closing the engine's generator then aborts the request in the engine.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from aft_ray.config import EngineConfig
from aft_ray.engines import EngineEvent, EngineInfo, GenerateRequest, build_engine
from aft_ray.errors import ConfigError
from aft_ray.serving.metrics import engine_samples


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """What one replica is doing now."""

    process_id: int
    num_requests: int
    """Requests whose samples are being written. 0 after a cancelled one proves that nothing leaked."""
    num_samples: int
    """Samples they ask for."""


def check_adapters(adapters: Mapping[str, str]) -> None:
    """Every adapter folder is there and is a peft adapter, or ConfigError: better at the start than per request."""
    for name, folder in adapters.items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ConfigError(
                f"serving.adapters.{name}: {folder} has no adapter_config.json; expected a peft adapter folder"
            )


class EngineReplica:
    """Serve deployment class. `generate` is called with `handle.options(stream=True)`, the rest plainly."""

    def __init__(self, config: EngineConfig, adapters: Mapping[str, str], pool: str) -> None:
        if config.type in {"vllm", "transformers"}:
            check_adapters(adapters)
        self.engine = build_engine(config)
        self._pool = pool
        self._num_requests = 0
        self._num_samples = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """The engine's events, as they come. Cancelling the call closes the engine's generator."""
        self._count(1, len(request.seeds))
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
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

    async def status(self) -> ReplicaStatus:
        return ReplicaStatus(process_id=os.getpid(), num_requests=self._num_requests, num_samples=self._num_samples)

    async def check_health(self) -> None:
        """Serve asks regularly, and restarts the replica when this raises or hangs."""
        await self.engine.check()

    async def __del__(self) -> None:
        """Serve awaits this after the last request, before it ends the process."""
        if hasattr(self, "engine"):  # the constructor may have refused
            await self.engine.close()
