"""Asking a real HTTP server on a loopback port."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pyarrow as pa
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import TypeAdapter

from aft_ray.config import ScriptedEngineConfig, ServingConfig
from aft_ray.engines.base import Sampling
from aft_ray.errors import EngineError
from aft_ray.evaluation.ask import ANSWERS, AskedAnswer, answer_row, ask, request_body
from aft_ray.inference.plan import Plan
from aft_ray.records import Message
from aft_ray.serving.openai.body import ChatBody
from aft_ray.serving.openai.request import call_of

from .rows import draft, usage

PLAN = Plan(num_proposals=2, num_layers=1, proposal=Sampling(temperature=1.0, top_k=50), draft_deadline_s=9.5)
MESSAGES: list[Message] = [{"role": "user", "content": "Name a river — now."}]


@dataclass
class Endpoint:
    """A little server that says what it is told to, and keeps what it was asked."""

    url: str = ""
    reply: Response = field(default_factory=Response)
    replies_before: list[Response] = field(default_factory=list)
    """What is answered before `reply`, once each."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    delay_s: float = 0.0


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    """The server in a thread, on a port the system chose."""
    endpoint, app = Endpoint(), FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        endpoint.asked.append(await request.json())
        await asyncio.sleep(endpoint.delay_s)
        return endpoint.replies_before.pop(0) if endpoint.replies_before else endpoint.reply

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    endpoint.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield endpoint
    running.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    """The server as new, answering with a complete reply."""
    server.asked, server.delay_s, server.reply, server.replies_before = [], 0.0, JSONResponse(reply()), []
    return server


def reply(**changes: Any) -> dict[str, Any]:
    """What an aft_ray endpoint says to PLAN."""
    final = {**draft(0, "The Nile"), "inputs": [1, 0], "length_action": "drop_longest: dropped 1"}
    body: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "The Nile"}, "finish_reason": "stop"}],
        "aft": {"plan": {}, "layers": [[draft(0, "Nile"), draft(1, "", error="empty answer")], [final]]},
        "usage": {"prompt_tokens": 30, "aft": {"layers": [usage(0, 1, 1, num_failed=1), usage(1, 1, 2)]}},
    }
    return {**body, **changes}


def ask_it(endpoint: Endpoint, plan: Plan = PLAN, suffix: str = "", timeout: float = 30) -> AskedAnswer:
    async def work() -> AskedAnswer:
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            return await ask(client, endpoint.url + suffix, "aft", MESSAGES, plan, seed=7)

    return asyncio.run(work())


def test_everything_the_endpoint_tells_is_kept(endpoint: Endpoint) -> None:
    asked = ask_it(endpoint)
    assert (asked.answer, asked.finish_reason) == ("The Nile", "stop")
    assert [[one.text for one in layer] for layer in asked.layers] == [["Nile", ""], ["The Nile"]]
    assert asked.layers[0][1].error == "empty answer"
    assert (asked.layers[1][0].inputs, asked.layers[1][0].length_action) == ((1, 0), "drop_longest: dropped 1")
    assert [(layer.layer, layer.completion_tokens, layer.num_failed) for layer in asked.usage] == [(0, 1, 1), (1, 2, 0)]
    assert asked.seconds > 0


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_base_url_may_end_in_v1_or_not(endpoint: Endpoint, suffix: str) -> None:
    ask_it(endpoint, suffix=suffix)
    assert len(endpoint.asked) == 1


def test_the_whole_plan_crosses_the_wire_and_comes_back_equal(endpoint: Endpoint) -> None:
    ask_it(endpoint)
    [body] = endpoint.asked
    assert (body["model"], body["messages"], body["seed"], body["stream"]) == ("aft", MESSAGES, 7, False)
    assert body["aft"].pop("include_proposals") is True
    assert TypeAdapter(Plan).validate_python(body["aft"]) == PLAN
    assert body["aft"]["quorum"] is None, "an open setting must be spelled out, or the server's default would rule"


def test_the_body_names_every_setting_of_the_plan() -> None:
    body = request_body("aft", MESSAGES, PLAN, 7)
    assert body["aft"].keys() == {one.name for one in dataclasses.fields(Plan)} | {"include_proposals"}


