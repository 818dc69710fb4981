"""Any OpenAI-compatible endpoint behind the `Engine` protocol: a remote teacher, a judge, another aft_ray.

It takes messages, not ids, and makes one call per sample: many providers lack `n`, and a failed sample then does not
affect the others. What is sent follows from the settings (config/endpoints.py), and what comes is read by
endpoint_reply.py, whatever its form. A call that may succeed later is tried again: after the pause that the endpoint
asks for, which holds every call of this engine, or after a jittered backoff. What came is looked at first: an answer
that is complete is never paid for twice, and the tokens of one that is lost are counted (`Sample.spent`). The number of
concurrent calls adapts to the endpoint, up to `max_concurrency`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import cached_property, partial
from typing import Any

import httpx

from aft_ray.config import OpenAIEngineConfig
from aft_ray.engines.adaptive_limit import AdaptiveLimit, pause_asked_for
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta
from aft_ray.engines.endpoint_reply import Failure, Reply, refused
from aft_ray.errors import ConfigError, EngineError
from aft_ray.fan_in import Emit, fan_in
from aft_ray.models import load_tokenizer, resolve_tokenizer
from aft_ray.records import Spent, all_text

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 8.0
"""Longest pause before another try where the endpoint asks for none."""
BUSY = frozenset({429, 503, 529})
"""Statuses of an endpoint that turns calls away for load. 529 is Anthropic's."""
BYTES_PER_TOKEN = 4
"""Of UTF-8, where no tokenizer counts: English has about 4 characters per token."""
TOKENS_PER_MESSAGE = 4
"""Number of control tokens around a turn, where no tokenizer counts."""


class CallFailed(Exception):
    """One try brought no answer. `reply` holds what came all the same."""

    def __init__(self, failure: Failure, reply: Reply, *, is_busy: bool = False, asks_to_wait: bool = False) -> None:
        super().__init__(failure.reason)
        self.failure, self.reply = failure, reply
        self.is_busy, self.asks_to_wait = is_busy, asks_to_wait


