"""What endpoints send besides what OpenAI's own server sends: every form is read, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines import GenerateRequest, Sample, Sampling, TokenDelta
from aft_ray.engines.adaptive_limit import AdaptiveLimit, pause_asked_for
from aft_ray.engines.endpoint_reply import Reply, reason_of
from aft_ray.engines.openai import OpenAIEngine
from aft_ray.records import Spent
from tests.scripted_endpoint import USAGE, ScriptedEndpoint

MESSAGES = ({"role": "user", "content": "Name a river."},)
TEXT = "the Nile 1"


def samples_of(config: OpenAIEngineConfig, num: int = 1, *, stream: bool = False, **sampling: Any) -> list[Sample]:
    request = GenerateRequest(
        request_id="r",
        prompt_ids=(),
        messages=MESSAGES,
        sampling=Sampling(**{"max_tokens": 16, **sampling}),
        seeds=tuple(range(1, num + 1)),
        stream=stream,
    )

    async def work() -> list[Sample]:
        engine = OpenAIEngine(config)
        try:
            events = [event async for event in engine.generate(request)]
        finally:
            await engine.close()
        samples = sorted((event for event in events if isinstance(event, Sample)), key=lambda sample: sample.index)
        pieces = [event.text for event in events if isinstance(event, TokenDelta)]
        thoughts = [event.reasoning for event in events if isinstance(event, TokenDelta)]
        assert not stream or ("".join(pieces), "".join(thoughts)) == (samples[0].text, samples[0].reasoning)
        return samples

    return asyncio.run(work())


def only(config: OpenAIEngineConfig, **others: Any) -> Sample:
    (sample,) = samples_of(config, **others)
    return sample


# ── the form of a reply ──────────────────────────────────────────────────────────────────────────────────────────────

FORMS: dict[str, dict[str, Any]] = {
    "as OpenAI sends it": {},
    "a choice without a delta": {"annotates": True},
    "content in parts": {"sends_parts": True},
    "one object in place of a stream": {"sends_one_object": True},
    "objects without data:": {"sends_objects_per_line": True},
    "comments and pings": {"keeps_alive": True},
    "carriage returns": {"line_end": "\r\n", "keeps_alive": True},
    "no finish reason": {"finish_reason": None},
    "one object, no finish reason": {"finish_reason": None, "sends_one_object": True},
    "no [DONE]": {"ends_with_done": False},
    "a break behind the end": {"hangs_up_after": "answer"},
    "another word for stop": {"finish_reason": "eos_token"},
    "Google's word for stop": {"finish_reason": "STOP"},
    "usage of nulls": {"usage": {"prompt_tokens": None, "completion_tokens": None}},
    "usage null": {"usage": None},
}


@pytest.mark.parametrize("stream", [True, False], ids=["pieces are read", "pieces are not read"])
@pytest.mark.parametrize("knobs", FORMS.values(), ids=FORMS)
def test_a_whole_answer_is_read_in_every_form_and_asked_for_once(
    endpoint: ScriptedEndpoint, knobs: dict[str, Any], stream: bool
) -> None:
    vars(endpoint).update(knobs)
    sample = only(endpoint.config(), stream=stream)
    assert (sample.text, sample.finish_reason, sample.error) == (TEXT, "stop", None)
    assert len(endpoint.asked) == 1


def test_an_answer_can_be_asked_for_without_a_stream(endpoint: ScriptedEndpoint) -> None:
    sample = only(endpoint.config(stream=False), stream=True)
    assert (sample.text, sample.num_tokens) == (TEXT, 3)
    assert endpoint.asked[0]["stream"] is False
    assert "stream_options" not in endpoint.asked[0]


def test_line_separators_of_unicode_in_an_answer_do_not_tear_an_event(endpoint: ScriptedEndpoint) -> None:
    endpoint.words, endpoint.escapes = ("one\u2028two", "\u0085three 東京"), False
    assert only(endpoint.config()).text == "one\u2028two\u0085three 東京"


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "length", "SAFETY"])
def test_a_finish_reason_is_kept_with_the_text(endpoint: ScriptedEndpoint, reason: str) -> None:
    endpoint.finish_reason = reason
    sample = only(endpoint.config())
    assert (sample.text, sample.error) == (TEXT, None)
    assert sample.finish_reason == {"SAFETY": "content_filter"}.get(reason, reason)


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_answer_that_the_server_gives_up_is_a_failed_one_with_its_cost(
    endpoint: ScriptedEndpoint, reason: str
) -> None:
    endpoint.finish_reason = reason
    sample = only(endpoint.config(max_retries=1))
    assert (sample.text, sample.finish_reason) == ("", "error")
    assert sample.error == f"the endpoint gave up the answer (finish reason {reason}) (2 tries)"
    assert sample.spent == Spent(prompt_tokens=14, completion_tokens=6)


def test_an_answer_without_a_finish_reason_that_used_up_its_tokens_was_cut(endpoint: ScriptedEndpoint) -> None:
    endpoint.finish_reason = None
    assert only(endpoint.config(), max_tokens=3).finish_reason == "length"


def test_an_empty_answer_is_an_answer(endpoint: ScriptedEndpoint) -> None:
    endpoint.words, endpoint.sends_one_object = ("",), True
    sample = only(endpoint.config())
    assert (sample.text, sample.finish_reason, sample.error) == ("", "stop", None)


# ── reasoning and refusals ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["stream", "object", "parts"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_apart_from_the_answer(endpoint: ScriptedEndpoint, field: str, form: str) -> None:
    endpoint.reasoning, endpoint.reasoning_field = ("Rivers: ", "Nile."), field
    endpoint.sends_one_object, endpoint.sends_parts = form == "object", form == "parts"
    endpoint.usage = {**USAGE, "completion_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 27}}
    sample = only(endpoint.config(), stream=True)
    assert (sample.text, sample.reasoning) == (TEXT, "Rivers: Nile.")
    assert (sample.num_tokens, sample.num_reasoning_tokens) == (30, 27)


def test_reasoning_tokens_that_nobody_counts_are_the_reasonings_share(endpoint: ScriptedEndpoint) -> None:
    endpoint.reasoning, endpoint.words = ("x" * 40,), ("y" * 40,)
    assert only(endpoint.config()).num_reasoning_tokens == round(3 / 2)
    endpoint.usage = None
    sample = only(endpoint.config())
    assert (sample.num_tokens, sample.num_reasoning_tokens, sample.usage_estimated) == (20, 10, True)


def test_a_model_that_only_reasons_has_an_empty_answer_and_what_it_thought(endpoint: ScriptedEndpoint) -> None:
    endpoint.reasoning, endpoint.words, endpoint.finish_reason = ("Let me see",), (), "length"
    sample = only(endpoint.config())
    assert (sample.text, sample.reasoning, sample.finish_reason, sample.error) == ("", "Let me see", "length", None)


@pytest.mark.parametrize("one_object", [False, True])
def test_a_refusal_in_its_own_field_reaches_the_user(endpoint: ScriptedEndpoint, one_object: bool) -> None:
    endpoint.refusal, endpoint.sends_one_object = "I'm sorry, I can't.", one_object
    sample = only(endpoint.config())
    assert (sample.text, sample.finish_reason) == ("I'm sorry, I can't.", "refusal")


# ── what is no answer ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_in_place_of_an_answer_is_quoted_and_not_asked_for_again(endpoint: ScriptedEndpoint) -> None:
    endpoint.page = "<!DOCTYPE html>\n<html><title>Sign in</title></html>"
    sample = only(endpoint.config())
    assert sample.error == "the reply is no answer but text/html: <!DOCTYPE html> <html><title>Sign in</title></html>"
    assert (len(endpoint.asked), sample.spent) == (1, Spent())


@pytest.mark.parametrize(
    ("error", "num_tries"),
    [
        ({"message": "no such model", "code": 404}, 1),
        ({"message": "Provider returned error", "code": 502}, 2),
        ({"message": "slow down", "type": "rate_limit_exceeded"}, 2),
        ({"message": "pay first", "code": "insufficient_quota", "type": "rate_limit"}, 1),
        ("model overloaded", 2),
    ],
)
def test_an_error_with_status_200_is_read_and_retried_only_where_it_may_pass(
    endpoint: ScriptedEndpoint, error: Any, num_tries: int
) -> None:
    endpoint.error = error
    sample = only(endpoint.config(max_retries=1))
    said = error if isinstance(error, str) else error["message"]
    assert sample.error == said + (f" ({num_tries} tries)" if num_tries > 1 else "")
    assert len(endpoint.asked) == num_tries


def test_an_error_in_a_stream_loses_the_answer_but_not_the_account(endpoint: ScriptedEndpoint) -> None:
    endpoint.error_at_end = {"message": "upstream connection lost"}
    sample = only(endpoint.config(max_retries=1))
    assert sample.error == "upstream connection lost (2 tries)"
    # 4 + 4 tokens of the prompt and 3 of the answer, twice: estimated, since no usage came
    assert sample.spent == Spent(prompt_tokens=16, completion_tokens=6, num_estimated=2)


REFUSALS = {
    "OpenAI": ({"error": {"message": "no such model", "type": "invalid_request_error"}}, "no such model"),
    "plain": ({"error": "no such model"}, "no such model"),
    "FastAPI": ({"detail": [{"loc": ["body", "seed"], "msg": "not permitted"}]}, "body.seed: not permitted"),
    "FastAPI, plain": ({"detail": "no such model"}, "no such model"),
    "Mistral": ({"object": "error", "message": {"detail": [{"loc": ["seed"], "msg": "no"}]}, "code": 1}, "seed: no"),
    "Google": ([{"error": {"code": 400, "message": "no such model"}}], "no such model"),
    "two reasons": ({"detail": [{"msg": "one"}, {"msg": "two"}]}, "one; two"),
    "an unknown form": ({"code": 7}, '{"code": 7}'),
}


@pytest.mark.parametrize(("body", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_the_reason_of_a_refusal_reaches_the_user(endpoint: ScriptedEndpoint, body: Any, reason: str) -> None:
    endpoint.refuse_first, endpoint.refusal_body = [(400, {})], lambda status: body
    assert only(endpoint.config()).error == f"status 400: {reason}"
    assert len(endpoint.asked) == 1


def test_a_reason_that_is_no_json_is_quoted() -> None:
    assert reason_of("<html>\n502 Bad\n Gateway</html>") == "<html> 502 Bad Gateway</html>"
    assert reason_of("") == "(empty reply)"


def test_a_quota_that_is_used_up_is_not_waited_for(endpoint: ScriptedEndpoint) -> None:
    endpoint.refuse_first = [(429, {})]
    endpoint.refusal_body = lambda status: {"error": {"message": "pay first", "code": "insufficient_quota"}}
    assert only(endpoint.config()).error == "status 429: pay first"
    assert len(endpoint.asked) == 1


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fields_are_left_out_renamed_and_added(endpoint: ScriptedEndpoint) -> None:
    endpoint.refuse_fields = dict.fromkeys(("stream_options", "seed", "max_tokens"), "Extra inputs are not permitted")
    refused = only(endpoint.config())
    assert refused.error == (
        "status 422: body.stream_options: Extra inputs are not permitted; body.seed: Extra inputs are not permitted; "
        "body.max_tokens: Extra inputs are not permitted"
    )
    settings: dict[str, Any] = {
        "omit": ["stream_options", "seed"],
        "rename": {"max_tokens": "max_completion_tokens"},
        "extra_body": {"reasoning_effort": "low"},
        "headers": {"X-Team": "aft"},
        "query": {"api-version": "2024-10-21"},
    }
    sample = only(endpoint.config(**settings))
    assert (sample.text, sample.seed) == ("the Nile None", None)
    body = endpoint.asked[-1]
    assert (body["max_completion_tokens"], body["reasoning_effort"]) == (16, "low")
    assert endpoint.headers[-1]["x-team"] == "aft"
    assert endpoint.paths[-1] == "/v1/chat/completions?api-version=2024-10-21"


def test_the_key_travels_in_the_header_that_is_named_or_not_at_all(endpoint: ScriptedEndpoint) -> None:
    endpoint.key_header, endpoint.key = "api-key", "sesame"
    assert only(endpoint.config(api_key_header="api-key")).text == TEXT
    assert only(endpoint.config()).error == "status 401: no such key"
    only(endpoint.config(api_key_env=None))
    assert {"authorization", "api-key"}.isdisjoint(endpoint.headers[-1])


# ── pauses, and the ledger ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_pause_that_the_endpoint_asks_one_call_for_holds_all_of_them(
    endpoint: ScriptedEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.refuse_first = [(429, {"Retry-After": "1"})]
    samples = samples_of(endpoint.config(max_concurrency=1), num=3)
    assert [sample.error for sample in samples] == [None] * 3
    refused, *others = endpoint.times
    assert min(others) - refused >= 1.0
    assert len(others) == 3


def test_a_long_pause_is_waited_for_and_said_and_one_that_is_too_long_fails_the_row_at_once(
    endpoint: ScriptedEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    async def held() -> tuple[float, float]:
        engine = OpenAIEngine(endpoint.config())
        request = GenerateRequest(
            request_id="r", prompt_ids=(), messages=MESSAGES, sampling=Sampling(max_tokens=16), seeds=(1,)
        )
        asking = asyncio.create_task(anext(engine.generate(request)))
        await asyncio.sleep(0.5)
        pause = engine.limit.pause_s
        asking.cancel()
        await engine.close()
        return pause, len(endpoint.asked)

    endpoint.refuse_first = [(429, {"Retry-After": "300"})]
    with caplog.at_level(logging.WARNING):
        pause, num_asked = asyncio.run(held())
    assert (298 < pause <= 300, num_asked) == (True, 1)
    assert "127.0.0.1 asks for a pause of 300 s (status 429: scripted 429)" in caplog.text
    endpoint.refuse_first = [(429, {"Retry-After": "7200"})]
    assert only(endpoint.config()).error == (
        "status 429: scripted 429; the endpoint asks for a pause of 7200 s, longer than max_pause_s 3600"
    )


def test_a_call_that_is_turned_away_for_load_waits_its_turn_while_others_get_through(
    endpoint: ScriptedEndpoint,
) -> None:
    endpoint.capacity, endpoint.seconds = 2, 0.01
    samples = samples_of(endpoint.config(max_concurrency=16, max_retries=1), num=24)
    assert [sample.error for sample in samples] == [None] * 24


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "30"}, 30),
        ({"retry-after-ms": "1500", "retry-after": "30"}, 1.5),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_a_pause_is_read_in_seconds_milliseconds_or_as_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert pause_asked_for(headers) == seconds


def test_a_pause_may_end_at_a_date() -> None:
    asked = pause_asked_for({"retry-after": "Fri, 31 Dec 2099 23:59:59 GMT"})
    assert asked == pytest.approx(4102444799 - time.time(), abs=60)


def test_the_longer_of_two_pauses_counts() -> None:
    async def work() -> float:
        limit = AdaptiveLimit(4)
        limit.hold(50)
        limit.hold(5)
        return limit.pause_s

    assert asyncio.run(work()) == pytest.approx(50, abs=1)


def test_tokens_and_prices_hold_the_tries_that_were_lost(endpoint: ScriptedEndpoint) -> None:
    endpoint.break_off = 1
    sample = only(endpoint.config(prices={"prompt": 1.0, "completion": 10.0}))
    assert (sample.num_prompt_tokens, sample.num_tokens, sample.usage_estimated) == (7, 3, False)
    # the lost try: 4 + 4 tokens of the prompt and one of "the"
    assert sample.spent is not None
    assert (sample.spent.prompt_tokens, sample.spent.completion_tokens) == (15, 4)
    assert sample.spent.cost_usd == pytest.approx((15 * 1 + 4 * 10) / 1e6)
    assert sample.spent.num_estimated == 1


def test_missing_usage_is_counted_by_the_models_tokenizer_or_estimated_and_marked(
    endpoint: ScriptedEndpoint, chatml_tokenizer: str
) -> None:
    endpoint.usage, endpoint.words = None, ("The answer is 42.",)
    estimated = only(endpoint.config())
    assert (estimated.num_tokens, estimated.num_prompt_tokens, estimated.usage_estimated) == (5, 8, True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer)
    counted = only(endpoint.config(tokenizer=chatml_tokenizer))
    assert counted.num_tokens == len(tokenizer("The answer is 42.", add_special_tokens=False)["input_ids"])
    assert counted.usage_estimated


def test_usage_under_other_names_is_read() -> None:
    reply = Reply()
    reply.feed('data: {"choices": [], "usage": {"input_tokens": 5, "total_tokens": 9}}')
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 4)
    reply.feed('data: {"choices": [], "timings": {"prompt_n": 6, "predicted_n": 7}}')
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 7)


@pytest.mark.parametrize(
    "lines",
    [
        ['{"choices":[{"message":{"content":null,"tool_calls":[{"id":"c","function":{"name":"f","arguments":{"a":1}}}]},'
         '"finish_reason":"tool_calls"}]}'],
        ['data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":""}}]}}]}',
         'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\""}}]}}]}',
         'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":null,"function":{"arguments":": 1}"}},null]},'
         '"finish_reason":"stop"}]}'],
        ['data: {"choices":[{"delta":{"tool_calls":[{"id":"c","function":{"name":"f","arguments":"{\\"a\\": 1}"}}]}}]}',
         "data: [DONE]"],
    ],
    ids=["whole, arguments as an object", "in pieces", "in one piece, without a number"],
)  # fmt: skip
def test_tool_calls_are_read_in_every_form(lines: list[str]) -> None:
    reply = Reply()
    taken = [piece for line in lines if reply.feed(line) == "" for piece in reply.take_calls()]
    reply.end()
    assert reply.failure is None
    [call] = reply.tool_calls
    assert (call.id, call.name, json.loads(call.arguments)) == ("c", "f", {"a": 1})
    assert "".join(piece.arguments for piece in taken) == call.arguments


def test_a_tool_call_without_an_id_gets_one() -> None:
    reply = Reply()
    reply.feed('{"choices":[{"message":{"tool_calls":[{"function":{"name":"f"}},{"function":{"name":"g"}}]}}]}')
    assert [call.name for call in reply.tool_calls] == ["f", "g"]
    assert len({call.id for call in reply.tool_calls} - {"", None}) == 2
