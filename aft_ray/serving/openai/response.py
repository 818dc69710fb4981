"""The events of a run as OpenAI objects: one for a plain reply, chunks for a stream. Pure.

    {"id": "chatcmpl-...", "object": "chat.completion", "choices": [{"message": {...}, "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 412, "completion_tokens": 301, ..., "aft": {"layers": [{"layer": 0, ...}, ...]}},
     "aft": {"plan": {...}, "layers": [[{"index": 0, "text": "...", ...}, ...], ...]}}          (include_proposals)

`usage` sums over all engine calls. A stream sends the role first, then `aft.progress` events if the request asks for
them, then content as it is written, then `finish_reason` (with the drafts, if asked for), then usage if asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel

from aft_ray.engines.base import CallPiece, TokenLogprob
from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.inference.layer import EMPTY_ANSWER
from aft_ray.serving.openai.request import ChatCall
from aft_ray.serving.openai.schema import (
    AftProgress,
    AftReply,
    AftUsage,
    AnswerMessage,
    AnswerPiece,
    CachedTokens,
    CalledFunction,
    CalledFunctionPiece,
    CalledTool,
    CalledToolPiece,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatPiece,
    Draft,
    Error,
    ErrorBody,
    Logprob,
    Logprobs,
    Progress,
    ReasoningTokens,
    TextChoice,
    TextChunk,
    TextCompletion,
    TextLogprobs,
    TextPiece,
    TopLogprob,
    Usage,
    encoded,
)

SSE_KEEP_ALIVE = ": keep-alive\n\n"
SSE_DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, the log-probability of a token that a grammar forbids: JSON has no such number."""


def sse_data(payload: BaseModel) -> str:
    """Return the payload as one server-sent event."""
    return f"data: {encoded(payload)}\n\n"


Counted = Literal["all_calls", "last_call"]


def usage_of(layers: Sequence[LayerUsage], counted: Counted = "all_calls", num_prompts: int = 1) -> Usage:
    """Return the tokens of all engine calls; `aft` has them by layer.

    Everything that was written before the final answer counts as reasoning: drafts, hidden layers, thinking. With
    `last_call` the standard fields are those of the last call of a model, for each of the prompts.
    """
    if counted == "last_call":
        written = [layer for layer in layers if layer.decided_by == "model" and layer.num_answers] or layers
        last, num = written[-1], max(1, written[-1].num_answers // num_prompts)
        shown = dataclasses.replace(
            last, prompt_tokens=last.prompt_tokens // num, cached_tokens=last.cached_tokens // num
        )
        whole = usage_of(layers)
        by_layer = AftUsage(
            layers=list(layers),
            prompt_tokens=whole.prompt_tokens,
            completion_tokens=whole.completion_tokens,
            total_tokens=whole.total_tokens,
        )
        return usage_of([shown]).model_copy(update={"aft": by_layer})
    prompt = sum(layer.prompt_tokens for layer in layers)
    completion = sum(layer.completion_tokens for layer in layers)
    unseen = sum(layer.completion_tokens for layer in layers[:-1]) + sum(
        layer.reasoning_tokens for layer in layers[-1:]
    )
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        completion_tokens_details=ReasoningTokens(reasoning_tokens=unseen),
        prompt_tokens_details=CachedTokens(cached_tokens=sum(layer.cached_tokens for layer in layers)),
        aft=AftUsage(layers=list(layers)),
    )


def text_logprobs(tokens: Sequence[TokenLogprob]) -> TextLogprobs | None:
    """Return the `logprobs` of a text completion, in which a token that follows on nothing has none.

    None where no token has any.
    """
    if not tokens:
        return None
    offsets = itertools.accumulate((len(token.token) for token in tokens[:-1]), initial=0)
    none = [math.isnan(token.logprob) for token in tokens]
    return TextLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[None if no else finite(token.logprob) for token, no in zip(tokens, none, strict=True)],
        top_logprobs=[
            None if no else {text: finite(logprob) for text, logprob in token.top}
            for token, no in zip(tokens, none, strict=True)
        ],
        text_offset=list(offsets),
    )


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def failure_of(answer: Answer) -> Literal["empty_answer", "engine_error"] | None:
    """Return why an answer failed, as a client may know it: an engine's own words tell of paths and hosts."""
    if answer.error is None:
        return None
    return "empty_answer" if answer.error == EMPTY_ANSWER else "engine_error"


def draft_of(answer: Answer) -> Draft:
    """Return one answer of one layer, as `include_proposals` shows it."""
    return Draft(
        index=answer.index,
        text=answer.text,
        reasoning=answer.reasoning,
        finish_reason=answer.finish_reason,
        num_tokens=answer.num_tokens,
        error=failure_of(answer),
        inputs=list(answer.inputs),
        length_action=answer.length_action,
    )


