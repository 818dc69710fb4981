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
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aft_ray.engines.base import CallPiece, TokenLogprob
from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.inference.layer import EMPTY_ANSWER
from aft_ray.serving.openai.request import ChatCall

SSE_KEEP_ALIVE = ": keep-alive\n\n"
SSE_DONE = "data: [DONE]\n\n"


def sse_data(payload: dict[str, Any]) -> str:
    """Return the payload as one server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


Counted = Literal["all_calls", "last_call"]


def usage_object(layers: Sequence[LayerUsage], counted: Counted = "all_calls", num_prompts: int = 1) -> dict[str, Any]:
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
        whole = usage_object(layers)
        sums = {key: whole[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return {**usage_object([shown]), "aft": {**whole["aft"], **sums}}
    prompt = sum(layer.prompt_tokens for layer in layers)
    completion = sum(layer.completion_tokens for layer in layers)
    cached = sum(layer.cached_tokens for layer in layers)
    unseen = sum(layer.completion_tokens for layer in layers[:-1]) + sum(
        layer.reasoning_tokens for layer in layers[-1:]
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": unseen},
        "prompt_tokens_details": {"cached_tokens": cached},
        "aft": {"layers": [dataclasses.asdict(layer) for layer in layers]},
    }


def text_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the `logprobs` of a text completion. A token that follows on nothing has none."""
    offsets = itertools.accumulate((len(token.token) for token in tokens[:-1]), initial=0)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token in tokens],
        "top_logprobs": [None if math.isnan(token.logprob) else dict(token.top) for token in tokens],
        "text_offset": list(offsets) if tokens else [],
    }


def failure_of(answer: Answer) -> str | None:
    """Return why an answer failed, as a client may know it: an engine's own words tell of paths and hosts."""
    if answer.error is None:
        return None
    return "empty_answer" if answer.error == EMPTY_ANSWER else "engine_error"


def draft_object(answer: Answer) -> dict[str, Any]:
    """Return one answer of one layer, as `include_proposals` shows it."""
    return {
        "index": answer.index,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
        "error": failure_of(answer),
        "inputs": list(answer.inputs),
        "length_action": answer.length_action,
    }


def logprob_object(token: TokenLogprob) -> dict[str, Any]:
    """Return one token of a choice's `logprobs.content`."""
    top = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for text, logprob in token.top]
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.token.encode()),
        "top_logprobs": top,
    }


