"""Who generates: the `Engine` protocol and the records that cross it.

Token ids go in (and the messages they were made from, for endpoints that only take messages); text, ids, finish
reason and token counts come out. One `GenerateRequest` asks for n samples of one prompt, so an engine can compute the
prompt once for all of them. A Ray Serve handle and a local vLLM engine are both an `Engine`: what is evaluated is what
is served.
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
    """How one answer is sampled. `top_k=0`, `top_p=1`, `min_p=0` switch the filter off; temperature 0 is greedy."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    temperature: Annotated[float, Ge(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0)] = 0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    max_tokens: Annotated[int, Ge(1)] = 512
    stop: tuple[str, ...] = ()

    def also_stopping_at(self, strings: Sequence[str]) -> Sampling:
        """This sampling with the stop strings of a prompt format added."""
        return dataclasses.replace(self, stop=tuple(dict.fromkeys((*self.stop, *strings))))


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token of an answer and its natural-log probability."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at its place, with theirs, as many as were asked for."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """n samples of one prompt, n = len(seeds)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """Exactly what the model sees. Empty only for an engine that takes messages (`EngineInfo.takes_messages`)."""
    messages: tuple[Message, ...]
    """The conversation the ids were made from."""
    sampling: Sampling
    seeds: tuple[int, ...]
    """One per sample, made by `records.derive_seed`."""
    adapter: str | None = None
    """Path of a LoRA adapter to answer with, or None for the base model."""
    stream: bool = False
    """Ask for `TokenDelta`s as tokens are made."""
    top_logprobs: int | None = None
    """Tell each token's log-probability, and those of this many likeliest ones (`EngineInfo.gives_logprobs`)."""
    json_schema: str | None = None
    """The answer is JSON that this schema, itself JSON, allows (`EngineInfo.follows_json_schema`)."""
    is_unread: bool = False
    """Nobody reads its deltas, they only tell what an unfinished answer has cost: they may come a few times a second,
    and an answer lost half-way may be begun again."""


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """A piece of one sample, as it is made."""

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()

    def followed_by(self, later: TokenDelta) -> TokenDelta:
        """Two pieces of one sample as one."""
        return TokenDelta(
            index=self.index,
            text=self.text + later.text,
            num_tokens=self.num_tokens + later.num_tokens,
            logprobs=self.logprobs + later.logprobs,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One finished answer. With `error` set it is a failed one: text empty, the other samples unharmed."""

    index: int
    """Which of the request's seeds it answers."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int = 0
    """Prompt tokens that the engine did not have to compute again."""
    seed: int | None = None
    """The seed used, or None where the engine could not use the one asked for."""
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


EngineEvent = TokenDelta | Sample


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What the rooms need to know of an engine before the first request."""

    model: str
    """Name of the model, for records and cards."""
    tokenizer: str | None
    """Folder or hub id of its tokenizer; None for an engine that takes messages."""
    max_model_len: int
    """Window in tokens: prompt + answer."""
    takes_messages: bool = False
    gives_logprobs: bool = False
    follows_json_schema: bool = False


class Engine(Protocol):
    """A model that answers. Implementations: `vllm`, `transformers`, `openai`, `scripted`, a Serve handle."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield each sample as it finishes (deltas before it, when asked). Closing the generator aborts the rest.

        Raises EngineError when the request as a whole could not be answered, InputError when no engine could answer it
        (a JSON schema that is none).
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        """Natural-log probability of each continuation token given all tokens before it; one float per token."""
        ...

    async def check(self) -> None:
        """Raise EngineError when the model can no longer answer (its process died, say)."""
        ...

    async def close(self) -> None:
        """Free the model and end every process it started."""
        ...
