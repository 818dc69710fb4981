"""Streams over real HTTP: equal to the plain reply, never silent, errors in band, and cancelled with their client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Name three rivers."}]}
SLOW = {"aft": {"num_proposals": 6, "num_layers": 1}}
"""Sample 5 takes five seconds."""


def stream_lines(base_url: str, **changes: Any) -> list[str]:
    body = {**BODY, **changes, "stream": True}
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [line for line in response.iter_lines() if line]


def payloads(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_the_deltas_of_a_stream_add_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**BODY, seed=5)
    chunks = list(client.chat.completions.create(**BODY, seed=5, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == plain.choices[0].message.content
    assert len([piece for piece in pieces if piece]) == 8
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_the_first_token_leaves_when_it_is_made(base_url: str) -> None:
    """Sample 5 takes 600 ms per token: the sixth draft, and the last of six final answers."""
    arrivals: list[float] = []
    body = {**BODY, "model": "base@single", "n": 6, "stream": True}
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if '"index":5' in line and "word" in line:
                arrivals.append(time.perf_counter())
    assert arrivals[-1] - arrivals[0] > 2, "the answer came in one piece at its end"


def test_drafts_and_layers_are_reported_as_progress_on_request(base_url: str) -> None:
    aft = {"num_proposals": 4, "num_layers": 2, "progress": True, "include_proposals": True}
    lines = stream_lines(base_url, aft=aft, stream_options={"include_usage": True})
    told = [
        json.loads(data.removeprefix("data: "))["aft"]["progress"]
        for name, data in itertools.pairwise(lines)
        if name == "event: aft.progress"
    ]
    drafts = [progress for progress in told if "draft" in progress]
    assert [(progress["layer"], progress["num_done"]) for progress in drafts] == [
        (layer, done) for layer in (0, 1) for done in (1, 2, 3, 4)
    ]
    errors = [progress["draft"]["error"] for progress in drafts]
    assert errors.count("engine_error") == 2 and errors.count(None) == 6  # of each layer the fourth sample fails
    ends = [progress for progress in told if "layer_usage" in progress]
    assert [(end["layer"], end["num_done"], end["num_failed"]) for end in ends] == [(0, 4, 1), (1, 4, 1)]
    usage = payloads(lines)[-1]["usage"]["aft"]["layers"]
    assert [end["layer_usage"] for end in ends] == usage[:2]
    first_word = next(n for n, line in enumerate(lines) if '"content":"word' in line)
    assert max(n for n, line in enumerate(lines) if line == "event: aft.progress") < first_word


def test_drafts_keep_their_words_in_progress_events_unless_asked_for(base_url: str) -> None:
    lines = stream_lines(base_url, aft={"progress": True})
    assert sum(line == "event: aft.progress" for line in lines) == 4
    assert not any("draft" in line for line in lines)


def test_the_stock_client_reads_past_progress_events(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**BODY, seed=5, stream=True, extra_body={"aft": {"progress": True}}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**BODY, seed=5).choices[0].message.content
    assert sum(not chunk.choices for chunk in chunks) == 4


def test_progress_without_a_stream_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="set stream to true") as caught:
        client.chat.completions.create(**BODY, extra_body={"aft": {"progress": True}})
    assert caught.value.param == "aft.progress"


def test_the_async_client_streams_as_well(base_url: str) -> None:
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused") as client:
            stream = await client.chat.completions.create(**BODY, seed=5, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert len(asyncio.run(read()).split()) == 8


def test_the_usage_chunk_comes_last_and_only_when_asked_for(client: openai.OpenAI, base_url: str) -> None:
    plain: Any = client.chat.completions.create(**BODY, seed=5).usage
    asked = payloads(stream_lines(base_url, seed=5, stream_options={"include_usage": True}))
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["total_tokens"] == plain.total_tokens
    assert len(asked[-1]["usage"]["aft"]["layers"]) == 2
    assert not any("usage" in payload for payload in payloads(stream_lines(base_url, seed=5)))


def test_drafts_travel_with_the_end_of_a_stream(base_url: str) -> None:
    ends = [p for p in payloads(stream_lines(base_url, aft={"include_proposals": True})) if "aft" in p]
    [end] = ends
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [len(layer) for layer in end["aft"]["layers"]] == [3, 1]


def test_a_text_completion_streams_too(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model="base", prompt="Name three rivers.", seed=5, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == client.chat.completions.create(**BODY, seed=5).choices[0].message.content


def test_a_slow_first_token_is_announced_by_keep_alive_comments(base_url: str) -> None:
    started = time.perf_counter()
    lines = stream_lines(base_url, **SLOW)
    first_token = next(n for n, line in enumerate(lines) if '"content":"word' in line)
    assert time.perf_counter() - started > 4, "sample 5 was not slow; this test shows nothing"
    assert [line for line in lines[:first_token] if line.startswith(":")] == [": keep-alive"] * 2
    assert lines[-1] == "data: [DONE]"


def test_an_error_after_the_first_byte_is_an_event_and_the_stream_still_ends_with_done(base_url: str) -> None:
    lines = stream_lines(base_url, aft={"num_proposals": 4, "quorum": 4, "progress": True})
    [error] = [payload["error"] for payload in payloads(lines) if "error" in payload]
    assert error["code"] == "quorum_not_met"
    assert lines[-1] == "data: [DONE]"


def test_an_error_before_the_first_byte_is_a_status_also_of_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="answers usable") as raised:
        client.chat.completions.create(**BODY, stream=True, extra_body={"aft": {"num_proposals": 4, "quorum": 4}})
    assert raised.value.status_code == 503


def test_the_client_raises_its_api_error_for_an_error_event(client: openai.OpenAI) -> None:
    aft = {"num_proposals": 4, "quorum": 4, "progress": True}
    with pytest.raises(openai.APIError, match="answers usable"):
        list(client.chat.completions.create(**BODY, stream=True, extra_body={"aft": aft}))


def test_a_bad_request_is_refused_before_any_stream_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**BODY, stream=True, extra_body={"aft": {"num_layer": 1}})


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_a_client_that_goes_away_ends_every_sub_call_in_the_engine(
    base_url: str, num_samples_running: Callable[[], int], stream: bool
) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await client.post(f"{base_url}/v1/chat/completions", json=BODY | SLOW | {"stream": stream})

    async def ask_and_leave() -> float:
        """Return the seconds from the client's disconnect to the end of its last sample."""
        client = asyncio.create_task(ask())
        await asyncio.to_thread(wait_for, lambda: num_samples_running() == 6, 5)  # all six seeds of the drafts
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        gone = time.perf_counter()
        return await asyncio.to_thread(wait_for, lambda: num_samples_running() == 0, 3) - gone

    wait_for(lambda: num_samples_running() == 0, timeout_s=10)
    seconds = [asyncio.run(ask_and_leave()) for _ in range(3)]  # left alone each takes five seconds
    assert min(seconds) < 1, seconds  # a busy machine may delay any one


def test_clients_that_go_away_at_any_moment_leave_a_server_that_answers(base_url: str) -> None:
    """A disconnect must not cancel what the ingress replica has to report to the actor that keeps the limits."""

    rng = random.Random(0)

    async def ask_and_leave(http: httpx.AsyncClient) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 0.4)):
                await http.post(f"{base_url}/v1/chat/completions", json=BODY | {"stream": rng.random() < 0.5})

    async def leave_and_ask() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            for _ in range(30):
                await asyncio.gather(*(ask_and_leave(http) for _ in range(8)))
                assert (await http.post(f"{base_url}/v1/chat/completions", json=BODY)).status_code == 200

    asyncio.run(leave_and_ask())


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float:
    """Return when the condition became true; fail if it does not in time."""
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, f"still not true after {timeout_s} s"
        time.sleep(0.05)
    return time.perf_counter()
