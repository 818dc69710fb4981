"""Whatever a client sends, the reply is an answer or an OpenAI error: no 5xx, no hang, no traceback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from aft_ray.serving.http.api import make_api
from aft_ray.serving.service import Service
from tests.serving.hostile import CHAT, VALID, hostile_bodies
from tests.serving.test_ingress import over_http, post, service_over

TYPES = ("application/json", "application/json; charset=utf-16", "text/plain", "application/x-www-form-urlencoded", "")
MESSAGES = [{"role": "user", "content": "Name three rivers."}]


def service(**settings: Any) -> Service:
    return service_over(
        ScriptedEngine(ScriptedEngineConfig(num_tokens=2, follows_json_schema=True)), Plan(num_proposals=2), **settings
    )


def complaint(status: int, kind: str, text: str, sent: bytes) -> str | None:
    """Return what is wrong with a reply, or None."""
    if "Traceback" in text or 'File "' in text or "internal_error" in text:
        return f"{status}: {text[:300]}"
    if status == 200:
        if kind.startswith("text/event-stream"):
            return None if text.endswith("data: [DONE]\n\n") else f"a stream without an end: {text[-200:]}"
        return None if json.loads(text)["choices"] else "no choices"
    error = json.loads(text)["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or len(text) > 2000:
        return f"not an OpenAI error: {text[:300]}"
    if status == 504 and b"deadline_s" in sent:
        return None  # it asked for a deadline that no engine can meet
    return None if status in {400, 404, 413} else f"{status}: {text[:300]}"


@pytest.mark.parametrize("num_bodies", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_thousands_of_hostile_bodies_get_an_answer_or_a_typed_refusal(num_bodies: int) -> None:
    served = service()
    statuses: dict[int, int] = {}

    async def run() -> list[str]:
        complaints: list[str] = []
        transport = httpx.ASGITransport(make_api(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            for number, (path, body) in enumerate(hostile_bodies(num_bodies, seed=1)):
                kind = TYPES[number % len(TYPES)] if number % 7 == 0 else TYPES[0]
                async with asyncio.timeout(60):
                    reply = await client.post(path, content=body, headers={"content-type": kind})
                statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
                found = complaint(reply.status_code, reply.headers["content-type"], reply.text, body)
                if found:
                    complaints.append(f"{found}\n  for {body[:300]!r}")
        return complaints

    complaints = asyncio.run(run())
    assert not complaints, "\n".join([f"{len(complaints)} complaints", *complaints[:5]])
    assert statuses[200] > num_bodies / 50, f"the bodies are too broken to test much: {statuses}"
    assert statuses[400] > num_bodies / 5
    engine: ScriptedEngine = served.answers.aggregator.engine  # type: ignore[attr-defined]
    followed = {request.json_schema for request in engine.requests}
    assert len(followed) > num_bodies / 100, "too few schemas reach the engine to test much"
    assert engine.num_running == 0


def test_hundreds_of_hostile_bodies_over_real_http(split_url: str) -> None:
    def send(sent: tuple[str, bytes]) -> str | None:
        path, body = sent
        headers = {"content-type": "application/json", "authorization": "Bearer key-two"}
        reply = httpx.post(split_url + path, content=body, headers=headers, timeout=120)
        return complaint(reply.status_code, reply.headers["content-type"], reply.text, body)

    with ThreadPoolExecutor(8) as pool:
        complaints = [found for found in pool.map(send, hostile_bodies(300, seed=2)) if found]
    assert not complaints, "\n".join(complaints[:5])
    assert httpx.get(f"{split_url}/ready").status_code == 200


@pytest.mark.parametrize("stated", [True, False], ids=["length stated", "length not stated"])
def test_a_body_beyond_the_limit_is_refused_with_the_limits_name(stated: bool) -> None:
    body = json.dumps({"messages": MESSAGES, "user": "x" * 5000}).encode()

    async def pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    content: Any = body if stated else pieces()
    headers = {"content-type": "application/json"}
    reply = over_http(service(max_body_bytes=2048), lambda client: client.post(CHAT, content=content, headers=headers))
    assert reply.status_code == 413
    assert "max_body_bytes 2048" in reply.json()["error"]["message"]
    assert over_http(
        service(max_body_bytes=8192), lambda client: client.post(CHAT, content=body, headers=headers)
    ).is_success


def test_a_large_body_over_real_http_is_refused_and_the_server_answers_on(base_url: str) -> None:
    body = {"messages": MESSAGES, "user": "x" * 3_000_000}
    reply = httpx.post(base_url + CHAT, json=body, timeout=60)
    assert (reply.status_code, "max_body_bytes" in reply.text) == (413, True)
    assert httpx.get(f"{base_url}/health").status_code == 200


def test_a_conversation_beyond_the_limit_is_refused_by_name() -> None:
    reply = post(service(max_messages=3), messages=MESSAGES * 4)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    assert "at most 3" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"aft": {"final": {"top_k": 2**40}}}, "top_k"),
        ({"aft": {"final": {"stop": ["x"] * 300}}}, "stop"),
        ({"aft": {"proposal": {"stop": ["x" * 300]}}}, "stop"),
    ],
)
def test_limits_hold_for_the_aft_object_too(body: dict[str, Any], param: str) -> None:
    reply = post(service(), **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_reply_to_a_wrong_method_names_the_right_one() -> None:
    reply = over_http(service(), lambda client: client.get(CHAT))
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_the_valid_body_that_the_hostile_ones_are_made_from_is_answered() -> None:
    body = {key: value for key, value in VALID.items() if key != "prompt"}
    reply = over_http(service(), lambda client: client.post(CHAT, json=body))
    assert reply.status_code == 200 and '"error":{' not in reply.text


@pytest.fixture(scope="module")
def cross_origin() -> Iterator[Any]:
    def ask(**settings: Any) -> httpx.Response:
        headers = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
        return over_http(service(**settings), lambda client: client.options(CHAT, headers=headers))

    yield ask


def test_pages_of_other_origins_may_not_ask_unless_they_are_named(cross_origin: Any) -> None:
    assert "access-control-allow-origin" not in cross_origin().headers
    assert "access-control-allow-origin" not in cross_origin(cors_origins=("https://other.example.org",)).headers
    named = cross_origin(cors_origins=("https://chat.example.org",))
    assert named.headers["access-control-allow-origin"] == "https://chat.example.org"
