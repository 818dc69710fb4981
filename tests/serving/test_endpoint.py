"""The endpoint as its users see it: the stock `openai` client over real HTTP, with Ray Serve behind it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

USER: Any = [{"role": "user", "content": "Name three rivers."}]


def ask(client: openai.OpenAI, model: str = "base", **options: Any) -> ChatCompletion:
    aft = options.pop("aft", {})
    return client.chat.completions.create(
        model=model, messages=options.pop("messages", USER), extra_body={"aft": aft}, **options
    )


def text_of(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def test_a_question_gets_an_answer(client: openai.OpenAI) -> None:
    completion = ask(client)
    assert completion.object == "chat.completion"
    assert completion.model == "base"
    assert completion.choices[0].finish_reason == "stop"
    assert len(text_of(completion).split()) == 8


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(client: openai.OpenAI) -> None:
    assert text_of(ask(client, seed=1)) == text_of(ask(client, seed=1))
    assert text_of(ask(client, seed=1)) != text_of(ask(client, seed=2))


def test_the_stock_client_reads_n_choices_with_log_probabilities(client: openai.OpenAI) -> None:
    completion = ask(client, n=2, logprobs=True, top_logprobs=1, seed=5)
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(math.isclose(token.logprob, token.top_logprobs[0].logprob) for token in tokens)


def test_usage_sums_every_sub_call(client: openai.OpenAI) -> None:
    usage: Any = ask(client, aft={"num_proposals": 3, "num_layers": 2}).usage
    layers = usage.aft["layers"]
    assert [layer["num_answers"] for layer in layers] == [3, 3, 1]
    assert usage.completion_tokens == 7 * 8 == sum(layer["completion_tokens"] for layer in layers)
    assert usage.prompt_tokens == sum(layer["prompt_tokens"] for layer in layers)
    assert layers[0]["prompt_tokens"] == 3 * 3  # "Name three rivers.", once per draft
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_max_tokens_cuts_the_final_answer_alone(client: openai.OpenAI) -> None:
    completion: Any = ask(client, max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert [layer["completion_tokens"] for layer in completion.usage.aft["layers"]] == [24, 2]


def test_include_proposals_returns_the_drafts_and_the_plan(client: openai.OpenAI) -> None:
    completion: Any = ask(client, aft={"num_proposals": 2, "num_layers": 1, "include_proposals": True})
    plan, layers = completion.aft["plan"], completion.aft["layers"]
    assert (plan["num_proposals"], plan["num_layers"]) == (2, 1)
    assert [[draft["index"] for draft in layer] for layer in layers] == [[0, 1], [0]]
    assert layers[0][0]["text"] != layers[0][1]["text"]
    assert layers[1][0] | {"text": ""} == {
        "index": 0, "text": "", "reasoning": "", "finish_reason": "stop", "num_tokens": 8, "error": None,
        "inputs": [0, 1], "length_action": None,
    }  # fmt: skip
    assert layers[1][0]["text"] == text_of(completion)


def test_drafts_are_returned_only_on_request(client: openai.OpenAI) -> None:
    assert "aft" not in ask(client).model_dump()


def test_a_failed_draft_is_returned_with_its_error(client: openai.OpenAI) -> None:
    completion: Any = ask(client, aft={"num_proposals": 4, "include_proposals": True})
    drafts = completion.aft["layers"][0]
    assert [draft["error"] for draft in drafts] == [None, None, None, "engine_error"]  # not in the engine's words
    assert completion.usage.aft["layers"][0]["num_failed"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompts_of_a_list_are_answered_by_the_replicas_at_once(client: openai.OpenAI, stream: bool) -> None:
    prompts = [f"Name {number} rivers." for number in range(6)]
    answer: Any = client.completions.create(model="aft", prompt=prompts, seed=5, stream=stream, timeout=20)
    texts: Counter[int] = Counter()
    for chunk in answer if stream else [answer]:
        texts.update({choice.index: len(choice.text) for choice in chunk.choices})
    assert sorted(texts) == list(range(6)) and all(texts.values())
    with pytest.raises(openai.BadRequestError, match="tokenizer is not known"):
        client.completions.create(model="aft", prompt=[[1], [2], [3]], timeout=20)


@pytest.mark.parametrize(("alias", "num_layers"), [("base@single", 1), ("base", 2), ("base@k2-l2", 3)])
def test_a_model_alias_chooses_the_plan(client: openai.OpenAI, alias: str, num_layers: int) -> None:
    completion: Any = ask(client, model=alias)
    assert completion.model == alias
    assert len(completion.usage.aft["layers"]) == num_layers


def test_the_models_are_listed_with_their_aliases(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["base", "sft", "aft"]
    assert models["aft"].model_dump()["aliases"] == ["aft@k<proposals>-l<layers>", "aft@single"]
    assert client.models.retrieve("aft").id == "aft"


def test_a_text_completion_answers_the_prompt_as_one_turn(client: openai.OpenAI) -> None:
    completion: Any = client.completions.create(model="base", prompt="Name three rivers.", seed=1)
    assert completion.object == "text_completion"
    assert completion.choices[0].text == text_of(ask(client, seed=1))
    assert completion.usage.aft["layers"][0]["num_answers"] == 3


def test_an_unknown_model_is_the_clients_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="base, sft, aft") as caught:
        ask(client, model="gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_unsupported_parameter_is_the_clients_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'functions' is not supported") as caught:
        ask(client, functions=[{"name": "weather"}])
    assert (caught.value.param, caught.value.type) == ("functions", "invalid_request_error")


def test_an_unknown_plan_key_is_refused_with_the_nearest_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'num_layers'") as caught:
        ask(client, aft={"num_layer": 2})
    assert caught.value.param == "aft.num_layer"


def test_too_few_usable_drafts_are_a_typed_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="3 of 4 answers usable, 4 needed") as caught:
        ask(client, aft={"num_proposals": 4, "quorum": 4})
    assert (caught.value.status_code, caught.value.code) == (503, "quorum_not_met")


def test_a_passed_deadline_is_a_gateway_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="deadline_s") as caught:
        ask(client, aft={"num_proposals": 6, "deadline_s": 0.5})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


def test_a_draft_deadline_leaves_the_straggler_behind(client: openai.OpenAI) -> None:
    completion: Any = ask(client, aft={"num_proposals": 6, "draft_deadline_s": 0.5})
    assert completion.usage.aft["layers"][0]["num_cancelled"] == 1


def test_a_prompt_longer_than_the_window_is_a_bad_request(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=long)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages": 3}', "messages"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}", None),
        (b"[" * 100_000, None),
    ],
    ids=["cut off", "a list", "wrong type", "half a character", "a word", "5000 digits", "100,000 brackets"],
)
def test_a_malformed_body_is_a_bad_request_with_an_openai_error(base_url: str, body: bytes, param: str | None) -> None:
    response = httpx.post(f"{base_url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "Traceback" not in response.text


def test_an_unknown_page_is_an_openai_error_too(base_url: str) -> None:
    response = httpx.get(f"{base_url}/v1/embeddings")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")


def test_the_servers_health_and_readiness_can_be_asked(base_url: str) -> None:
    assert httpx.get(f"{base_url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{base_url}/ready").json() == {"status": "ready"}


def test_the_request_id_of_the_client_comes_back_and_one_is_made_where_it_sent_none(base_url: str) -> None:
    response = httpx.get(f"{base_url}/health", headers={"x-request-id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert len(httpx.get(f"{base_url}/health").headers["x-request-id"]) > 8


def test_split_pools_draft_and_aggregate_with_their_own_models(split_url: str) -> None:
    with openai.OpenAI(base_url=f"{split_url}/v1", api_key="key-two") as client:
        completion: Any = ask(client, aft={"include_proposals": True})
    texts = [[draft["text"] for draft in layer] for layer in completion.aft["layers"]]
    by_aggregator = "written by the aggregator"
    assert texts == [["first draft", "second draft"], [by_aggregator, by_aggregator], [by_aggregator]]


def test_a_vote_is_asked_for_in_the_body_and_reported_in_the_usage(client: openai.OpenAI) -> None:
    aft = {"num_proposals": 3, "aggregator": "vote", "include_proposals": True}
    completion: Any = ask(client, aft=aft)
    drafts, [answer] = completion.aft["layers"]
    assert [layer["decided_by"] for layer in completion.usage.aft["layers"]] == ["model", "vote"]
    assert text_of(completion) == answer["text"] == drafts[0]["text"]  # three different: a tie
    assert answer["inputs"] == [0]
    assert completion.usage.completion_tokens == 3 * 8


def test_agreement_skips_layers_and_a_stream_brings_the_answer_in_one_piece(split_url: str) -> None:
    with openai.OpenAI(base_url=f"{split_url}/v1", api_key="key-one", max_retries=0) as client:
        aft: dict[str, Any] = {"num_proposals": 2, "num_layers": 3, "early_stop": "exact", "include_proposals": True}
        completion: Any = ask(client, aft=aft)
        stream = client.chat.completions.create(model="base", messages=USER, stream=True, extra_body={"aft": aft})
        pieces = [
            chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content
        ]
    assert [len(layer) for layer in completion.aft["layers"]] == [2, 2, 0, 1]
    decided = [layer["decided_by"] for layer in completion.usage.aft["layers"]]
    assert decided == ["model", "model", "agreement", "agreement"]
    assert pieces == [text_of(completion)] == ["written by the aggregator"]


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer key-three"}, {"authorization": "key-one"}])
def test_a_server_with_keys_turns_everyone_else_away(split_url: str, header: dict[str, str]) -> None:
    response = httpx.get(f"{split_url}/v1/models", headers=header)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_client_meets_a_wrong_key_as_its_authentication_error(split_url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{split_url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        ask(client)


def test_health_needs_no_key(split_url: str) -> None:
    assert httpx.get(f"{split_url}/ready").status_code == 200
