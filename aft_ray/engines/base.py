"""The `Engine` protocol, and the requests, samples and other records that cross it.

A request carries token ids, and the messages they were made from for endpoints that take only messages. The answer
carries text, ids, finish reason and token counts. One `GenerateRequest` asks for n samples of one prompt, so that an
engine can compute the prompt once for all of them. A Ray Serve handle and a local vLLM engine are both an `Engine`, so
the system that is evaluated is the system that is served.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from annotated_types import Ge, Gt, Le

from aft_ray.records import Message, Spent


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is sampled. `top_k=0`, `top_p=1` and `min_p=0` switch a filter off; temperature 0 is greedy."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    temperature: Annotated[float, Ge(0)] = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Keeps the likeliest tokens that together have this probability; 1 keeps all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Keeps this many of the likeliest tokens; 0 keeps all."""
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Keeps tokens with at least this share of the likeliest one's probability; 0 keeps all."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Largest number of tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken from a token's logit for each time that the answer has it already."""
    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken from a token's logit if the answer has it already."""
    repetition_penalty: Annotated[float, Gt(0), Le(10)] = 1.0
    """Divides the logits of tokens that the answer or the prompt has, drafts included; 1 switches it off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    ignore_eos: bool = False
    """Write `max_tokens` tokens, whatever they are."""

    @property
    def extras(self) -> frozenset[str]:
        """Names of the settings in use that not every engine honours (`EngineInfo.honours`)."""
        return frozenset(name for name in EXTRAS if getattr(self, name) != getattr(Sampling, name))

    def without(self, extras: Iterable[str]) -> Sampling:
        """Return this sampling with some of its extras at their defaults, which do nothing."""
        return dataclasses.replace(self, **{name: getattr(Sampling, name) for name in extras})

    def also_stopping_at(self, strings: Sequence[str]) -> Sampling:
        """Return this sampling with the stop strings of a prompt format added."""
        return dataclasses.replace(self, stop=tuple(dict.fromkeys((*self.stop, *strings))))


EXTRAS = frozenset({"frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos"})
"""Settings of `Sampling` that not every engine honours."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token of an answer and its natural-log probability."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The most likely tokens at this position and their log-probabilities, as many as the request asked for."""


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools that an answer may call, in the words of the OpenAI API."""

    tools: tuple[Mapping[str, Any], ...]
    choice: str | Mapping[str, Any] = "auto"
    """`none`, `auto`, `required`, or `{"type": "function", "function": {"name": ...}}`."""
    is_parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def may_call(self) -> bool:
        return self.choice != "none"


