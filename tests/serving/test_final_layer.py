"""What a request may ask of the final layer besides sampling: several answers, log-probabilities, JSON.

Each of them applies to the final layer only, or is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, Sampling, TokenDelta, TokenLogprob
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from tests.serving.test_ingress import over_http, post, service_over

SCHEMA = {"type": "object", "properties": {"rivers": {"type": "integer"}}, "required": ["rivers"]}
LONG_SCHEMA = {"name": "long", "schema": {"$comment": "x" * 40_000}}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "rivers", "schema": SCHEMA}}


class JsonEngine(ScriptedEngine):
    """A scripted engine that writes JSON where a schema asks for it."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, follows_json_schema=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if isinstance(event, Sample) and request.json_schema is not None:
                    event = replace(event, text='{"rivers": 3}')
                yield event


def engine() -> ScriptedEngine:
    return ScriptedEngine(ScriptedEngineConfig())


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["param"]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_n_final_answers_are_written_from_one_set_of_drafts() -> None:
    scripted = engine()
    body = post(service_over(scripted), n=3, seed=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert len(set(texts)) == 3
    assert [len(request.seeds) for request in scripted.requests] == [2, 3]
    assert [layer["num_answers"] for layer in body["usage"]["aft"]["layers"]] == [2, 3]
    assert body["usage"]["completion_tokens"] == (2 + 3) * 8


def test_the_first_of_n_answers_is_the_one_that_is_written_alone() -> None:
    first = post(service_over(engine()), n=3, seed=5).json()["choices"][0]
    [alone] = post(service_over(engine()), seed=5).json()["choices"]
    assert first == alone


def test_n_samples_of_a_single_layer_plan_are_n_choices() -> None:
    body = post(service_over(engine(), Plan(num_layers=0)), n=4, seed=5).json()
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 4


@pytest.mark.parametrize("subset_size", [None, 1], ids=["one prompt", "a prompt each"])
def test_streamed_choices_are_told_apart_and_equal_the_plain_ones(subset_size: int | None) -> None:
    plan = Plan(num_proposals=2, subset_size=subset_size)
    plain = post(service_over(engine(), plan), n=2, seed=5).json()["choices"]
    texts, ends = {0: "", 1: ""}, {}
    for event in events_of(post(service_over(engine(), plan), n=2, seed=5, stream=True)):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in plain}
    assert ends == {0: "stop", 1: "stop"}


def test_all_of_n_answers_are_there_or_none() -> None:
    failing = ScriptedEngine(ScriptedEngineConfig(fail_on=(2,)))
    assert post(service_over(failing), n=2).status_code == 200
    assert post(service_over(failing), n=3).status_code == 502


