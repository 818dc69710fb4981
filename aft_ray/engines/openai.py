"""Any OpenAI-compatible endpoint behind the `Engine` protocol: a remote teacher, a judge, another aft_ray.

It takes messages, not ids, and makes one call per sample: many providers lack `n`, and a failed sample then does not
affect the others. The openai client retries 408, 409, 429, 5xx and connection errors, after the server's Retry-After or
a jittered backoff. The client's retries end where an answer begins, so this module repeats the calls whose answer
breaks off or takes longer than `timeout_s`. The number of concurrent calls adapts to the endpoint, up to
`max_concurrency`.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import httpx

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta
from aft_ray.errors import ConfigError, EngineError
from aft_ray.fan_in import Emit, fan_in

BACKOFF_S = 1.0
"""The limit is halved at most once in this many seconds: several 429s at once are one signal."""

MAX_PAUSE_S = 8.0
"""Longest pause before a call whose answer broke off is repeated."""


class AdaptiveLimit:
    """The limit on concurrent calls: a 429 halves it, and a round of successes raises it by one (AIMD)."""

    def __init__(self, largest: int) -> None:
        self.largest, self.allowed = largest, float(largest)
        self.running = 0
        self._last_cut = float("-inf")
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.running < int(self.allowed))
            self.running += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self.running -= 1
            self._changed.notify_all()

    def adapt(self, status: int) -> None:
        """Adapt the limit to the status of one response."""
        if status == 429:
            now = asyncio.get_running_loop().time()
            if now - self._last_cut >= BACKOFF_S:
                self.allowed, self._last_cut = max(1.0, self.allowed / 2), now
        elif status < 400:
            self.allowed = min(self.largest, self.allowed + 1 / self.allowed)


class OpenAIEngine:
    """One remote model."""

    def __init__(self, config: OpenAIEngineConfig) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(
                f"engine openai ({config.base_url}): the environment variable {config.api_key_env} holds no key. "
                "Set it, or set api_key_env. An endpoint that needs no key accepts any value"
            )
        self.config = config
        self.limit = AdaptiveLimit(config.max_concurrency)
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            api_key=key,
            timeout=config.timeout_s,
            max_retries=config.max_retries,
            # it sees every response, also those that the client retries by itself
            http_client=DefaultAsyncHttpxClient(event_hooks={"response": [self._saw]}),
        )

    async def _saw(self, response: httpx.Response) -> None:
        self.limit.adapt(response.status_code)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self.config.model, tokenizer=None, max_model_len=self.config.max_model_len, takes_messages=True
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        writers = [partial(self._write, request, index) for index in range(len(request.seeds))]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    async def _write(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        """Emit one sample, and its deltas before it."""
        try:
            async with self.limit:
                sample = await self._call(request, index, emit)
        except Exception as error:  # process boundary: whatever the endpoint sends becomes a failed sample
            sample = _failed(index, f"{type(error).__name__}: {error}")
        emit(sample)

    async def _call(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> Sample:
        """Return one answer. A streamed one that breaks off is not repeated: its pieces were handed on already."""
        from openai import APIConnectionError

        attempt = 0
        while True:
            stream = await self._client.chat.completions.create(
                **_parameters(request), model=request.adapter or self.config.model, seed=request.seeds[index]
            )
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    return await _read(stream, request, index, emit)
            except (APIConnectionError, ConnectionError, TimeoutError) as error:
                if request.stream or attempt == self.config.max_retries:
                    if isinstance(error, TimeoutError):
                        raise TimeoutError(f"the answer took longer than timeout_s {self.config.timeout_s:g}") from None
                    raise
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(2**attempt, MAX_PAUSE_S))
            attempt += 1

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        raise EngineError(
            "an OpenAI-compatible endpoint takes no ids and cannot score; use a vllm or transformers engine"
        )

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        await self._client.close()


async def _read(stream: Any, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> Sample:
    """Return the sample of a stream. Raises ConnectionError for a stream that ends without a finish reason."""
    pieces: list[str] = []
    finish_reason, usage = None, None
    async with stream:
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finish_reason = choice.finish_reason or finish_reason
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                    if request.stream:
                        emit(TokenDelta(index=index, text=choice.delta.content, num_tokens=1))
    if finish_reason is None:
        raise ConnectionError(f"the answer broke off after {len(pieces)} pieces")
    cached = getattr(usage, "prompt_tokens_details", None)
    return Sample(
        index=index,
        text=_join_surrogates("".join(pieces)),
        token_ids=(),
        finish_reason=finish_reason,
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_tokens=usage.completion_tokens if usage else len(pieces),
        num_cached_tokens=(cached.cached_tokens or 0) if cached else 0,
        seed=request.seeds[index],
    )


def _join_surrogates(text: str) -> str:
    """Join surrogates that came in two pieces into one character; replace a lone surrogate by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parameters(request: GenerateRequest) -> dict[str, Any]:
    """Return the request in OpenAI's terms. top_k and min_p are extensions and sent only when they are on."""
    sampling = request.sampling
    extra = {name: value for name in ("top_k", "min_p") if (value := getattr(sampling, name))}
    parameters: dict[str, Any] = {
        "messages": [dict(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    if extra:
        parameters["extra_body"] = extra
    return parameters


def _failed(index: int, error: str) -> Sample:
    return Sample(
        index=index, text="", token_ids=(), finish_reason="error", num_prompt_tokens=0, num_tokens=0, error=error
    )
