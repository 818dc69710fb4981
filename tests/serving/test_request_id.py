"""One id from header to engine, error, log and reply; and no prompt in any log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from tests.serving.test_ingress import BODY, CrashingEngine, over_http, service_over

CHAT = "/v1/chat/completions"
SECRET = "the moon is made of blue cheese"


def send(engine: ScriptedEngine, request_id: str | None, **body: Any) -> httpx.Response:
    headers = {} if request_id is None else {"x-request-id": request_id}
    service = service_over(engine, Plan(num_proposals=2))
    return over_http(service, lambda client: client.post(CHAT, json=BODY | body, headers=headers))


def test_the_engines_requests_carry_the_clients_id() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    send(engine, "r-17")
    assert [request.request_id.split("/")[0] for request in engine.requests] == ["r-17", "r-17"]


def test_a_request_without_an_id_gets_one_that_its_reply_and_its_engine_requests_share() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    reply = send(engine, None)
    assert len(reply.headers["x-request-id"]) == 32
    assert engine.requests[0].request_id.startswith(reply.headers["x-request-id"])


@pytest.mark.parametrize("body", [{"n": 0}, {"model": "gpt-4o"}, {"max_tokens": 10**6}])
def test_a_refusal_carries_the_id_as_well(body: dict[str, Any]) -> None:
    assert len(send(ScriptedEngine(ScriptedEngineConfig()), None, **body).headers["x-request-id"]) == 32
    page = over_http(service_over(ScriptedEngine(ScriptedEngineConfig())), lambda client: client.get("/nowhere"))
    assert len(page.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    "strange", ["x" * 200, "a b", "id\tINFO all is well", "café"], ids=["long", "space", "tab", "é"]
)
def test_an_id_that_could_forge_a_log_line_is_not_used(strange: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").propagate = True
    engine = CrashingEngine(ScriptedEngineConfig())
    service = service_over(engine, Plan(num_layers=0))
    headers = {"x-request-id": strange.encode("latin-1")}
    reply = over_http(service, lambda client: client.post(CHAT, json=BODY, headers=headers))
    assert reply.status_code == 500
    assert "ZeroDivisionError" in caplog.text and strange not in caplog.text


def test_no_prompt_and_no_answer_is_in_any_log_of_a_served_run(base_url: str) -> None:
    import ray

    message = [{"role": "user", "content": SECRET}]
    for changes in (
        {},
        {"stream": True},
        {"aft": {"num_proposals": 4, "quorum": 4}},
        {"aft": {"num_proposals": 6, "deadline_s": 0.2}},
        {"messages": [{"role": "user", "content": SECRET * 10_000}]},
        {"temperature": SECRET},
        {SECRET: 1},
    ):
        body = {"model": "base", "messages": message, **changes}
        answer = httpx.post(base_url + CHAT, json=body, headers={"x-request-id": "no-secrets"}, timeout=60)
        assert answer.headers["x-request-id"] == "no-secrets"
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any("Ingress" in path.name for path in logs), "no log of the ingress: this test would show nothing"
    assert not [path.name for path in logs if SECRET in path.read_text(errors="replace")]
    assert not [path.name for path in logs if "word-" in path.read_text(errors="replace")]
