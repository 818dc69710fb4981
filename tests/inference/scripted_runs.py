"""Helpers for these tests: short ways to run a plan, and scripted models that each misbehave in one way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.base import EngineEvent, GenerateRequest, Sample, TokenDelta
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.fan_in import Emit
from aft_ray.inference import Answer, Event, Finished, LayerDone, Plan, ProposalDone, Role, propose_and_aggregate
from aft_ray.records import Message
from aft_ray.templates import AggregatorTemplate, MessagesFormat

T = TypeVar("T")

MESSAGES: tuple[Message, ...] = ({"role": "user", "content": "Name three rivers."},)


def scripted(**knobs: Any) -> ScriptedEngine:
    return ScriptedEngine(ScriptedEngineConfig(**knobs))


def role(engine: ScriptedEngine, adapter: str | None = None) -> Role:
    return Role(engine=engine, format=MessagesFormat(), adapter=adapter)


def start(
    plan: Plan,
    proposer: ScriptedEngine | Role | list[Role],
    aggregator: ScriptedEngine | Role | None = None,
    **kwargs: Any,
) -> AsyncGenerator[Event, None]:
    """Start a run of `plan`. A single engine takes both roles."""
    roles: list[Any] = [
        role(part) if isinstance(part, ScriptedEngine) else part for part in (proposer, aggregator or proposer)
    ]
    settings = {"prompt_id": "p-1", "messages": MESSAGES, "template": AggregatorTemplate.load("aft"), **kwargs}
    return propose_and_aggregate(plan=plan, proposer=roles[0], aggregator=roles[1], **settings)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and check that it leaves no task behind."""

    async def leaving_nothing() -> T:
        async with asyncio.timeout(20):
            result = await coroutine
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks left behind: {others}"
        return result

    return asyncio.run(leaving_nothing())


def run_plan(plan: Plan, proposer: Any, aggregator: Any = None, **kwargs: Any) -> list[Event]:
    """Return every event of a run that succeeds."""
    events, error = run_until_error(plan, proposer, aggregator, **kwargs)
    if error is not None:
        raise error
    return events


def run_until_error(
    plan: Plan, proposer: Any, aggregator: Any = None, **kwargs: Any
) -> tuple[list[Event], Exception | None]:
    """Return the events of a run and the exception that ended it, if one did."""
    told: list[Event] = []

    async def read() -> Exception | None:
        try:
            async with aclosing(start(plan, proposer, aggregator, **kwargs)) as events:
                async for event in events:
                    told.append(event)
        except Exception as error:
            return error
        return None

    error = run(read())
    return told, error


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def drafts(events: list[Event], layer: int) -> list[Answer]:
    """Return the answers of a layer below the last, by index."""
    answers = [event.answer for event in events if isinstance(event, ProposalDone) and event.answer.layer == layer]
    return sorted(answers, key=lambda answer: answer.index)


def layers_done(events: list[Event]) -> list[LayerDone]:
    return [event for event in events if isinstance(event, LayerDone)]


def prompt_of(request: GenerateRequest) -> str:
    """Return all the text that a request shows the model."""
    return "\n".join(message["content"] for message in request.messages)


class StallingEngine(ScriptedEngine):
    """Samples in `stall_on` write `stall_after` tokens and then hang until they are cancelled."""

    def __init__(self, stall_on: set[int], stall_after: int = 3, **knobs: Any) -> None:
        super().__init__(ScriptedEngineConfig(**knobs))
        self.stall_on, self.stall_after = stall_on, stall_after

    async def _write(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        if index not in self.stall_on:
            return await super()._write(request, index, emit)
        self.num_running += 1
        self.num_prompt_tokens += self._num_prompt_tokens(request)
        try:
            for _ in range(self.stall_after):
                self.num_tokens += 1
                request.count(index, 1)
                if request.stream:
                    emit(TokenDelta(index=index, text="word ", num_tokens=1))
            await asyncio.Event().wait()
        finally:
            self.num_running -= 1


class BreakingEngine(ScriptedEngine):
    """Every request ends after `num_samples` samples: with `error`, or, without one, as if nothing had happened."""

    def __init__(self, num_samples: int, error: Exception | None, **knobs: Any) -> None:
        super().__init__(ScriptedEngineConfig(**knobs))
        self.num_samples, self.error = num_samples, error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        num_done = 0
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if isinstance(event, Sample) and num_done == self.num_samples:
                    if self.error is not None:
                        raise self.error
                    return
                num_done += isinstance(event, Sample)
                yield event


class RoutingEngine(ScriptedEngine):
    """Sends each request to the engine that `choose` picks for it."""

    def __init__(self, choose: Callable[[GenerateRequest], ScriptedEngine]) -> None:
        super().__init__(ScriptedEngineConfig())
        self.choose = choose

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        async with aclosing(self.choose(request).generate(request)) as events:
            async for event in events:
                yield event


class CachingEngine(ScriptedEngine):
    """Computes a request's prompt for its first sample only, and reports the cached tokens."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if isinstance(event, Sample) and event.index > 0:
                    event = dataclasses.replace(event, num_cached_tokens=event.num_prompt_tokens)
                yield event


class FailingLateEngine(ScriptedEngine):
    """Every sample fails after its last token, and its tokens are not reported with the failure."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if isinstance(event, Sample):
                    event = dataclasses.replace(event, text="", num_tokens=0, finish_reason="error", error="too late")
                yield event
