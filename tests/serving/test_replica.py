"""Serve replaces a replica whose engine is dead or silent for too long."""

from __future__ import annotations

import asyncio
import time

import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import EngineError
from aft_ray.serving import replica as module
from aft_ray.serving.replica import EngineReplica

pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'EngineReplica.__del__'")  # Serve awaits it, a test cannot
SILENT = ScriptedEngineConfig(seconds_per_token=3600, tokenizer="any: so it takes ids, as an engine of ours")


def silent_replica(monkeypatch: pytest.MonkeyPatch) -> tuple[EngineReplica, ScriptedEngine]:
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    replica = EngineReplica(SILENT, {}, "Proposer")
    engine = replica.hosted.engine
    assert isinstance(engine, ScriptedEngine)
    return replica, engine


def test_an_engine_that_writes_nothing_fails_its_health_check_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, engine = silent_replica(monkeypatch)

    async def check() -> None:
        await asyncio.sleep(0.25)  # its last event is too long ago
        with pytest.raises(EngineError, match="wrote no token"):
            await replica.check_health()

    started = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - started < 5
    assert (len(engine.requests), engine.num_running) == (1, 0)


def test_an_engine_that_has_just_written_something_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, engine = silent_replica(monkeypatch)
    asyncio.run(replica.check_health())
    assert engine.requests == []