@dataclass(frozen=True, kw_only=True)
class SpanParent:
    """The span that the spans of a request are children of, where it is traced."""

    carrier: Mapping[str, str]
    """W3C `traceparent` and `tracestate`."""
    attributes: Mapping[str, Any]
    """What all of the children say of themselves."""


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
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides the model's own (`PromptFormat.stop_ids`): where training taught it to end. The
    id is the last of `Sample.token_ids`, and its text is not in `Sample.text`."""
    adapter: str | None = None
    """Folder of the LoRA adapter that answers, or None for the base model."""
    stream: bool = False
    """Whether the engine yields a `TokenDelta` as tokens are made."""
    top_logprobs: int | None = None
    """Number of most likely tokens whose log-probabilities come with each token's own (`EngineInfo.gives_logprobs`);
    None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt (`EngineInfo.gives_prompt_logprobs`). None: they are not computed."""
    json_schema: str | None = None
    """A JSON schema, itself as JSON, that the answer must match (`EngineInfo.follows_json_schema`)."""
    tool_use: ToolUse | None = None
    """The tools that the answer may call (`EngineInfo.calls_tools`). The prompt's ids describe them already."""
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template was told besides the messages, for parsers that depend on it (`enable_thinking`)."""
    cache_salt: str | None = None
    """Requests share cached prompts only with those of the same salt; None: with all that have none."""
    trace: SpanParent | None = dataclasses.field(default=None, compare=False, repr=False)
    """Set where the request is traced; engines do not look at it."""
    written: Counter[int] | None = dataclasses.field(default=None, compare=False, repr=False)
    """Where the engine counts the tokens of each sample as it writes them. A sample that is cut off is never reported,
    so whoever cuts it off reads here what it cost. None: nobody asks."""

    def count(self, index: int, num_tokens: int) -> None:
        """Count tokens of a sample that were just written; 0 when the engine begins to work on it."""
        if self.written is not None:
            self.written[index] += num_tokens


@dataclass(frozen=True, kw_only=True)
class CallPiece:
    """A piece of a tool call. The first one of a call has its id and its name."""

    index: int
    """Position of the call in its answer."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """The next piece of the arguments, which are JSON text."""


def whole_calls(pieces: Iterable[CallPiece]) -> tuple[CallPiece, ...]:
    """Return every call as one piece."""
    calls: dict[int, CallPiece] = {}
    for piece in pieces:
        begun = calls.get(piece.index, CallPiece(index=piece.index))
        calls[piece.index] = CallPiece(
            index=piece.index,
            id=begun.id or piece.id,
            name=begun.name or piece.name,
            arguments=begun.arguments + piece.arguments,
        )
    return tuple(calls[index] for index in sorted(calls))


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """A piece of one sample, sent while the sample is generated."""

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    """A piece of what the model thinks before its answer, where the engine tells the two apart."""
    tool_calls: tuple[CallPiece, ...] = ()

    def followed_by(self, later: TokenDelta) -> TokenDelta:
        """Return this piece and a later one of the same sample as one piece."""
        return TokenDelta(
            index=self.index,
            text=self.text + later.text,
            num_tokens=self.num_tokens + later.num_tokens,
            logprobs=self.logprobs + later.logprobs,
            reasoning=self.reasoning + later.reasoning,
            tool_calls=self.tool_calls + later.tool_calls,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One finished answer. With `error` set it failed: its text is empty, and the other samples are not affected."""

    index: int
    """Index of its seed in the request."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop` (the model ended its answer, or wrote a stop string), `length`, or `error` with `error` set. An endpoint
    may have others, such as `content_filter` or `refusal`."""
    num_prompt_tokens: int
    num_tokens: int
    """Number of generated tokens, those of the reasoning included."""
    reasoning: str = ""
    """What the model thought before the answer, where the engine tells the two apart."""
    num_reasoning_tokens: int = 0
    tool_calls: tuple[CallPiece, ...] = ()
    """Whole calls, in order."""
    usage_estimated: bool = False
    """Whether the token counts are this package's own, because the endpoint gave none."""
    spent: Spent | None = None
    """What the sample cost, lost tries included, where that is more than its own tokens."""
    num_cached_tokens: int = 0
    """Number of prompt tokens that the engine did not have to compute again."""
    seed: int | None = None
    """The seed that was used, or None where the engine could not use the requested one."""
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The prompt's tokens. The first one follows on nothing, so its log-probability is not a number."""

    @classmethod
    def failed(cls, index: int, error: str, *, seed: int | None = None, spent: Spent | None = None) -> Sample:
        """Return a sample of which nothing came but the reason."""
        return cls(
            index=index,
            text="",
            token_ids=(),
            finish_reason="error",
            num_prompt_tokens=0,
            num_tokens=0,
            seed=seed,
            spent=spent,
            error=error,
        )


EngineEvent = TokenDelta | Sample


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What callers need to know about an engine before the first request."""

    model: str
    """Name of the model, for records and model cards."""
    tokenizer: str | None
    """Reference to the tokenizer, which each process resolves on its own node; None for an engine that takes messages.
    """
    max_model_len: int
    """Window in tokens, for prompt and answer together."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own, as `engine.chat_template` gives it."""
    trust_remote_code: bool = False
    """Whether the tokenizer may run code of its own."""
    takes_messages: bool = False
    gives_logprobs: bool = False
    gives_prompt_logprobs: bool = False
    follows_json_schema: bool = False
    calls_tools: bool = False
    honours: frozenset[str] = frozenset()
    """Those of `EXTRAS` that the engine honours."""


class Engine(Protocol):
    """A model that answers requests: vLLM, transformers, an OpenAI-compatible endpoint, a script or a Serve handle."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield each sample when it is finished, and its deltas before it where the request streams.

        Closing the generator aborts the other samples. Raises EngineError when the engine could not answer the request
        at all, EngineDead when it will answer none any more, and InputError when no engine could answer this one, for
        example because of an invalid JSON schema.
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        """Return the natural-log probability of each continuation token, given all tokens before it."""
        ...

    async def check(self) -> None:
        """Raise EngineDead when the model can no longer answer, for example because its process died."""
        ...

    async def close(self) -> None:
        """Free the model and end every process that the engine started."""
        ...
