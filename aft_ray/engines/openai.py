"""Any OpenAI-compatible endpoint behind the `Engine` protocol: a remote teacher, a judge, another aft_ray.

It takes messages, not ids. One call per sample (providers without `n` are common, and a failed sample then harms no
other), at most `max_concurrency` calls at once; the openai client retries 408, 409, 429, 5xx and connection errors
with the server's Retry-After or jittered backoff.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta
from aft_ray.errors import ConfigError, EngineError


class OpenAIEngine:
    """One remote model."""

    def __init__(self, config: OpenAIEngineConfig) -> None:
        from openai import AsyncOpenAI

        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(
                f"engine openai ({config.base_url}): the environment variable {config.api_key_env} holds no key. "
                "Set it, or set api_key_env; an endpoint without keys accepts any word"
            )
        self.config = config
        self._client = AsyncOpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=config.max_retries
        )
        self._places = asyncio.Semaphore(config.max_concurrency)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self.config.model, tokenizer=None, max_model_len=self.config.max_model_len, takes_messages=True
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        writers = [asyncio.create_task(self._write(request, index, events)) for index in range(len(request.seeds))]
        try:
            num_left = len(writers)
            while num_left:
                event = await events.get()
                num_left -= isinstance(event, Sample)
                yield event
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)

    async def _write(self, request: GenerateRequest, index: int, events: asyncio.Queue[EngineEvent]) -> None:
        from openai import OpenAIError

        try:
            async with self._places:
                sample = await self._call(request, index, events)
        except OpenAIError as error:
            sample = _failed(index, f"{type(error).__name__}: {error}")
        events.put_nowait(sample)

    async def _call(self, request: GenerateRequest, index: int, events: asyncio.Queue[EngineEvent]) -> Sample:
        stream = await self._client.chat.completions.create(
            **_parameters(request), model=request.adapter or self.config.model, seed=request.seeds[index]
        )
        pieces: list[str] = []
        finish_reason, usage = "abort", None
        async with stream:
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        pieces.append(choice.delta.content)
                        if request.stream:
                            events.put_nowait(TokenDelta(index=index, text=choice.delta.content, num_tokens=1))
        cached = getattr(usage, "prompt_tokens_details", None)
        return Sample(
            index=index,
            text="".join(pieces),
            token_ids=(),
            finish_reason=finish_reason,
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_tokens=usage.completion_tokens if usage else len(pieces),
            num_cached_tokens=(cached.cached_tokens or 0) if cached else 0,
            seed=request.seeds[index],
        )

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


def _parameters(request: GenerateRequest) -> dict[str, Any]:
    """The request in OpenAI's words. top_k and min_p are extensions, sent only when they are on."""
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