def message_object(answer: Answer) -> dict[str, Any]:
    """Return a final answer as a message. Its keys for thinking and tool calls are there only where it has them."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.tool_calls
    ]
    message = {"role": "assistant", "content": None if calls and not answer.text else answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return message | ({"tool_calls": calls} if calls else {})


def delta_object(delta: AnswerDelta) -> dict[str, Any]:
    """Return a piece of a final answer as the `delta` of a chunk."""
    found: dict[str, Any] = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.text or not (delta.reasoning or delta.tool_calls):
        found["content"] = delta.text
    if delta.tool_calls:
        found["tool_calls"] = [call_object(piece) for piece in delta.tool_calls]
    return found


def call_object(piece: CallPiece) -> dict[str, Any]:
    """Return a piece of a tool call. Its id, type and name come once, with the first piece."""
    function: dict[str, Any] = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, **function}}


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

    def objects(self) -> list[list[dict[str, Any]]]:
        return [
            [draft_object(answer) for answer in sorted(self.layers.get(layer, []), key=lambda a: a.index)]
            for layer in range(max(self.layers, default=-1) + 1)  # a layer that agreement skipped is empty
        ]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to one request. `kind` says which endpoint it belongs to: chat or text completions."""

    kind: Literal["chat", "text"]
    calls: tuple[ChatCall, ...]
    """One for each prompt, which differ in nothing else; only text completions have several."""
    id: str
    created: int
    request_id: str
    counted: Counted = "all_calls"
    """What the standard fields of the usage count (`serving.usage`)."""
    answer_is_shown: bool = True
    """Whether the text that follows an echoed prompt is shown: not where no token was asked for."""

    END = SSE_DONE
    """What ends a stream."""

    @property
    def call(self) -> ChatCall:
        """The first call."""
        return self.calls[0]

    def usage(self, finished: Finished) -> dict[str, Any]:
        return usage_object(finished.usage, self.counted, len(self.calls))

    def whole(self, finished: Finished, drafts: Drafts) -> dict[str, Any]:
        """Return the plain reply: a `chat.completion` or `text_completion`."""
        body = self._envelope("chat.completion" if self.kind == "chat" else "text_completion")
        body["choices"] = [self._whole_choice(answer) for answer in finished.layers[-1]]
        return body | {"usage": self.usage(finished)} | self._aft(drafts)

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        tokens = answer.logprobs
        text = answer.text
        if self.call.final.echo is not None:
            shown = answer if self.answer_is_shown else dataclasses.replace(answer, text="", logprobs=())
            call = self.calls[answer.index // self.call.final.num_choices]
            text, tokens = call.messages[0]["content"] + shown.text, (*answer.prompt_logprobs, *shown.logprobs)
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            content = {"message": message_object(answer)}
        return self._choice(content, answer.index, finish_reason(answer), tokens)

    def encoded(self, payload: dict[str, Any]) -> str:
        """Return one chunk as it is sent."""
        return sse_data(payload)

    def failed(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a run that failed after its stream had begun, from the `error` of its error object."""
        return [{"error": error}]

    def opening(self) -> list[dict[str, Any]]:
        """Return the first chunk, which holds the role."""
        content = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        num_choices = len(self.calls) * self.call.final.num_choices
        return [self._chunk([self._choice(content, index) for index in range(num_choices)])]

    def piece(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        """Return a chunk with the next piece of an answer."""
        content = {"delta": delta_object(delta)} if self.kind == "chat" else {"text": delta.text}
        return [self._chunk([self._choice(content, delta.index, None, delta.logprobs)])]

    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        """Return a finished draft or layer as an `aft.progress` event: a chunk without choices, which clients skip."""
        layer = event.answer.layer if isinstance(event, ProposalDone) else event.usage.layer
        answers = drafts.layers.get(layer, [])
        progress: dict[str, Any] = {
            "layer": layer,
            "num_layers": self.call.plan.num_layers,
            "num_done": len(answers),
            "num_failed": sum(answer.error is not None for answer in answers),
            "num_proposals": len(self.calls) * self.call.plan.num_proposals,
        }
        if isinstance(event, LayerDone):
            progress["layer_usage"] = dataclasses.asdict(event.usage)
        elif self.call.include_proposals:
            progress["draft"] = draft_object(event.answer)
        return "event: aft.progress\n" + sse_data(self._chunk([]) | {"aft": {"progress": progress}})

    def closing(self, finished: Finished, drafts: Drafts) -> list[dict[str, Any]]:
        """Return the last chunks: the finish reasons (and the drafts, if asked for), then usage if asked for."""
        end: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        ends = [self._choice(end, answer.index, finish_reason(answer)) for answer in finished.layers[-1]]
        chunks = [self._chunk(ends) | self._aft(drafts)]
        if self.call.include_usage:
            chunks.append(self._chunk([]) | {"usage": self.usage(finished)})
        return chunks

    def _aft(self, drafts: Drafts) -> dict[str, Any]:
        if not self.call.include_proposals:
            return {}
        return {"aft": {"plan": dataclasses.asdict(self.call.plan), "layers": drafts.objects()}}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._envelope("chat.completion.chunk" if self.kind == "chat" else "text_completion")
        body["choices"] = choices
        return body | ({"usage": None} if self.call.include_usage else {})

    def _choice(
        self,
        content: dict[str, Any],
        index: int,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> dict[str, Any]:
        tokens: dict[str, Any] | None = None
        if logprobs and self.kind == "chat":
            tokens = {"content": [logprob_object(token) for token in logprobs], "refusal": None}
        elif logprobs:
            tokens = text_logprobs(logprobs)
        return {"index": index, **content, "logprobs": tokens, "finish_reason": finish_reason}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}
