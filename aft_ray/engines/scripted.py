"""A scripted stand-in for a language model, for tests and benchmarks of everything around the model.

Each setting of `ScriptedEngineConfig` controls one behaviour. An answer is a function of prompt and seed, so two runs
of the same script agree:

    ScriptedEngine(ScriptedEngineConfig(seconds_per_token=0.01, fail_on=(2,)))

fails the third sample of every request and takes 10 ms per token for the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.base import (
    EXTRAS,
    CallPiece,
    EngineEvent,
    EngineInfo,
    GenerateRequest,
    Sample,
    TokenDelta,
    TokenLogprob,
    ToolUse,
    whole_calls,
)
from aft_ray.engines.grammar import grammar_of, sentence
from aft_ray.errors import EngineDead, EngineError
from aft_ray.fan_in import Emit, fan_in
from aft_ray.records import all_text


class ScriptedEngine:
    """Answers `word-<hash> word-<hash> ...`, or what `ScriptedEngineConfig.answers` says."""

    def __init__(self, config: ScriptedEngineConfig) -> None:
        self.config = config
        self.requests: list[GenerateRequest] = []
        """Every request, in the order received, for tests to inspect."""
        self.num_running = 0
        """Number of samples that are being written. 0 after a cancelled request proves that no task leaked."""
        self.num_prompt_tokens = 0
        """Prompt tokens of all samples that were started: the engine's own count, to compare a caller's usage with."""
        self.num_tokens = 0
        """Tokens written, including those of samples that failed or were cancelled."""

    @property
    def is_dead(self) -> bool:
        return self.config.dies_after is not None and len(self.requests) > self.config.dies_after

    def _check_alive(self) -> None:
        if self.is_dead:
            raise EngineDead(f"scripted death after {self.config.dies_after} requests")

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="scripted",
            tokenizer=self.config.tokenizer,
            max_model_len=self.config.max_model_len,
            chat_template=self.config.chat_template,
            takes_messages=self.config.tokenizer is None,
            gives_logprobs=True,
            gives_prompt_logprobs=True,
            calls_tools=self.config.calls_tools,
            honours=EXTRAS,
            follows_json_schema=self.config.follows_json_schema,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        self.requests.append(request)
        self._check_alive()
        if self.config.fail_requests:
            raise EngineError("scripted failure of the whole request")
        writers = [partial(self._write, request, index) for index in range(len(request.seeds))]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    async def _write(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        config = self.config
        self.num_running += 1
        self.num_prompt_tokens += self._num_prompt_tokens(request)
        request.count(index, 0)
        try:
            deltas = [] if index in config.fail_on else await self._deltas(request, index)
            for delta in deltas:
                slow = config.slow_factor if index in config.slow_on else 1
                await asyncio.sleep(config.seconds_per_token * slow)
                self._check_alive()
                self.num_tokens += 1
                request.count(index, 1)
                if request.stream:
                    emit(delta)
            failed = index in config.fail_on
            emit(
                Sample(
                    index=index,
                    text="".join(delta.text for delta in deltas),
                    token_ids=tuple(range(len(deltas))),
                    finish_reason="error"
                    if failed
                    else "length"
                    if len(deltas) == request.sampling.max_tokens
                    else "stop",
                    num_prompt_tokens=self._num_prompt_tokens(request),
                    num_tokens=len(deltas),
                    reasoning="".join(delta.reasoning for delta in deltas),
                    num_reasoning_tokens=sum(bool(delta.reasoning) for delta in deltas),
                    tool_calls=whole_calls(piece for delta in deltas for piece in delta.tool_calls),
                    seed=request.seeds[index],
                    error="scripted failure of one sample" if failed else None,
                    logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
                    prompt_logprobs=_of_prompt(request),
                )
            )
        finally:
            self.num_running -= 1

    async def _deltas(self, request: GenerateRequest, index: int) -> list[TokenDelta]:
        """Return what a sample writes, token by token: its thinking, then its answer or a call of a tool."""
        thoughts = [
            TokenDelta(index=index, text="", num_tokens=1, reasoning=piece)
            for piece in _pieces(self.config.thinking.split()[: request.sampling.max_tokens])
        ]
        words = self._words(request, index)[: request.sampling.max_tokens - len(thoughts)]
        tool_use = request.tool_use if self.config.calls_tools else None
        if tool_use is not None:
            return [*thoughts, *_call_deltas(index, _pieces(words), _called(tool_use))]
        pieces = _pieces(words)
        if self.config.follows_json_schema and request.json_schema is not None:
            grammar = await grammar_of(request.json_schema)
            pieces = await asyncio.to_thread(sentence, grammar, request.seeds[index], request.sampling.max_tokens)
        logprobs = _logprobs(pieces, request.top_logprobs) or ((),) * len(pieces)
        return [
            *thoughts,
            *(
                TokenDelta(index=index, text=piece, num_tokens=1, logprobs=logprob)
                for piece, logprob in zip(pieces, logprobs, strict=True)
            ),
        ]

    def _words(self, request: GenerateRequest, index: int) -> list[str]:
        if index in self.config.empty_on:
            return []
        if self.config.answers:
            text = self.config.answers[index % len(self.config.answers)]
            return text.split(" ")[: request.sampling.max_tokens]
        key = f"{request.messages}/{request.prompt_ids}/{request.seeds[index]}{request.adapter or ''}".encode()
        digest = hashlib.sha256(key).hexdigest()
        num_words = min(self.config.num_tokens, request.sampling.max_tokens)
        return [f"word-{digest[i % 60 : i % 60 + 4]}" for i in range(num_words)]

    def _num_prompt_tokens(self, request: GenerateRequest) -> int:
        return len(request.prompt_ids) or sum(len(all_text(m).split()) for m in request.messages)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        self._check_alive()
        return [-1.0] * len(continuation_ids)

    async def check(self) -> None:
        self._check_alive()

    async def close(self) -> None:
        return None


def _pieces(words: Sequence[str]) -> list[str]:
    return [word if number == 0 else f" {word}" for number, word in enumerate(words)]


def _called(tool_use: ToolUse) -> str:
    """Return the name of the tool that is asked for, or of the first one."""
    choice = tool_use.choice
    return str((tool_use.tools[0] if isinstance(choice, str) else choice)["function"]["name"])


def _call_deltas(index: int, pieces: Sequence[str], name: str) -> list[TokenDelta]:
    """Return a call with the text as its argument, token by token."""
    last = len(pieces) - 1
    return [
        TokenDelta(
            index=index,
            text="",
            num_tokens=1,
            tool_calls=(
                CallPiece(
                    index=0,
                    id=None if number else f"call_{index}",
                    name=None if number else name,
                    arguments=("" if number else '{"text": "')
                    + json.dumps(piece)[1:-1]
                    + ('"}' if number == last else ""),
                ),
            ),
        )
        for number, piece in enumerate(pieces)
    ]


def _of_prompt(request: GenerateRequest) -> tuple[TokenLogprob, ...]:
    """Return the prompt's ids as words, with the log-probabilities that `score` gives them."""
    if request.prompt_logprobs is None:
        return ()
    words = [f" {index}" for index in request.prompt_ids]
    rest = (logprob for logprobs in _logprobs(words[1:], request.prompt_logprobs) for logprob in logprobs)
    return (*(TokenLogprob(token=word, logprob=math.nan) for word in words[:1]), *rest)


def _logprobs(pieces: Sequence[str], top: int | None) -> tuple[tuple[TokenLogprob, ...], ...]:
    """Return log-probability -1 for every word, as `score` does, and invented alternatives."""
    if top is None:
        return ()
    others = tuple((f"other-{rank}", -1.0 - rank) for rank in range(1, top))
    return tuple((TokenLogprob(token=p, logprob=-1.0, top=((p, -1.0), *others) if top else ()),) for p in pieces)
