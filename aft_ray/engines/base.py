"""The `Engine` protocol, and the requests, samples and other records that cross it.

A request carries token ids, and the messages they were made from for endpoints that take only messages. The answer
carries text, ids, finish reason and token counts. One `GenerateRequest` asks for n samples of one prompt, so that an
engine can compute the prompt once for all of them. A Ray Serve handle and a local vLLM engine are both an `Engine`, so
the system that is evaluated is the system that is served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from annotated_types import Ge, Gt, Le

from aft_ray.records import Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is sampled. `top_k=0`, `top_p=1` and `min_p=0` switch a filter off; temperature 0 is greedy."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    temperature: Annotated[float, Ge(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0)] = 0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    max_tokens: Annotated[int, Ge(1)] = 512
    stop: tuple[str, ...] = ()

    def also_stopping_at(self, strings: Sequence[str]) -> Sampling:
        """Return this sampling with the stop strings of a prompt format added."""
        return dataclasses.replace(self, stop=tuple(dict.fromkeys((*self.stop, *strings))))


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token of an answer and its natural-log probability."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The most likely tokens at this position and their log-probabilities, as many as the request asked for."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request for n samples of one prompt, where n = len(seeds)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """The ids that the model sees. Empty only for an engine that takes messages (`EngineInfo.takes_messages`)."""
    messages: tuple[Message, ...]
    """The conversation the ids were made from."""
    sampling: Sampling
    seeds: tuple[int, ...]
    """One seed per sample, made by `records.derive_seed`."""
    adapter: str | None = None
    """Folder of the LoRA adapter that answers, or None for the base model."""
    stream: bool = False
    """Whether the engine yields a `TokenDelta` as tokens are made."""
    top_logprobs: int | None = None
    """Number of most likely tokens whose log-probabilities come with each token's own (`EngineInfo.gives_logprobs`);
    None: no log-probabilities."""
    json_schema: str | None = None
    """A JSON schema, itself as JSON, that the answer must match (`EngineInfo.follows_json_schema`)."""
    is_unread: bool = False
    """Whether nobody reads the deltas, which then only show what an unfinished answer has cost so far: they may come a
    few times a second, and an answer that was lost half-way may be started again."""


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """A piece of one sample, sent while the sample is generated."""

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()

    def followed_by(self, later: TokenDelta) -> TokenDelta:
        """Return this piece and a later one of the same sample as one piece."""
        return TokenDelta(
            index=self.index,
            text=self.text + later.text,
            num_tokens=self.num_tokens + later.num_tokens,
            logprobs=self.logprobs + later.logprobs,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One finished answer. With `error` set it failed: its text is empty, and the other samples are not affected."""

    index: int
    """Index of its seed in the request."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int = 0
    """Number of prompt tokens that the engine did not have to compute again."""
    seed: int | None = None
    """The seed that was used, or None where the engine could not use the requested one."""
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


EngineEvent = TokenDelta | Sample


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What callers need to know about an engine before the first request."""

    model: str
    """Name of the model, for records and model cards."""
    tokenizer: str | None
    """Folder or hub id of the tokenizer; None for an engine that takes messages."""
    max_model_len: int
    """Window in tokens, for prompt and answer together."""
    takes_messages: bool = False
    gives_logprobs: bool = False
    follows_json_schema: bool = False


class Engine(Protocol):
    """A model that answers requests: vLLM, transformers, an OpenAI-compatible endpoint, a script or a Serve handle."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield each sample when it is finished, and its deltas before it where the request streams.

        Closing the generator aborts the other samples. Raises EngineError when the engine could not answer the request
        at all, and InputError when no engine could, for example because of an invalid JSON schema.
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        """Return the natural-log probability of each continuation token, given all tokens before it."""
        ...

    async def check(self) -> None:
        """Raise EngineError when the model can no longer answer, for example because its process died."""
        ...

    async def close(self) -> None:
        """Free the model and end every process that the engine started."""
        ...
