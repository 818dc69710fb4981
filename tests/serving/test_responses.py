"""`/v1/responses` with the stock client, over local engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from aft_ray.serving.http.api import make_api
from aft_ray.serving.openai.responses_api import messages_of
from aft_ray.serving.service import Service
from tests.serving.test_ingress import service_over

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


def engine(**knobs: Any) -> ScriptedEngine:
    return ScriptedEngine(ScriptedEngineConfig(**{"answers": ("the Nile and the Niger",), **knobs}))


def asked(service: Service, use: Callable[[openai.AsyncOpenAI, httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(make_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
            return await use(client, http)

    return asyncio.run(run())


def created(service: Service, **body: Any) -> Any:
    return asked(service, lambda client, _: client.responses.create(**{"model": "base", "input": "hi", **body}))


def test_an_answer_comes_as_a_response() -> None:
    found = created(service_over(engine(), Plan(num_proposals=2)), instructions="Be brief.")
    assert (found.status, found.output_text, found.instructions) == ("completed", "the Nile and the Niger", "Be brief.")
    assert [item.type for item in found.output] == ["message"]
    assert found.usage.output_tokens == 15
    assert found.usage.output_tokens_details.reasoning_tokens == 10  # two drafts


def test_instructions_and_items_reach_the_model_as_messages() -> None:
    model = engine()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I should look."}]},
        {"type": "function_call", "call_id": "c-1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c-1", "output": "rain"},
    ]
    created(service_over(model, Plan(num_layers=0)), input=items, instructions="Be brief.")
    [request] = model.requests
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "tool"]
    called = request.messages[2]
    assert called["reasoning_content"] == "I should look."
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    assert (request.messages[3]["content"], request.messages[3]["tool_call_id"]) == ("rain", "c-1")


@pytest.mark.parametrize(
    "plan", [Plan(num_layers=0), Plan(num_proposals=2, early_stop="exact")], ids=["model", "agreed"]
)
def test_the_stock_client_puts_a_stream_together(plan: Plan) -> None:
    async def stream(client: openai.AsyncOpenAI, _: httpx.AsyncClient) -> tuple[list[str], Any]:
        kinds = []
        async with client.responses.stream(model="base", input="Name rivers.") as events:
            async for event in events:
                kinds.append(event.type)
            return kinds, await events.get_final_response()

    kinds, response = asked(service_over(engine(), plan), stream)
    assert (response.output_text, response.status) == ("the Nile and the Niger", "completed")
    assert [kind for kind in kinds if not kind.endswith(".delta")] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert kinds.count("response.output_text.delta") >= 1


def test_a_tool_is_called_plainly_and_in_a_stream() -> None:
    service = service_over(engine(calls_tools=True), Plan(num_proposals=2))

    async def stream(client: openai.AsyncOpenAI, _: httpx.AsyncClient) -> Any:
        async with client.responses.stream(model="base", input="hi", tools=[WEATHER]) as events:
            async for _event in events:
                pass
            return await events.get_final_response()

    for found in (created(service, tools=[WEATHER]), asked(service, stream)):
        [call] = [item for item in found.output if item.type == "function_call"]
        assert (call.name, call.status) == ("weather", "completed")
        assert json.loads(call.arguments)
        assert call.call_id


def test_an_answer_that_was_cut_is_incomplete() -> None:
    found = created(service_over(engine(), Plan(num_layers=0)), max_output_tokens=2)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output_text == "the Nile"


def test_a_run_that_fails_in_its_stream_says_so() -> None:
    async def read(_: openai.AsyncOpenAI, http: httpx.AsyncClient) -> list[str]:
        reply = await http.post("/responses", json={"model": "base", "input": "hi", "stream": True})
        return [json.loads(line[6:])["type"] for line in reply.text.splitlines() if line.startswith("data: ")]

    service = service_over(engine(fail_on=(0, 1)), Plan(num_proposals=2))
    assert asked(service, read)[-2:] == ["error", "response.failed"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "hi", "instrctions": "x"}, "instrctions"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "hi", "tools": [WEATHER]}, "tools"),
        ({"input": "hi", "temperature": 9}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    reply = asked(service_over(engine(), Plan(num_layers=0)), lambda _, http: http.post("/responses", json=body))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_text_is_one_question() -> None:
    assert messages_of("hi") == [{"role": "user", "content": "hi"}]