def test_an_answer_becomes_a_row_of_the_answers_schema(endpoint: Endpoint) -> None:
    prompt = {"prompt_id": "p-1", "messages": MESSAGES, "task": "constraints", "split": "held_out", "proposals": []}
    table = pa.Table.from_pylist([answer_row("aft", prompt, ask_it(endpoint))], schema=ANSWERS)
    [row] = table.to_pylist()
    assert (row["prompt_id"], row["system"], row["split"], row["reference"]) == ("p-1", "aft", "held_out", None)
    assert row["layers"][0][0]["text"] == "Nile"
    assert row["usage"][1]["completion_tokens"] == 2
    assert table.column_names == ANSWERS.names


def test_a_refusal_tells_its_status_and_the_servers_words(endpoint: Endpoint) -> None:
    error = {"message": "num_proposals 99: this server allows at most 16", "type": "invalid_request_error"}
    endpoint.reply = JSONResponse({"error": error}, status_code=400)
    with pytest.raises(EngineError, match="status 400: num_proposals 99: this server allows at most 16"):
        ask_it(endpoint)


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (PlainTextResponse("upstream is gone", status_code=503), "status 503: upstream is gone"),
        (JSONResponse({"error": "overloaded"}, status_code=429), "status 429: overloaded"),
        (JSONResponse(["odd"], status_code=500), "status 500: odd"),
        (Response(status_code=502), r"status 502: \(empty reply\)"),
        (PlainTextResponse("hello"), "JSONDecodeError.*reply: hello"),
        (JSONResponse(reply(choices=[])), "IndexError"),
        (JSONResponse(reply(aft={})), "KeyError: 'layers'"),
        (JSONResponse(reply(usage={"prompt_tokens": 3})), "lacks what an aft_ray endpoint says.*KeyError: 'aft'"),
        (JSONResponse(reply(usage={"aft": {"layers": [usage(0, 1, 1)]}})), r"asked for num_layers 1 .* 1 layer\(s\)"),
        (JSONResponse(reply(aft={"layers": []})), "asked for the proposals, the reply holds none"),
        (
            JSONResponse(reply(choices=[{"message": {"content": None}, "finish_reason": "stop"}])),
            "the answer is NoneType, expected text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reply_that_is_no_answer_is_an_engine_error_that_says_why(
    endpoint: Endpoint, response: Response, words: str
) -> None:
    endpoint.reply = response
    with pytest.raises(EngineError, match=words):
        ask_it(endpoint)


def test_a_server_that_takes_too_long_is_an_engine_error(endpoint: Endpoint) -> None:
    endpoint.delay_s = 2
    with pytest.raises(EngineError, match="no answer: ReadTimeout"):
        ask_it(endpoint, timeout=0.1)


def test_nobody_at_the_address_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9/v1/chat/completions: no answer: ConnectError"):
        ask_it(Endpoint(url="http://127.0.0.1:9"))


def test_a_busy_server_is_asked_again_after_the_pause_that_it_asks_for(endpoint: Endpoint) -> None:
    busy = [Response(status_code=status, headers={"Retry-After": "0.3"}) for status in (429, 503)]
    endpoint.replies_before = [*busy]
    started = time.monotonic()
    assert ask_it(endpoint).answer == "The Nile"
    assert (len(endpoint.asked), time.monotonic() - started >= 0.6) == (3, True)
    endpoint.replies_before = [Response(status_code=429, headers={"Retry-After": "7200"})]
    with pytest.raises(EngineError, match="status 429"):
        ask_it(endpoint)


def test_at_l_0_no_proposals_are_needed(endpoint: Endpoint) -> None:
    endpoint.reply = JSONResponse(
        reply(aft={"layers": [[draft(0, "Nile")]]}, usage={"aft": {"layers": [usage(0, 1, 1)]}})
    )
    assert ask_it(endpoint, plan=Plan(num_layers=0)).answer == "The Nile"


def test_at_l_0_the_sampling_of_aggregations_is_not_sent_as_the_endpoint_refuses_it() -> None:
    body = request_body("aft", MESSAGES, Plan(num_layers=0), 7)
    assert {"final", "aggregation"}.isdisjoint(body["aft"]) and "proposal" in body["aft"]
    config = ServingConfig(engine=ScriptedEngineConfig(), adapters={"aft": "/adapters/aft"})
    assert call_of(ChatBody.model_validate(body), config).plan.proposal == Plan().proposal
