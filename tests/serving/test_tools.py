"""Tools: drafts see them described, the final answer calls them. Thinking: told from the answer, and given back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from aft_ray.config import OpenAIEngineConfig, ScriptedEngineConfig
from aft_ray.engines.openai import OpenAIEngine
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from tests.serving.local_server import serving
from tests.serving.test_final_layer import events_of, refused
from tests.serving.test_ingress import post, service_over

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}},
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
NAMED = {"type": "function", "function": {"name": "time"}}


def engine(**settings: Any) -> ScriptedEngine:
    return ScriptedEngine(ScriptedEngineConfig(**({"calls_tools": True, "answers": ("in Rome",)} | settings)))


def message_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


@pytest.mark.parametrize("plan", [Plan(num_proposals=2), Plan(num_layers=0)], ids=["aggregated", "single"])
def test_the_final_answer_calls_a_tool(plan: Plan) -> None:
    response = post(service_over(engine(), plan), tools=TOOLS)
    message = message_of(response)
    [call] = message["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"text": "in Rome"}
    assert message["content"] is None
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"


def test_drafts_cannot_call_tools_but_see_them_described() -> None:
    scripted = engine()
    post(service_over(scripted), tools=TOOLS)
    drafts, final = scripted.requests
    assert drafts.tool_use is None
    assert final.tool_use is not None and [dict(tool) for tool in final.tool_use.tools] == TOOLS
    described = drafts.messages[0]
    assert described["role"] == "system" and "Tells the weather." in described["content"]
    assert "Tells the weather." not in final.messages[0]["content"]


def test_a_streamed_call_has_its_name_once_and_adds_up_to_the_plain_one() -> None:
    [plain] = message_of(post(service_over(engine()), tools=TOOLS))["tool_calls"]
    events = events_of(post(service_over(engine()), tools=TOOLS, stream=True))
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", [])]
    assert len(pieces) > 1
    assert [piece.get("id") for piece in pieces] == [plain["id"], *[None] * (len(pieces) - 1)]
    assert [piece["function"].get("name") for piece in pieces] == ["weather", *[None] * (len(pieces) - 1)]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == plain["function"]["arguments"]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_named_tool_is_the_one_that_is_called() -> None:
    [call] = message_of(post(service_over(engine()), tools=TOOLS, tool_choice=NAMED))["tool_calls"]
    assert call["function"]["name"] == "time"


def test_tools_that_must_not_be_called_are_described_to_everybody() -> None:
    scripted = engine()
    message = message_of(post(service_over(scripted), tools=TOOLS, tool_choice="none"))
    assert message["content"] == "in Rome" and "tool_calls" not in message
    assert all("Tells the weather." in request.messages[0]["content"] for request in scripted.requests)
    assert all(request.tool_use is None for request in scripted.requests)


def test_an_engine_without_a_parser_refuses_tools_by_name_but_takes_those_it_must_not_call() -> None:
    response = post(service_over(engine(calls_tools=False)), tools=TOOLS)
    assert refused(response) == (400, "tools")
    assert post(service_over(engine(calls_tools=False)), tools=TOOLS, tool_choice="none").status_code == 200


@pytest.fixture(scope="module")
def remote() -> Iterator[tuple[str, ScriptedEngine]]:
    """Return the URL of another endpoint whose model calls tools, and its engine."""
    scripted = engine()
    with serving(service_over(scripted, Plan(num_layers=0))) as url:
        yield f"{url}/v1", scripted


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("asks_for_stream", [False, True], ids=["whole", "pieces"])
def test_tools_are_sent_on_to_a_remote_endpoint_with_the_final_layer(
    remote: tuple[str, ScriptedEngine], stream: bool, asks_for_stream: bool
) -> None:
    url, scripted = remote
    config = OpenAIEngineConfig(
        base_url=url, model="base", api_key_env=None, calls_tools=True, stream=asks_for_stream, max_retries=0
    )
    scripted.requests.clear()
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    asked = {"tools": TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False, "messages": history}
    response = post(service_over(OpenAIEngine(config)), **asked, stream=stream)  # type: ignore[arg-type]
    if stream:
        choices = [choice for event in events_of(response) for choice in event["choices"]]
        pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", [])]
        found = {"id": pieces[0]["id"], "function": {"name": pieces[0]["function"]["name"]}}
        found["function"]["arguments"] = "".join(piece["function"]["arguments"] for piece in pieces)
        assert choices[-1]["finish_reason"] == "tool_calls"
    else:
        [found] = message_of(response)["tool_calls"]
        assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert found["id"] and found["function"]["name"] == "time"
    assert json.loads(found["function"]["arguments"]) == {"text": "in Rome"}
    *drafts, final = scripted.requests
    assert [draft.tool_use for draft in drafts] == [None, None]
    assert final.tool_use is not None and [dict(tool) for tool in final.tool_use.tools] == TOOLS
    assert final.tool_use.choice == NAMED and not final.tool_use.is_parallel
    assert any(message.get("tool_calls") == [call] for draft in drafts for message in draft.messages)


@pytest.mark.parametrize("aft", [{"aggregator": "vote"}, {"early_stop": "exact"}], ids=["vote", "early stop"])
def test_a_plan_that_may_decide_without_writing_refuses_tools(aft: dict[str, Any]) -> None:
    assert refused(post(service_over(engine()), tools=TOOLS, aft=aft)) == (400, "tools")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nosuch"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
    ],
)
def test_a_wrong_tool_or_choice_is_named(body: dict[str, Any], param: str) -> None:
    assert refused(post(service_over(engine()), **body)) == (400, param)


def test_thinking_comes_back_beside_the_answer_plain_and_streamed() -> None:
    thinking = engine(thinking="First I think.")
    message = message_of(post(service_over(thinking)))
    assert (message["reasoning_content"], message["content"]) == ("First I think.", "in Rome")
    events = events_of(post(service_over(engine(thinking="First I think.")), stream=True))
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "First I think."
    assert "".join(delta.get("content", "") for delta in deltas) == "in Rome"


def test_an_aggregator_is_shown_answers_without_their_thinking_unless_the_plan_shows_it() -> None:
    scripted = engine(thinking="First I think.")
    post(service_over(scripted))
    post(service_over(scripted), aft={"show_thinking": True})
    hidden, shown = (scripted.requests[number].messages[0]["content"] for number in (1, 3))
    assert "in Rome" in hidden and "First I think." not in hidden
    assert "First I think.\n\nin Rome" in shown


def test_thinking_without_an_answer_is_no_draft_but_it_is_a_reply() -> None:
    cut = post(service_over(engine(thinking="one two three"), Plan(num_layers=0)), max_tokens=2)
    assert message_of(cut) == {"role": "assistant", "content": "", "refusal": None, "reasoning_content": "one two"}
    assert cut.json()["choices"][0]["finish_reason"] == "length"
    drafts = post(service_over(engine(thinking="one two three")), aft={"proposal": {"max_tokens": 2}})
    assert (drafts.status_code, drafts.json()["error"]["code"]) == (503, "quorum_not_met")


def test_usage_counts_drafts_and_thinking_as_reasoning() -> None:
    usage = post(service_over(engine(thinking="one two three"))).json()["usage"]
    assert usage["completion_tokens"] == 3 * (3 + 2)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * (3 + 2) + 3}
    assert [layer["reasoning_tokens"] for layer in usage["aft"]["layers"]] == [6, 3]


def test_a_template_argument_that_no_template_knows_is_refused_by_name() -> None:
    response = post(service_over(engine()), chat_template_kwargs={"enable_thinking": False})
    assert refused(response) == (400, "chat_template_kwargs")
    assert refused(post(service_over(engine()), reasoning_effort="high")) == (400, "reasoning_effort")
    assert post(service_over(engine()), reasoning_effort="none").status_code == 200
