"""The API over local engines, without Serve: what a client sees of a slow, failing or dying engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest

from aft_ray.config import KeyLimits, ScriptedEngineConfig, ServingConfig
from aft_ray.engines.base import EngineEvent, GenerateRequest
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference import Role
from aft_ray.inference.events import AnswerDelta, Event, LayerUsage
from aft_ray.inference.plan import Plan
from aft_ray.records import Message
from aft_ray.serving.aggregator import Aggregator
from aft_ray.serving.http import replies
from aft_ray.serving.http.api import make_api
from aft_ray.serving.limits.control import Control
from aft_ray.serving.limits.gate import ControlClient, Gate
from aft_ray.serving.limits.keys import Caller, KeyRing
from aft_ray.serving.limits.ledger import OpenRequest, RequestLedger
from aft_ray.serving.openai.body import ChatBody
from aft_ray.serving.openai.request import call_of
from aft_ray.serving.run_request import RunRequest
from aft_ray.serving.service import Service
from aft_ray.templates import AggregatorTemplate, MessagesFormat

SECRET = "the moon is made of cheese"
BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": SECRET}]}


class CrashingEngine(ScriptedEngine):
    """An engine with an unexpected defect, whose error text quotes the prompt."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        raise ZeroDivisionError(request.messages)
        yield


def local_ask(control: Control) -> ControlClient:
    """Ask a control in this process, without Serve."""

    async def ask(method: str, *args: Any, state: Callable[[], tuple[Any, ...]] = tuple, **kwargs: Any) -> Any:
        return getattr(control, method)(*args, *state(), **kwargs)

    return ask


def service_over(engine: ScriptedEngine, plan: Plan | None = None, **settings: Any) -> Service:
    role = Role(engine=engine, format=MessagesFormat())
    config = ServingConfig(engine=engine.config, plan=plan or Plan(num_proposals=2), **settings)
    return Service(
        config=config,
        answers=Aggregator(proposers=(role,), aggregator=role, template=AggregatorTemplate.load("aft")),
        keys=KeyRing(file=config.keys_file),
        gate=Gate(local_ask(Control(config.admission, config.adapters or {})), config),
        ledger=RequestLedger(config.ledger),
    )


def over_http(service: Service, use: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(run())


def post(service: Service, **changes: Any) -> httpx.Response:
    return over_http(service, lambda client: client.post("/v1/chat/completions", json=BODY | changes))


def test_an_engine_that_cannot_answer_is_a_bad_gateway() -> None:
    response = post(service_over(ScriptedEngine(ScriptedEngineConfig(fail_requests=True)), Plan(num_layers=0)))
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_error")


def test_a_body_of_another_content_type_is_refused_by_its_own_code() -> None:
    service = service_over(ScriptedEngine(ScriptedEngineConfig()))
    headers = {"content-type": "text/plain"}
    response = over_http(service, lambda client: client.post("/v1/chat/completions", content=b"{}", headers=headers))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_json", None)
    assert error["message"] == "the body is not JSON; send it with content-type: application/json"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_an_unforeseen_error_tells_the_client_nothing_and_the_log_no_prompt(
    stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 60)  # a comment that keeps the connection open begins a reply of 200
    logging.getLogger("ray.serve").propagate = True
    response = over_http(
        service_over(CrashingEngine(ScriptedEngineConfig()), Plan(num_layers=0)),
        lambda client: client.post(
            "/v1/chat/completions", json=BODY | {"stream": stream}, headers={"x-request-id": "r-17"}
        ),
    )
    assert response.status_code == 500
    assert "r-17" in response.text
    assert "ZeroDivision" not in response.text
    assert SECRET not in response.text
    assert "ZeroDivisionError" in caplog.text
    assert "r-17" in caplog.text
    assert SECRET not in caplog.text


def test_a_stream_over_a_dead_engine_still_ends_with_done() -> None:
    response = post(service_over(ScriptedEngine(ScriptedEngineConfig(fail_requests=True))), stream=True)
    lines = [line for line in response.text.split("\n\n") if line]
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert "error" in json.loads(lines[-2].removeprefix("data: "))
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_an_answer(stream: bool) -> None:
    plan = Plan(num_proposals=2, num_layers=0)
    reply = post(service_over(ScriptedEngine(ScriptedEngineConfig(empty_on=(0,))), plan), stream=stream)
    assert reply.status_code == 200
    if stream:
        assert '"error":{' not in reply.text and '"finish_reason":"stop"' in reply.text
    else:
        assert reply.json()["choices"][0]["message"]["content"] == ""


def test_not_ready_while_the_engine_does_not_answer() -> None:
    dead = service_over(ScriptedEngine(ScriptedEngineConfig(fail_requests=True)))
    assert over_http(dead, lambda client: client.get("/ready")).status_code == 503
    assert over_http(dead, lambda client: client.get("/health")).status_code == 200


def test_the_adapter_of_the_model_reaches_the_engine_in_every_layer() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    post(service_over(engine, adapters={"aft": "/adapters/aft"}), model="aft")
    post(service_over(engine, adapters={"aft": "/adapters/aft"}), model="base")
    assert [request.adapter for request in engine.requests] == ["/adapters/aft"] * 2 + [None] * 2


def test_the_draft_adapter_of_the_server_drafts_for_every_model() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    adapters = {"sft": "/adapters/sft", "aft": "/adapters/aft"}
    post(service_over(engine, topology="split", adapters=adapters, proposer_adapter="sft"), model="aft")
    assert [request.adapter for request in engine.requests] == ["/adapters/sft", "/adapters/aft"]


def test_two_requests_with_one_request_id_are_two_runs_in_the_engine() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    service = service_over(engine, Plan(num_layers=0))
    for _ in range(2):
        over_http(service, lambda c: c.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "again"}))
    assert len({request.request_id for request in engine.requests}) == 2


