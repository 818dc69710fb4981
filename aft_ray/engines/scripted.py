"""A scripted stand-in for a language model, for tests and benchmarks of everything around the model.

Each setting of `ScriptedEngineConfig` controls one behaviour. An answer is a function of prompt and seed, so two runs
of the same script agree:

    ScriptedEngine(ScriptedEngineConfig(seconds_per_token=0.01, fail_on=(2,)))

fails the third sample of every request and takes 10 ms per token for the others.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta, TokenLogprob
from aft_ray.errors import EngineError
from aft_ray.fan_in import Emit, fan_in


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
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="scripted",
            tokenizer=self.config.tokenizer,
            max_model_len=self.config.max_model_len,
            takes_messages=self.config.tokenizer is None,
            gives_logprobs=True,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        self.requests.append(request)
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
        try:
            words = self._words(request, index)
            if index in config.fail_on:
                words = []
            pieces = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
            logprobs = _logprobs(pieces, request.top_logprobs)
            for number, piece in enumerate(pieces):
                slow = config.slow_factor if index in config.slow_on else 1
                await asyncio.sleep(config.seconds_per_token * slow)
                self.num_tokens += 1
                if request.stream:
                    emit(TokenDelta(index=index, text=piece, num_tokens=1, logprobs=logprobs[number : number + 1]))
            failed = index in config.fail_on
            emit(
                Sample(
                    index=index,
                    text="".join(pieces),
                    token_ids=tuple(range(len(words))),
                    finish_reason="error"
                    if failed
                    else "length"
                    if len(words) == request.sampling.max_tokens
                    else "stop",
                    num_prompt_tokens=self._num_prompt_tokens(request),
                    num_tokens=len(words),
                    seed=request.seeds[index],
                    error="scripted failure of one sample" if failed else None,
                    logprobs=logprobs,
                )
            )
        finally:
            self.num_running -= 1

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
        return len(request.prompt_ids) or sum(len(m["content"].split()) for m in request.messages)

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        return [-1.0] * len(continuation_ids)

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        return None


def _logprobs(pieces: Sequence[str], top: int | None) -> tuple[TokenLogprob, ...]:
    """Return log-probability -1 for every word, as `score` does, and invented alternatives."""
    if top is None:
        return ()
    others = tuple((f"other-{rank}", -1.0 - rank) for rank in range(1, top))
    return tuple(TokenLogprob(token=p, logprob=-1.0, top=((p, -1.0), *others) if top else ()) for p in pieces)