def logprob_of(token: TokenLogprob) -> Logprob:
    """Return one token of a choice's `logprobs.content`."""
    top = [TopLogprob(token=text, logprob=finite(logprob), bytes=list(text.encode())) for text, logprob in token.top]
    return Logprob(token=token.token, logprob=finite(token.logprob), bytes=list(token.token.encode()), top_logprobs=top)


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> Logprobs | None:
    """Return the `logprobs` of a choice; None where no token has any."""
    return Logprobs(content=[logprob_of(token) for token in tokens], refusal=None) if tokens else None


def message_of(answer: Answer) -> AnswerMessage:
    """Return a final answer as a message. It has thinking and tool calls only where the answer has them."""
    calls = [
        CalledTool(
            id=call.id or "",
            type="function",
            function=CalledFunction(name=call.name or "", arguments=call.arguments),
        )
        for call in answer.tool_calls
    ]
    more: dict[str, Any] = {}
    if answer.reasoning:
        more["reasoning_content"] = answer.reasoning
    if calls:
        more["tool_calls"] = calls
    content = None if calls and not answer.text else answer.text
    return AnswerMessage(role="assistant", content=content, refusal=None, **more)


def piece_of(delta: AnswerDelta) -> AnswerPiece:
    """Return a piece of a final answer as the `delta` of a chunk."""
    found: dict[str, Any] = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.text or not (delta.reasoning or delta.tool_calls):
        found["content"] = delta.text
    if delta.tool_calls:
        found["tool_calls"] = [call_piece_of(piece) for piece in delta.tool_calls]
    return AnswerPiece(**found)


def call_piece_of(piece: CallPiece) -> CalledToolPiece:
    """Return a piece of a tool call. Its id, type and name come once, with the first piece."""
    if piece.name is None:
        return CalledToolPiece(index=piece.index, function=CalledFunctionPiece(arguments=piece.arguments))
    function = CalledFunctionPiece(name=piece.name, arguments=piece.arguments)
    return CalledToolPiece(index=piece.index, id=piece.id, type="function", function=function)


def finish_reason(answer: Answer) -> str:
    """Return why an answer ended, in the words of the OpenAI API."""
    return "tool_calls" if answer.tool_calls and answer.finish_reason == "stop" else answer.finish_reason


@dataclass(kw_only=True)
class Drafts:
    """Every answer of a run by layer, failed ones included (`Finished` holds the usable ones only)."""

    layers: dict[int, list[Answer]] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if isinstance(event, ProposalDone):
            self.layers.setdefault(event.answer.layer, []).append(event.answer)
        elif isinstance(event, Finished):
            self.layers[event.answer.layer] = list(event.layers[-1])

    def by_layer(self) -> list[list[Draft]]:
        return [
            [draft_of(answer) for answer in sorted(self.layers.get(layer, []), key=lambda a: a.index)]
            for layer in range(max(self.layers, default=-1) + 1)  # a layer that agreement skipped is empty
        ]


@dataclass(frozen=True, kw_only=True)
class Reply(ABC):
    """The reply to one request, in one piece or as the events of a stream."""

    calls: tuple[ChatCall, ...]
    """One for each prompt, which differ in nothing else; only text completions have several."""
    id: str
    created: int
    request_id: str
    counted: Counted = "all_calls"
    """What the standard fields of the usage count (`serving.usage`)."""

    END: ClassVar[str]
    """What ends a stream."""

    @property
    def call(self) -> ChatCall:
        """The first call."""
        return self.calls[0]

    def usage(self, finished: Finished) -> Usage:
        return usage_of(finished.usage, self.counted, len(self.calls))

    def aft(self, drafts: Drafts) -> dict[str, Any]:
        """Return the `aft` object as an argument of a reply, if the request asks for it."""
        if not self.call.include_proposals:
            return {}
        return {"aft": AftReply(plan=self.call.plan, layers=drafts.by_layer())}

    @abstractmethod
    def whole(self, finished: Finished, drafts: Drafts) -> BaseModel:
        """Return the reply in one piece."""

    # A stream: each of these returns the text of as many server-sent events as there are to send.

    @abstractmethod
    def opening(self) -> str:
        """Return what comes first."""

    @abstractmethod
    def piece(self, delta: AnswerDelta) -> str:
        """Return the next piece of an answer."""

    @abstractmethod
    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        """Return a finished draft or layer."""

    @abstractmethod
    def closing(self, finished: Finished, drafts: Drafts) -> str:
        """Return the end of a run that went well."""

    @abstractmethod
    def failed(self, error: Error) -> str:
        """Return the end of a run that failed after its stream had begun."""


Piece = TypeVar("Piece", ChatPiece, TextPiece)