class OpenAIEngine:
    """One remote model."""

    def __init__(self, config: OpenAIEngineConfig) -> None:
        self.config = config
        self.limit = AdaptiveLimit(config.max_concurrency)
        self._url = httpx.URL(config.base_url)
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise ConfigError(f"engine openai: base_url {config.base_url!r} is no URL; expected http(s)://HOST/...")
        self._url = self._url.copy_with(path=f"{self._url.path.rstrip('/')}/chat/completions")
        self._url = self._url.copy_merge_params(config.query)
        self._client = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **config.headers, **key_header(config)},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.max_concurrency),
            follow_redirects=True,
        )

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self.config.model,
            tokenizer=None,
            max_model_len=self.config.max_model_len,
            takes_messages=True,
            calls_tools=self.config.calls_tools,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        writers = [partial(self._write, request, index) for index in range(len(request.seeds))]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    async def _write(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        """Emit one sample, and its deltas before it. The limit is left between two tries, so that others may go on."""
        lost = Spent()
        num_tries, backoff = 0, 0
        while True:
            others_answered = self.limit.num_answered
            try:
                async with self.limit:
                    reply = await self._try(request, index, emit)
                emit(self._sample(request, index, reply, lost))
                return
            except CallFailed as failed:
                lost += self._spent(request, failed.reply)
                num_tries += 1
                if not (failed.is_busy and self.limit.num_answered > others_answered):
                    backoff += 1
                was_handed_on = request.stream and failed.reply.num_pieces > 0
                if not failed.failure.is_transient or was_handed_on or backoff > self.config.max_retries:
                    tries = f" ({num_tries} tries)" if num_tries > 1 else ""
                    emit(Sample.failed(index, f"{failed.failure.reason}{tries}", spent=lost))
                    return
                if not failed.asks_to_wait:
                    await asyncio.sleep(random.uniform(0.5, 1.0) * min(2 ** (backoff - 1), MAX_BACKOFF_S))
            except Exception as error:  # process boundary: whatever the endpoint sends becomes a failed sample
                logger.exception("%s: a reply could not be read", self.config.base_url)
                emit(Sample.failed(index, f"{type(error).__name__}: {error}", spent=lost))
                return

    async def _try(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> Reply:
        """Make one call and return its complete reply. Raises CallFailed."""
        config, reply = self.config, Reply()
        body = json.dumps(request_body(config, request, index)).encode()
        try:
            async with asyncio.timeout(config.timeout_s) as until:
                async with self._client.stream("POST", self._url, content=body) as response:
                    until.reschedule(asyncio.get_running_loop().time() + config.timeout_s)
                    self.limit.adapt(response.status_code)
                    if response.status_code >= 400:
                        raise self._refusal(response, (await response.aread()).decode(errors="replace"), reply)
                    request.count(index, 0)
                    async for line in lines_of(response):
                        num_before = reply.num_pieces
                        self._hand_on(reply.feed(line), reply, request, index, emit)
                        request.count(index, reply.num_pieces - num_before)
                    rest = reply.end(response.headers.get("content-type", ""))
                    self._hand_on(rest, reply, request, index, emit)
        except (httpx.TransportError, httpx.StreamError, TimeoutError) as error:
            reply.end()
            if not reply.is_complete:
                raise CallFailed(self._why_lost(error, reply), reply) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = Failure(reason=f"{type(error).__name__}: {error}", is_transient=False)
            raise CallFailed(failure, reply) from error
        if reply.failure is not None:
            raise CallFailed(reply.failure, reply)
        return reply

    def _hand_on(self, piece: str, reply: Reply, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        """Emit a piece of the answer, and the reasoning and tool calls that came with it, where somebody reads them."""
        thought, calls = reply.take_reasoning(), reply.take_calls()
        if request.stream and (piece or thought or calls):
            emit(TokenDelta(index=index, text=piece, reasoning=thought, tool_calls=calls, num_tokens=1))

    def _refusal(self, response: httpx.Response, text: str, reply: Reply) -> CallFailed:
        """Return the failure of a call that was refused. A pause that the endpoint asks for holds all calls."""
        failure = refused(response.status_code, text)
        pause = pause_asked_for(response.headers) if failure.is_transient else None
        if pause is not None and pause > self.config.max_pause_s:
            reason = (
                f"{failure.reason}; the endpoint asks for a pause of {pause:.0f} s, longer than max_pause_s "
                f"{self.config.max_pause_s:g}"
            )
            failure, pause = Failure(reason=reason, is_transient=False), None
        if pause is not None:
            if pause > max(MAX_BACKOFF_S, self.limit.pause_s):
                logger.warning("%s asks for a pause of %.0f s (%s)", self._url.host, pause, failure.reason)
            self.limit.hold(pause)
        return CallFailed(failure, reply, is_busy=response.status_code in BUSY, asks_to_wait=pause is not None)

    def _why_lost(self, error: Exception, reply: Reply) -> Failure:
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            reason = f"the answer took longer than timeout_s {self.config.timeout_s:g}"
        elif reply.num_pieces:
            reason = f"the answer broke off after {reply.num_pieces} pieces"
        else:
            reason = f"no answer from {self._url.host}: {type(error).__name__}: {error}"
        return Failure(reason=reason, is_transient=True)

    # ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sample(self, request: GenerateRequest, index: int, reply: Reply, lost: Spent) -> Sample:
        own, usage = self._spent(request, reply), reply.usage
        assert reply.failure is None
        finish_reason = reply.finish_reason or (
            "length" if own.completion_tokens >= request.sampling.max_tokens else "stop"
        )
        return Sample(
            index=index,
            text=reply.text,
            token_ids=(),
            finish_reason=finish_reason,
            num_prompt_tokens=own.prompt_tokens,
            num_tokens=own.completion_tokens,
            reasoning=reply.reasoning,
            num_reasoning_tokens=self._num_reasoning_tokens(reply, own),
            tool_calls=reply.tool_calls,
            num_cached_tokens=usage.cached_tokens or 0,
            usage_estimated=own.num_estimated > 0,
            seed=None if "seed" in self.config.omit else request.seeds[index],
            spent=own + lost,
        )

    def _spent(self, request: GenerateRequest, reply: Reply) -> Spent:
        """Return what a reply cost. What the endpoint did not count is counted here; nothing came, nothing is booked.

        A usage that counts nothing for what was written was not filled in.
        """
        called = "".join(f"{call.name}{call.arguments}" for call in reply.tool_calls)
        usage, num_written = reply.usage, sum(map(self._count, (reply.reasoning, reply.text, called)))
        completion = usage.completion_tokens or None
        if usage.prompt_tokens is None and completion is None and not reply.num_pieces:
            return Spent()
        is_counted = usage.prompt_tokens is not None and (completion is not None or not num_written)
        messages = (TOKENS_PER_MESSAGE + self._count(all_text(message)) for message in request.messages)
        prompt = usage.prompt_tokens if usage.prompt_tokens is not None else sum(messages)
        completion = num_written if completion is None else completion
        prices = self.config.prices
        return Spent(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost_usd=(prompt * prices.prompt + completion * prices.completion) / 1e6 if prices else 0.0,
            num_estimated=0 if is_counted else 1,
        )

    def _num_reasoning_tokens(self, reply: Reply, own: Spent) -> int:
        """Return how many of the tokens are reasoning: as reported, else its share of the text."""
        if reply.usage.reasoning_tokens is not None:
            return reply.usage.reasoning_tokens
        thought, answered = self._count(reply.reasoning), self._count(reply.text)
        return round(own.completion_tokens * thought / (thought + answered)) if thought else 0

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            return math.ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN)
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Any:
        if self.config.tokenizer is None:
            return None
        return load_tokenizer(resolve_tokenizer(self.config.tokenizer))

    # ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        raise EngineError(
            "an OpenAI-compatible endpoint takes no ids and cannot score; use a vllm or transformers engine"
        )

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        await self._client.aclose()


def key_header(config: OpenAIEngineConfig) -> dict[str, str]:
    """Return the header with the key. Raises ConfigError where the variable that should hold it is empty."""
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"engine openai ({config.base_url}): the environment variable {config.api_key_env} holds no key. "
            "Set it, name another one in api_key_env, or set that to null for an endpoint that needs no key"
        )
    is_bearer = config.api_key_header.lower() == "authorization"
    return {config.api_key_header: f"Bearer {key}" if is_bearer else key}


def request_body(config: OpenAIEngineConfig, request: GenerateRequest, index: int) -> dict[str, Any]:
    """Return the body of the call for one sample, in the words of this endpoint."""
    sampling, tool_use = request.sampling, request.tool_use
    fields: dict[str, Any] = {
        "model": request.adapter or config.model,
        "stream": config.stream,
        "stream_options": {"include_usage": True} if config.stream else None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop) or None,
        "seed": request.seeds[index],
        "tools": None if tool_use is None else list(tool_use.tools),
        "tool_choice": None if tool_use is None else tool_use.choice,
        "parallel_tool_calls": None if tool_use is None or tool_use.is_parallel else False,
    }
    sent = {
        config.rename.get(name, name): value  # type: ignore[call-overload] # a field's name is a plain string here
        for name, value in fields.items()
        if value is not None and name not in config.omit
    }
    return {"messages": [dict(message) for message in request.messages], **config.extra_body, **sent}


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of a body. Only line feeds end one: httpx also splits at U+2028, which may stand inside JSON."""
    rest = b""
    async for received in response.aiter_bytes():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
