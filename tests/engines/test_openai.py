"""The OpenAI-compatible engine over real HTTP: a scripted endpoint behind a real server."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines import EngineEvent, GenerateRequest, Sample, Sampling, TokenDelta
from aft_ray.engines.adaptive_limit import AdaptiveLimit
from aft_ray.engines.openai import OpenAIEngine
from aft_ray.errors import ConfigError, EngineError
from tests.scripted_endpoint import KEY_ENV, ScriptedEndpoint

MESSAGES = ({"role": "user", "content": "Name a river."},)


def events_of(config: OpenAIEngineConfig, seeds: tuple[int, ...] = (1,), *, stream: bool = False) -> list[EngineEvent]:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=40, max_tokens=16, stop=("\n\n",))
    request = GenerateRequest(
        request_id="r", prompt_ids=(), messages=MESSAGES, sampling=sampling, seeds=seeds, stream=stream
    )

    async def work() -> list[EngineEvent]:
        engine = OpenAIEngine(config)
        try:
            return [event async for event in engine.generate(request)]
        finally:
            await engine.close()

    return asyncio.run(work())


def samples_of(events: list[EngineEvent]) -> list[Sample]:
    return sorted((event for event in events if isinstance(event, Sample)), key=lambda sample: sample.index)


def test_every_sample_is_a_call_of_its_own_with_its_own_seed(endpoint: ScriptedEndpoint) -> None:
    samples = samples_of(events_of(endpoint.config(), (4, 5, 6)))
    assert [sample.text for sample in samples] == ["the Nile 4", "the Nile 5", "the Nile 6"]
    assert {(s.finish_reason, s.num_prompt_tokens, s.num_tokens, s.error) for s in samples} == {("stop", 7, 3, None)}
    assert sorted(body["seed"] for body in endpoint.asked) == [4, 5, 6]


def test_the_sampling_is_sent_in_openai_words(endpoint: ScriptedEndpoint) -> None:
    events_of(endpoint.config())
    (body,) = endpoint.asked
    assert body["messages"] == [dict(message) for message in MESSAGES]
    sent = {name: body[name] for name in ("model", "temperature", "top_p", "top_k", "max_tokens", "stop")}
    assert sent == {
        "model": "teacher",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 16,
        "stop": ["\n\n"],
    }
    assert [headers["authorization"] for headers in endpoint.headers] == ["Bearer sesame"]


def test_streamed_pieces_come_before_their_sample(endpoint: ScriptedEndpoint) -> None:
    events = events_of(endpoint.config(), stream=True)
    assert [event.text for event in events if isinstance(event, TokenDelta)] == ["the", " Nile", " 1"]
    assert isinstance(events[-1], Sample)


def test_a_busy_server_is_asked_again_when_it_says_so(endpoint: ScriptedEndpoint) -> None:
    endpoint.refuse_first = [(429, {"Retry-After": "0.3"}), (503, {"Retry-After": "0.3"})]
    start = time.monotonic()
    (sample,) = samples_of(events_of(endpoint.config()))
    assert (sample.text, sample.error) == ("the Nile 1", None)
    assert len(endpoint.asked) == 3
    assert time.monotonic() - start >= 0.6


def test_an_answer_that_breaks_off_is_asked_for_again_and_never_kept_half(endpoint: ScriptedEndpoint) -> None:
    endpoint.break_off = 1
    (sample,) = samples_of(events_of(endpoint.config()))
    assert (sample.text, sample.finish_reason, sample.error, len(endpoint.asked)) == ("the Nile 1", "stop", None, 2)
    endpoint.break_off = 2
    (sample,) = samples_of(events_of(endpoint.config(max_retries=1)))
    assert (sample.text, sample.error) == ("", "the answer broke off after 1 pieces (2 tries)")


def test_an_answer_whose_pieces_were_handed_on_is_not_begun_again(endpoint: ScriptedEndpoint) -> None:
    endpoint.break_off = 1
    (sample,) = samples_of(events_of(endpoint.config(), stream=True))
    assert "broke off" in (sample.error or "")
    assert len(endpoint.asked) == 1


def test_an_answer_that_drips_longer_than_the_timeout_is_a_failed_sample_and_harms_no_other(
    endpoint: ScriptedEndpoint,
) -> None:
    endpoint.seconds = 0.8  # a word; no single read is as slow as the timeout
    (sample,) = samples_of(events_of(endpoint.config(timeout_s=1.0, max_retries=1)))
    assert sample.error == "the answer took longer than timeout_s 1 (2 tries)"
    assert len(endpoint.asked) == 2
    (sample,) = samples_of(events_of(endpoint.config(timeout_s=60)))
    assert sample.text == "the Nile 1"


@pytest.mark.parametrize(("ending", "text"), [("\ude00", "the Nile \U0001f600"), ("?", "the Nile \ufffd?")])
def test_half_characters_are_put_together_or_replaced(endpoint: ScriptedEndpoint, ending: str, text: str) -> None:
    endpoint.words = ("the", " Nile \ud83d", ending)
    (sample,) = samples_of(events_of(endpoint.config()))
    assert sample.text == text


def test_a_sample_that_is_refused_harms_no_other(endpoint: ScriptedEndpoint) -> None:
    endpoint.fail_seeds = {2}
    good, failed, last = samples_of(events_of(endpoint.config(), (1, 2, 3)))
    assert (good.text, last.text) == ("the Nile 1", "the Nile 3")
    assert failed.finish_reason == "error"
    assert "scripted 400" in (failed.error or "")


def test_a_server_that_is_away_is_a_failed_sample_with_the_reason(endpoint: ScriptedEndpoint) -> None:
    away = endpoint.config(max_retries=0).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    (sample,) = samples_of(events_of(away))
    assert sample.error == "no answer from 127.0.0.1: ConnectError: All connection attempts failed"


def test_no_more_calls_than_allowed_run_at_once(endpoint: ScriptedEndpoint) -> None:
    endpoint.seconds = 0.05
    samples = samples_of(events_of(endpoint.config(max_concurrency=2), tuple(range(6))))
    assert all(sample.text for sample in samples)
    assert endpoint.most_running == 2


def test_closing_the_generator_hangs_up(endpoint: ScriptedEndpoint) -> None:
    endpoint.seconds = 0.2

    async def work() -> None:
        engine = OpenAIEngine(endpoint.config())
        request = GenerateRequest(
            request_id="r", prompt_ids=(), messages=MESSAGES, sampling=Sampling(), seeds=(1,), stream=True
        )
        async with contextlib.aclosing(engine.generate(request)) as events:
            async for _ in events:
                break
        await engine.close()

    asyncio.run(work())
    assert endpoint.hung_up.wait(5)


def test_a_missing_key_is_named_before_anything_is_sent(
    endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_ENV)
    with pytest.raises(ConfigError, match=f"{KEY_ENV} holds no key"):
        OpenAIEngine(endpoint.config())
    assert endpoint.asked == []


def test_it_cannot_score_and_says_what_can(endpoint: ScriptedEndpoint) -> None:
    engine = OpenAIEngine(endpoint.config())
    with pytest.raises(EngineError, match="use a vllm or transformers engine"):
        asyncio.run(engine.score((1,), (2,)))


def test_an_endpoint_that_bears_few_calls_is_asked_few_at_a_time(endpoint: ScriptedEndpoint) -> None:
    """The endpoint refuses more than four calls at once. Every sample is answered, and the engine learns the limit."""
    endpoint.capacity, endpoint.seconds = 4, 0.02
    engine_config = endpoint.config(max_concurrency=32, max_retries=12)

    async def work() -> tuple[list[Sample], float]:
        engine = OpenAIEngine(engine_config)
        request = GenerateRequest(
            request_id="r", prompt_ids=(), messages=MESSAGES, sampling=Sampling(max_tokens=16), seeds=tuple(range(48))
        )
        samples = [event async for event in engine.generate(request) if isinstance(event, Sample)]
        allowed = engine.limit.allowed
        await engine.close()
        return samples, allowed

    samples, allowed = asyncio.run(work())
    assert [sample.error for sample in samples] == [None] * 48
    assert allowed < 16


def test_the_limit_is_halved_once_for_refusals_that_come_together_and_grows_again() -> None:
    async def work() -> list[int]:
        limit = AdaptiveLimit(16)
        seen = []
        for status, times in ((429, 5), (200, 8), (200, 200)):
            for _ in range(times):
                limit.adapt(status)
            seen.append(int(limit.allowed))
        return seen

    after_refusals, after_a_round, at_last = asyncio.run(work())
    assert after_refusals == 8
    assert 8 <= after_a_round <= 9
    assert at_last == 16
