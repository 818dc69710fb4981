"""The OpenAI-compatible engine over real HTTP: a scripted model behind a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines import EngineEvent, GenerateRequest, Sample, Sampling, TokenDelta
from aft_ray.engines.openai import AdaptiveLimit, OpenAIEngine
from aft_ray.errors import ConfigError, EngineError

MESSAGES = ({"role": "user", "content": "Name a river."},)


class ScriptedModel(ThreadingHTTPServer):
    """Answers `the <word> <seed>` as server-sent events, one word at a time, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.refuse_first: list[tuple[int, dict[str, str]]] = []
        """(status, headers) of the first replies, which come before any answer."""
        self.fail_seeds: set[int] = set()
        self.words = ("the", " Nile", " {seed}")
        self.break_off = 0
        """Number of answers that end after their first word."""
        self.seconds = 0.0
        self.capacity: int | None = None
        """Most concurrent calls. Others are refused with 429."""
        self.lock = threading.Lock()
        self.num_running = self.most_running = 0
        self.hung_up = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: ScriptedModel

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            refusal = self.server.refuse_first.pop(0) if self.server.refuse_first else None
            self.server.num_running += 1
            if self.server.capacity and self.server.num_running > self.server.capacity:
                refusal = (429, {"Retry-After": "0.1"})
            self.server.most_running = max(self.server.most_running, self.server.num_running)
        try:
            if refusal:
                self.refuse(*refusal)
            elif body["seed"] in self.server.fail_seeds:
                self.refuse(400, {})
            else:
                self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()
        finally:
            with self.server.lock:
                self.server.num_running -= 1

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        content = json.dumps({"error": {"message": f"scripted {status}"}}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in self.server.words:
            time.sleep(self.server.seconds)
            if word != "the" and self.server.break_off > 0:
                self.server.break_off -= 1
                return
            self.event(
                {"choices": [{"index": 0, "delta": {"content": word.format(seed=body["seed"])}, "finish_reason": None}]}
            )
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk: dict[str, Any]) -> None:
        whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "scripted", **chunk}
        self.wfile.write(b"data: " + json.dumps(whole).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    server = ScriptedModel()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def config(model: ScriptedModel, **others: Any) -> OpenAIEngineConfig:
    url = f"http://127.0.0.1:{model.server_address[1]}/v1"
    return OpenAIEngineConfig(base_url=url, model="teacher", api_key_env="AFT_RAY_TEST_TEACHER_KEY", **others)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFT_RAY_TEST_TEACHER_KEY", "sesame")


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


def test_every_sample_is_a_call_of_its_own_with_its_own_seed(model: ScriptedModel) -> None:
    samples = samples_of(events_of(config(model), (4, 5, 6)))
    assert [sample.text for sample in samples] == ["the Nile 4", "the Nile 5", "the Nile 6"]
    assert {(s.finish_reason, s.num_prompt_tokens, s.num_tokens, s.error) for s in samples} == {("stop", 7, 3, None)}
    assert sorted(body["seed"] for body in model.asked) == [4, 5, 6]


def test_the_sampling_is_sent_in_openai_words(model: ScriptedModel) -> None:
    events_of(config(model))
    (body,) = model.asked
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
    assert model.keys == {"Bearer sesame"}


def test_streamed_pieces_come_before_their_sample(model: ScriptedModel) -> None:
    events = events_of(config(model), stream=True)
    assert [event.text for event in events if isinstance(event, TokenDelta)] == ["the", " Nile", " 1"]
    assert isinstance(events[-1], Sample)


def test_a_busy_server_is_asked_again_when_it_says_so(model: ScriptedModel) -> None:
    model.refuse_first = [(429, {"Retry-After": "0.3"}), (503, {"Retry-After": "0.3"})]
    start = time.monotonic()
    (sample,) = samples_of(events_of(config(model)))
    assert (sample.text, sample.error) == ("the Nile 1", None)
    assert len(model.asked) == 3
    assert time.monotonic() - start >= 0.6


def test_an_answer_that_breaks_off_is_asked_for_again_and_never_kept_half(model: ScriptedModel) -> None:
    model.break_off = 1
    (sample,) = samples_of(events_of(config(model)))
    assert (sample.text, sample.finish_reason, sample.error, len(model.asked)) == ("the Nile 1", "stop", None, 2)
    model.break_off = 2
    (sample,) = samples_of(events_of(config(model, max_retries=1)))
    assert (sample.text, sample.error) == ("", "ConnectionError: the answer broke off after 1 pieces")


def test_an_answer_whose_pieces_were_handed_on_is_not_begun_again(model: ScriptedModel) -> None:
    model.break_off = 1
    (sample,) = samples_of(events_of(config(model), stream=True))
    assert "broke off" in (sample.error or "")
    assert len(model.asked) == 1


def test_an_answer_that_drips_longer_than_the_timeout_is_a_failed_sample_and_harms_no_other(
    model: ScriptedModel,
) -> None:
    model.seconds = 0.8  # a word; no single read is as slow as the timeout
    (sample,) = samples_of(events_of(config(model, timeout_s=1.0, max_retries=1)))
    assert sample.error == "TimeoutError: the answer took longer than timeout_s 1"
    assert len(model.asked) == 2
    (sample,) = samples_of(events_of(config(model, timeout_s=60)))
    assert sample.text == "the Nile 1"


@pytest.mark.parametrize(("ending", "text"), [("\ude00", "the Nile \U0001f600"), ("?", "the Nile \ufffd?")])
def test_half_characters_are_put_together_or_replaced(model: ScriptedModel, ending: str, text: str) -> None:
    model.words = ("the", " Nile \ud83d", ending)
    (sample,) = samples_of(events_of(config(model)))
    assert sample.text == text


def test_a_sample_that_is_refused_harms_no_other(model: ScriptedModel) -> None:
    model.fail_seeds = {2}
    good, failed, last = samples_of(events_of(config(model), (1, 2, 3)))
    assert (good.text, last.text) == ("the Nile 1", "the Nile 3")
    assert failed.finish_reason == "error"
    assert "scripted 400" in (failed.error or "")


def test_a_server_that_is_away_is_a_failed_sample_with_the_reason(model: ScriptedModel) -> None:
    away = config(model, max_retries=0).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    (sample,) = samples_of(events_of(away))
    assert "APIConnectionError" in (sample.error or "")


def test_no_more_calls_than_allowed_run_at_once(model: ScriptedModel) -> None:
    model.seconds = 0.05
    samples = samples_of(events_of(config(model, max_concurrency=2), tuple(range(6))))
    assert all(sample.text for sample in samples)
    assert model.most_running == 2


def test_closing_the_generator_hangs_up(model: ScriptedModel) -> None:
    model.seconds = 0.2

    async def work() -> None:
        engine = OpenAIEngine(config(model))
        request = GenerateRequest(
            request_id="r", prompt_ids=(), messages=MESSAGES, sampling=Sampling(), seeds=(1,), stream=True
        )
        async with contextlib.aclosing(engine.generate(request)) as events:
            async for _ in events:
                break
        await engine.close()

    asyncio.run(work())
    assert model.hung_up.wait(5)


def test_a_missing_key_is_named_before_anything_is_sent(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFT_RAY_TEST_TEACHER_KEY")
    with pytest.raises(ConfigError, match="AFT_RAY_TEST_TEACHER_KEY holds no key"):
        OpenAIEngine(config(model))
    assert model.asked == []


def test_it_cannot_score_and_says_what_can(model: ScriptedModel) -> None:
    engine = OpenAIEngine(config(model))
    with pytest.raises(EngineError, match="use a vllm or transformers engine"):
        asyncio.run(engine.score((1,), (2,)))


def test_an_endpoint_that_bears_few_calls_is_asked_few_at_a_time(model: ScriptedModel) -> None:
    """The endpoint refuses more than four calls at once. Every sample is answered, and the engine learns the limit."""
    model.capacity, model.seconds = 4, 0.02
    engine_config = config(model, max_concurrency=32, max_retries=12)

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