def test_a_conversation_keeps_its_turns_and_roles() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Name three rivers."},
    ]
    post(service_over(engine), messages=turns)
    assert list(engine.requests[0].messages) == turns
    assert list(engine.requests[1].messages)[-3:] == turns[-3:]


def test_a_run_whose_reply_is_gone_is_closed_before_its_request() -> None:
    order: list[str] = []

    class Endless(Aggregator):
        async def run(self, request: RunRequest, on_usage: Callable[[LayerUsage], None]) -> AsyncGenerator[Event, None]:
            try:
                yield AnswerDelta(text="a", num_tokens=1)
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)  # the engines need a moment to stop and to say what they have written
                on_usage(LayerUsage(layer=0, completion_tokens=7))
                order.append("run")

    service = service_over(ScriptedEngine(ScriptedEngineConfig()))
    service = dataclasses.replace(service, answers=Endless(**vars(service.answers)))

    async def look_once() -> OpenRequest:
        call = call_of(ChatBody.model_validate(BODY), service.config)
        opened = await service.open(call, Caller(name="", limits=KeyLimits()), "r-1", "chatcmpl-1")
        running = service.start(call, "r-1/chatcmpl-1", opened)
        assert await running.next(1.0) == AnswerDelta(text="a", num_tokens=1)
        assert await running.next(0.01) is None
        running.stop()
        await asyncio.sleep(0.1)
        order.append("later")
        return opened

    opened = asyncio.run(look_once())
    assert order == ["run", "later"]
    assert (opened.bill.status, opened.bill.num_tokens) == ("cancelled", 7)


class SlowFormat(MessagesFormat):
    """A tokenizer that takes a second for a megabyte."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        time.sleep(len(messages[-1]["content"]) / 1e6)
        return super().prompt_ids(messages)


def test_a_long_prompt_delays_no_other_request() -> None:
    service = service_over(
        ScriptedEngine(ScriptedEngineConfig(num_tokens=1, max_model_len=9_999_999)), max_body_bytes=4_000_000
    )
    assert isinstance(service.answers, Aggregator)
    slow = dataclasses.replace(service.answers.aggregator, format=SlowFormat())
    service = dataclasses.replace(
        service, answers=dataclasses.replace(service.answers, proposers=(slow,), aggregator=slow)
    )

    async def ask(client: httpx.AsyncClient, content: str) -> float:
        body = {"messages": [{"role": "user", "content": content}], "aft": {"num_layers": 0}}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return time.monotonic()

    async def run() -> tuple[float, float]:
        transport = httpx.ASGITransport(make_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            long = asyncio.create_task(ask(client, "x" * 2_000_000))
            await asyncio.sleep(0.2)  # it is being counted
            return await ask(client, "short"), await long

    short_done, long_done = asyncio.run(run())
    assert short_done < long_done - 1