@dataclass(frozen=True, kw_only=True)
class ChunkedReply(Reply, Generic[Piece]):
    """A reply whose stream is made of chunks: completions with the next pieces of their choices."""

    END = SSE_DONE

    @abstractmethod
    def chunk(self, pieces: list[Piece], **more: Any) -> BaseModel:
        """Return a chunk. `more` are its fields that only some have."""

    @abstractmethod
    def first_piece(self, index: int) -> Piece: ...

    @abstractmethod
    def next_piece(self, delta: AnswerDelta) -> Piece: ...

    @abstractmethod
    def last_piece(self, answer: Answer) -> Piece: ...

    def opening(self) -> str:
        num_choices = len(self.calls) * self.call.final.num_choices
        return self._sent([self.first_piece(index) for index in range(num_choices)])

    def piece(self, delta: AnswerDelta) -> str:
        return self._sent([self.next_piece(delta)])

    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        """Return an `aft.progress` event: a chunk without choices, which clients skip."""
        layer = event.answer.layer if isinstance(event, ProposalDone) else event.usage.layer
        answers = drafts.layers.get(layer, [])
        more: dict[str, Any] = {}
        if isinstance(event, LayerDone):
            more["layer_usage"] = event.usage
        elif self.call.include_proposals:
            more["draft"] = draft_of(event.answer)
        progress = Progress(
            layer=layer,
            num_layers=self.call.plan.num_layers,
            num_done=len(answers),
            num_failed=sum(answer.error is not None for answer in answers),
            num_proposals=len(self.calls) * self.call.plan.num_proposals,
            **more,
        )
        return "event: aft.progress\n" + self._sent([], aft=AftProgress(progress=progress))

    def closing(self, finished: Finished, drafts: Drafts) -> str:
        """Return the finish reasons (and the drafts, if asked for), then usage if asked for."""
        ends = self._sent([self.last_piece(answer) for answer in finished.layers[-1]], **self.aft(drafts))
        return ends + (self._sent([], usage=self.usage(finished)) if self.call.include_usage else "")

    def failed(self, error: Error) -> str:
        return sse_data(ErrorBody(error=error))

    def _sent(self, pieces: list[Piece], **more: Any) -> str:
        usage = {"usage": None} if self.call.include_usage else {}
        return sse_data(self.chunk(pieces, **(usage | more)))


@dataclass(frozen=True, kw_only=True)
class ChatReply(ChunkedReply[ChatPiece]):
    """The reply of `/v1/chat/completions`."""

    def whole(self, finished: Finished, drafts: Drafts) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.call.model,
            choices=[
                ChatChoice(
                    index=answer.index,
                    message=message_of(answer),
                    logprobs=chat_logprobs(answer.logprobs),
                    finish_reason=finish_reason(answer),
                )
                for answer in finished.layers[-1]
            ],
            usage=self.usage(finished),
            **self.aft(drafts),
        )

    def chunk(self, pieces: list[ChatPiece], **more: Any) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.call.model,
            choices=pieces,
            **more,
        )

    def first_piece(self, index: int) -> ChatPiece:
        return ChatPiece(
            index=index, delta=AnswerPiece(role="assistant", content=""), logprobs=None, finish_reason=None
        )

    def next_piece(self, delta: AnswerDelta) -> ChatPiece:
        logprobs = chat_logprobs(delta.logprobs)
        return ChatPiece(index=delta.index, delta=piece_of(delta), logprobs=logprobs, finish_reason=None)

    def last_piece(self, answer: Answer) -> ChatPiece:
        return ChatPiece(index=answer.index, delta=AnswerPiece(), logprobs=None, finish_reason=finish_reason(answer))


@dataclass(frozen=True, kw_only=True)
class TextReply(ChunkedReply[TextPiece]):
    """The reply of `/v1/completions`."""

    answer_is_shown: bool = True
    """Whether the text that follows an echoed prompt is shown: not where no token was asked for."""

    def whole(self, finished: Finished, drafts: Drafts) -> TextCompletion:
        return TextCompletion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.call.model,
            choices=[self._choice(answer) for answer in finished.layers[-1]],
            usage=self.usage(finished),
            **self.aft(drafts),
        )

    def _choice(self, answer: Answer) -> TextChoice:
        text, tokens = answer.text, answer.logprobs
        if self.call.final.echo is not None:
            shown = answer if self.answer_is_shown else dataclasses.replace(answer, text="", logprobs=())
            call = self.calls[answer.index // self.call.final.num_choices]
            text, tokens = call.messages[0]["content"] + shown.text, (*answer.prompt_logprobs, *shown.logprobs)
        logprobs = text_logprobs(tokens)
        return TextChoice(index=answer.index, text=text, logprobs=logprobs, finish_reason=finish_reason(answer))

    def chunk(self, pieces: list[TextPiece], **more: Any) -> TextChunk:
        return TextChunk(
            id=self.id, object="text_completion", created=self.created, model=self.call.model, choices=pieces, **more
        )

    def first_piece(self, index: int) -> TextPiece:
        return TextPiece(index=index, text="", logprobs=None, finish_reason=None)

    def next_piece(self, delta: AnswerDelta) -> TextPiece:
        logprobs = text_logprobs(delta.logprobs)
        return TextPiece(index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=None)

    def last_piece(self, answer: Answer) -> TextPiece:
        return TextPiece(index=answer.index, text="", logprobs=None, finish_reason=finish_reason(answer))
