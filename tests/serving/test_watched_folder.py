"""Several ingress replicas watch one folder: an adapter is served once, whichever replica dies."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aft_ray.config import AdmissionConfig, KeyLimits, ScriptedEngineConfig
from aft_ray.engines.base import EngineEvent, GenerateRequest
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.serving.adapters import VERSIONS, version_of
from aft_ray.serving.http import admin
from aft_ray.serving.limits import admission, gate
from aft_ray.serving.limits.control import Control
from aft_ray.serving.limits.gate import Gate
from aft_ray.serving.service import Service
from tests.serving.test_ingress import local_ask, service_over


class HangingEngine(ScriptedEngine):
    """An engine that never answers."""

    was_asked = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        self.was_asked = True
        await asyncio.Event().wait()
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "WATCH_S", 0.02)
    monkeypatch.setattr(gate, "RENEW_S", 0.02)
    monkeypatch.setattr(admission, "LOST_S", 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "watched"


def put(folder: Path, name: str = "aft", weights: str = "some") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "adapter_config.json").write_text("{}")
    (folder / name / "adapter_model.safetensors").write_text(weights)


def replica(control: Control, folder: Path, engine: ScriptedEngine | None = None) -> Service:
    service = service_over(engine or ScriptedEngine(ScriptedEngineConfig()), adapters_dir=str(folder))
    return dataclasses.replace(service, gate=Gate(local_ask(control), service.config))


@contextmanager
def living(service: Service) -> Iterator[None]:
    """Run the background tasks of a replica until it dies."""
    tasks = [asyncio.create_task(service.gate.keep_renewing()), asyncio.create_task(admin.keep_watching(service))]
    yield
    for task in tasks:
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def names(service: Service) -> set[str]:
    return set(service.gate.table.adapters)


def test_an_adapter_whose_installer_dies_is_installed_by_another(folder: Path) -> None:
    async def run() -> None:
        control = Control(AdmissionConfig(), {})
        engine = HangingEngine(ScriptedEngineConfig())
        first, second = replica(control, folder, engine), replica(control, folder)
        with living(second):
            with living(first):
                assert await first.gate.may_watch()
                put(folder)
                await until(lambda: engine.was_asked)
                await asyncio.sleep(2 * admission.LOST_S)
                assert names(second) == set()
            await until(lambda: names(second) == {"aft"})

    asyncio.run(run())


def test_a_name_that_was_removed_stays_so_whoever_watches_next(folder: Path) -> None:
    async def run() -> None:
        control = Control(AdmissionConfig(), {})
        first, second = replica(control, folder), replica(control, folder)
        with living(second):
            with living(first):
                put(folder)
                await until(lambda: names(second) == {"aft"} and "aft" in second.gate.table.taken)
                await first.gate.change(move={"aft": None})
            put(folder, "next")
            await until(lambda: names(second) == {"next"})

    asyncio.run(run())


def test_a_new_control_hears_what_has_been_taken(folder: Path) -> None:
    async def run() -> None:
        first = replica(Control(AdmissionConfig(), {}), folder)
        with living(first):
            put(folder)
            await until(lambda: "aft" in first.gate.table.taken)
            await first.gate.change(move={"aft": None})
            first.gate.ask = local_ask(Control(AdmissionConfig(), {}))
            put(folder, "next")
            await until(lambda: names(first) == {"next"})

    asyncio.run(run())


def test_an_adapter_that_cannot_be_served_is_logged_once_and_delays_no_other(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin.logger, "propagate", True)

    broken: list[str | None] = []

    class Refusing(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
            if request.adapter in broken:
                raise ZeroDivisionError
            async for event in super().generate(request):
                yield event

    async def run() -> None:
        service = replica(Control(AdmissionConfig(), {}), folder, Refusing(ScriptedEngineConfig()))
        with living(service):
            put(folder, "bad", "bad weights")
            broken.append(str(folder / VERSIONS / version_of(folder / "bad")))
            put(folder, "good")
            await until(lambda: set(service.gate.table.taken) == {"bad", "good"})
            await asyncio.sleep(0.3)
            assert names(service) == {"good"}
            assert caplog.text.count("cannot serve the adapter") == 1
            put(folder, "bad", "mended weights")
            await until(lambda: names(service) == {"bad", "good"})

    asyncio.run(run())


def test_old_versions_are_pruned_but_none_that_is_needed(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six versions of `aft`, of which one is named by the config, one is used by a request, one by another name."""
    monkeypatch.setattr(admin.logger, "propagate", True)
    versions: list[Path] = []

    def made(weights: str, name: str = "aft") -> str:
        put(folder / "new", name, weights)
        versions.append(folder / VERSIONS / version_of(folder / "new" / name))
        return str(folder / "new" / name)

    async def run() -> None:
        control = Control(AdmissionConfig(), {})
        service = replica(control, folder)
        for weights in ("configured", "old", "named", "used"):
            await admin.install(service, "aft", made(weights))
            if weights == "named":
                await service.gate.change(move={"other": service.gate.table.adapters["aft"]})
        config = service.config.model_copy(update={"adapters": {"mine": str(versions[0])}, "keep_adapter_versions": 1})
        service = dataclasses.replace(service, config=config)
        ticket = admission.Ticket(id="r-1", key="", num_tokens=1)
        used = await service.gate.enter(ticket, KeyLimits(), ["aft"])
        (folder / VERSIONS / "notes").mkdir()
        (folder / VERSIONS / "0123456789ab.01234567.partial").mkdir()
        await admin.install(service, "aft", made("newer"))
        assert all(version.is_dir() for version in versions)  # a request that nobody reports may still use one
        for version in (folder / VERSIONS).iterdir():
            os.utime(version, (1, 1))
        await admin.install(service, "aft", made("newest"))
        configured, old, named, in_use, newer, newest = versions
        assert not old.exists() and not (folder / VERSIONS / "0123456789ab.01234567.partial").exists()
        kept = (configured, named, in_use, newer, newest, folder / VERSIONS / "notes")
        assert all(version.is_dir() for version in kept)  # the name has just left `newer`
        assert str(old) in caplog.text and str(newer) not in caplog.text.partition("removed")[2].partition("\n")[0]
        service.gate.leave(used.ticket, 0)
        for version in (folder / VERSIONS).iterdir():
            os.utime(version, (1, 1))
        await admin.install(service, "aft", made("last"))
        assert [version.is_dir() for version in versions] == [True, False, True, False, False, True, True]

    asyncio.run(run())