def test_all_n_answers_are_among_the_returned_proposals() -> None:
    body = post(service_over(engine()), n=2, aft={"include_proposals": True}).json()
    assert [len(layer) for layer in body["aft"]["layers"]] == [2, 2]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_log_probabilities_are_those_of_the_final_answers_tokens(stream: bool) -> None:
    scripted = engine()
    response = post(service_over(scripted), seed=5, logprobs=True, top_logprobs=2, stream=stream)
    assert [request.top_logprobs for request in scripted.requests] == [None, 2]
    choices = [c for event in events_of(response) for c in event["choices"]] if stream else response.json()["choices"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    plain = post(service_over(engine()), seed=5).json()["choices"][0]["message"]["content"]
    assert "".join(token["token"] for token in tokens) == plain
    assert all(token["logprob"] == -1.0 and bytes(token["bytes"]).decode() == token["token"] for token in tokens)
    assert all([t["token"] for t in token["top_logprobs"]] == [token["token"], "other-1"] for token in tokens)


class ForbiddingEngine(ScriptedEngine):
    """A scripted engine whose second likeliest token is one that a grammar forbids, as vLLM reports it."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if isinstance(event, (TokenDelta, Sample)):
                    event = replace(event, logprobs=tuple(map(forbidding, event.logprobs)))
                yield event


def forbidding(token: TokenLogprob) -> TokenLogprob:
    return replace(token, top=(*token.top[:1], ("forbidden", -math.inf)))


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_an_impossible_token_of_a_chat_has_a_log_probability_that_json_can_hold(stream: bool) -> None:
    service = service_over(ForbiddingEngine(ScriptedEngineConfig()))
    response = post(service, logprobs=True, top_logprobs=2, stream=stream)
    choices = [c for event in events_of(response) for c in event["choices"]] if stream else response.json()["choices"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert {token["top_logprobs"][1]["logprob"] for token in tokens} == {-9999.0}


def test_an_impossible_token_of_a_text_has_a_log_probability_that_json_can_hold() -> None:
    service = service_over(ForbiddingEngine(ScriptedEngineConfig()))
    body = {"prompt": "list rivers", "logprobs": 2}
    [choice] = over_http(service, lambda client: client.post("/v1/completions", json=body)).json()["choices"]
    assert {top["forbidden"] for top in choice["logprobs"]["top_logprobs"]} == {-9999.0}


def test_log_probabilities_without_alternatives_have_none() -> None:
    [choice] = post(service_over(engine()), logprobs=True).json()["choices"]
    assert all(token["top_logprobs"] == [] for token in choice["logprobs"]["content"])


def test_log_probabilities_come_only_when_asked_for() -> None:
    assert post(service_over(engine())).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("asked", [JSON_FORMAT, {"type": "json_object"}], ids=["schema", "object"])
def test_a_json_format_is_asked_of_the_final_layer_alone(asked: dict[str, Any]) -> None:
    scripted = JsonEngine(ScriptedEngineConfig())
    body = post(service_over(scripted), response_format=asked).json()
    assert json.loads(body["choices"][0]["message"]["content"]) == {"rivers": 3}
    schemas = [request.json_schema for request in scripted.requests]
    assert schemas[0] is None
    assert json.loads(schemas[1] or "") == (SCHEMA if asked is JSON_FORMAT else {"type": "object"})


def test_a_json_format_is_refused_by_name_where_the_engine_cannot_hold_to_it() -> None:
    scripted = engine()
    response = post(service_over(scripted), response_format=JSON_FORMAT)
    assert refused(response) == (400, "response_format")
    assert "not supported by the engine" in response.json()["error"]["message"]
    assert scripted.requests == []


@pytest.mark.parametrize("aft", [{"aggregator": "vote"}, {"early_stop": "exact"}], ids=["vote", "early stop"])
@pytest.mark.parametrize(("name", "asked"), [("n", 2), ("logprobs", True), ("response_format", JSON_FORMAT)])
def test_a_plan_that_may_settle_without_writing_refuses_what_only_writing_can_give(
    aft: dict[str, Any], name: str, asked: Any
) -> None:
    response = post(service_over(JsonEngine(ScriptedEngineConfig())), aft=aft, **{name: asked})
    assert refused(response) == (400, name)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": "two"}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": "yes please"}, "logprobs"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$comment": "x" * 40_000}},
                }
            },
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
    ],
)
def test_a_wrong_value_names_its_parameter(body: dict[str, Any], param: str) -> None:
    assert refused(post(service_over(engine()), **body)) == (400, param)


def test_sampling_parameters_reach_the_engine_in_the_final_layer_alone() -> None:
    scripted = engine()
    asked = {"temperature": 0.3, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "max_tokens": 5, "stop": ["END"]}
    body = post(service_over(scripted), seed=5, **asked).json()
    drafts, final = (request.sampling for request in scripted.requests)
    assert final == Sampling(**(asked | {"stop": ("END",)}))
    assert drafts == Plan().proposal
    assert (body["choices"][0]["finish_reason"], body["usage"]["aft"]["layers"][1]["completion_tokens"]) == (
        "length",
        5,
    )


PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "repetition_penalty": 1.1, "ignore_eos": True}


def test_penalties_and_biases_reach_the_engine_in_the_final_layer_alone() -> None:
    scripted = engine()
    assert post(service_over(scripted), logit_bias={"17": -100, "5": 2.5}, **PENALTIES).status_code == 200
    drafts, final = (request.sampling for request in scripted.requests)
    assert final == replace(Plan().final, logit_bias=((17, -100.0), (5, 2.5)), **PENALTIES)
    assert drafts == Plan().proposal


class PlainEngine(ScriptedEngine):
    """An engine that honours the usual settings only."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, honours=frozenset())


@pytest.mark.parametrize("name", PENALTIES)
def test_an_engine_that_cannot_punish_refuses_it_by_name(name: str) -> None:
    plain = PlainEngine(ScriptedEngineConfig())
    assert refused(post(service_over(plain), **{name: PENALTIES[name]})) == (400, name)
    assert refused(post(service_over(plain), aft={"proposal": {name: PENALTIES[name]}})) == (400, name)
    unchanged = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": False}
    assert post(service_over(plain), logit_bias={}, **unchanged).status_code == 200


def test_a_seed_fixes_every_request_to_the_engine() -> None:
    one, same, other = engine(), engine(), engine()
    for scripted, seed in ((one, 5), (same, 5), (other, 6)):
        post(service_over(scripted), seed=seed)
    seeds = [[request.seeds for request in scripted.requests] for scripted in (one, same, other)]
    assert seeds[0] == seeds[1] and seeds[0] != seeds[2]
