"""The events of a run as OpenAI objects: one for a plain reply, chunks for a stream. Pure.

    {"id": "chatcmpl-...", "object": "chat.completion", "choices": [{"message": {...}, "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 412, "completion_tokens": 301, ..., "aft": {"layers": [{"layer": 0, ...}, ...]}},
     "aft": {"plan": {...}, "layers": [[{"index": 0, "text": "...", ...}, ...], ...]}}          (include_proposals)

`usage` sums over all engine calls. A stream sends the role first, then `aft.progress` events if the request asks for
them, then content as it is written, then `finish_reason` (with the drafts, if asked for), then usage if asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aft_ray.engines.base import TokenLogprob
from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.serving.openai_request import ChatCall

SSE_KEEP_ALIVE = ": keep-alive\n\n"
SSE_DONE = "data: [DONE]\n\n"


def sse_data(payload: dict[str, Any]) -> str:
    """Return the payload as one server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage_object(layers: Sequence[LayerUsage]) -> dict[str, Any]:
    """Return the tokens of all engine calls; `aft` has them by layer."""
    prompt = sum(layer.prompt_tokens for layer in layers)
    completion = sum(layer.completion_tokens for layer in layers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(layer.cached_tokens for layer in layers)},
        "aft": {"layers": [dataclasses.asdict(layer) for layer in layers]},
    }


def draft_object(answer: Answer) -> dict[str, Any]:
    """Return one answer of one layer, as `include_proposals` shows it."""
    return {
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
        "error": answer.error,
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
    """The reply to one call. `kind` says which endpoint it belongs to: chat or text completions."""

    kind: Literal["chat", "text"]
    call: ChatCall
    id: str
    created: int
    request_id: str

    @property
    def run_id(self) -> str:
        """Name of the run in the engines. The request id alone will not do: a client may send one twice."""
        return f"{self.request_id}/{self.id}"

    def whole(self, finished: Finished, drafts: Drafts) -> dict[str, Any]:
        """Return the plain reply: a `chat.completion` or `text_completion`."""
        body = self._envelope("chat.completion" if self.kind == "chat" else "text_completion")
        body["choices"] = [self._whole_choice(answer) for answer in finished.layers[-1]]
        return body | {"usage": usage_object(finished.usage)} | self._aft(drafts)

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        content: dict[str, Any] = {"text": answer.text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return self._choice(content, answer.index, answer.finish_reason, answer.logprobs)

    def opening(self) -> dict[str, Any]:
        """Return the first chunk, which holds the role."""
        content = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        return self._chunk([self._choice(content, index) for index in range(self.call.final.num_choices)])

    def piece(self, delta: AnswerDelta) -> dict[str, Any]:
        """Return a chunk with the next piece of an answer."""
        content = {"delta": {"content": delta.text}} if self.kind == "chat" else {"text": delta.text}
        return self._chunk([self._choice(content, delta.index, None, delta.logprobs)])

    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        """Return a finished draft or layer as an `aft.progress` event: a chunk without choices, which clients skip."""
        layer = event.answer.layer if isinstance(event, ProposalDone) else event.usage.layer
        answers = drafts.layers.get(layer, [])
        progress: dict[str, Any] = {
            "layer": layer,
            "num_layers": self.call.plan.num_layers,
            "num_done": len(answers),
            "num_failed": sum(answer.error is not None for answer in answers),
            "num_proposals": self.call.plan.num_proposals,
        }
        if isinstance(event, LayerDone):
            progress["layer_usage"] = dataclasses.asdict(event.usage)
        elif self.call.include_proposals:
            progress["draft"] = draft_object(event.answer)
        return "event: aft.progress\n" + sse_data(self._chunk([]) | {"aft": {"progress": progress}})

    def closing(self, finished: Finished, drafts: Drafts) -> list[dict[str, Any]]:
        """Return the last chunks: the finish reasons (and the drafts, if asked for), then usage if asked for."""
        end: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        ends = [self._choice(end, answer.index, answer.finish_reason) for answer in finished.layers[-1]]
        chunks = [self._chunk(ends) | self._aft(drafts)]
        if self.call.include_usage:
            chunks.append(self._chunk([]) | {"usage": usage_object(finished.usage)})
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
        tokens = {"content": [logprob_object(token) for token in logprobs], "refusal": None} if logprobs else None
        return {"index": index, **content, "logprobs": tokens, "finish_reason": finish_reason}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}
