"""Everything in a message reaches the model, or is refused in a sentence that names it."""

from __future__ import annotations

from typing import Any

import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from tests.serving.test_ingress import post, service_over

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
USER = {"role": "user", "content": "Hi"}


def sent(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that the engine gets for a conversation."""
    engine = ScriptedEngine(ScriptedEngineConfig())
    response = post(service_over(engine, Plan(num_layers=0)), messages=list(messages))
    assert response.status_code == 200, response.text
    return [dict(message) for message in engine.requests[0].messages]


def refusal(*messages: dict[str, Any]) -> tuple[int, str, str]:
    response = post(service_over(ScriptedEngine(ScriptedEngineConfig())), messages=list(messages))
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def test_tool_calls_results_names_and_reasoning_reach_the_engine() -> None:
    history = [
        {"role": "user", "content": "Weather in Rome?", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I need the tool."},
        {"role": "tool", "content": "17 degrees", "tool_call_id": "call_1"},
    ]
    assert sent(*history) == [history[0], {**history[1], "content": ""}, history[2]]


def test_what_clients_send_back_with_an_answer_is_accepted() -> None:
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "audio": None, "id": "m-1"}
    assert sent(USER, {**answer, "tool_calls": None, "function_call": None}, USER)[1] == {
        "role": "assistant",
        "content": "Hello",
    }


def test_a_refusal_and_the_newer_name_of_the_reasoning_are_read() -> None:
    answer = {"role": "assistant", "content": None, "refusal": "I cannot.", "reasoning": "No."}
    assert sent(USER, answer, USER)[1] == {
        "role": "assistant",
        "content": "I cannot.",
        "reasoning_content": "No.",
    }


def test_system_and_developer_messages_at_the_beginning_are_one() -> None:
    late = {"role": "system", "content": "Late"}
    first = [{"role": "system", "content": "One"}, {"role": "developer", "content": [{"type": "text", "text": "Two"}]}]
    assert sent(*first, USER, late) == [{"role": "system", "content": "One\n\nTwo"}, USER, late]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused_in_a_sentence(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:..."}}]
    assert refusal(USER, {"role": "user", "content": parts}) == (
        400,
        "messages.1.content",
        f"messages.1.content: part 1 is of type '{kind}'; this server reads text only",
    )


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ({"role": "user", "content": None}, "messages.0", "only an assistant's message may have no content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0", "only a message of the role assistant"),
        ({"role": "user", "content": "x", "audio": {"id": "a"}}, "messages.0", "no key 'audio'"),
        ({"role": "user", "content": 5}, "messages.0.content", "content is text"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "not JSON"}}]},
            "messages.0.tool_calls.0.function.arguments",
            "a JSON object, as text",
        ),
        ({"role": "function", "content": "x"}, "messages.0.role", "'tool'"),
    ],
)
def test_what_cannot_be_honoured_is_named(message: dict[str, Any], param: str, told: str) -> None:
    status, found, text = refusal(message)
    assert (status, found) == (400, param)
    assert told in text
