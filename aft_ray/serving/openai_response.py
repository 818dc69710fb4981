"""What a run tells, as OpenAI objects: whole for a plain reply, in chunks for a stream. Pure.

    {"id": "chatcmpl-...", "object": "chat.completion", "choices": [{"message": {...}, "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 412, "completion_tokens": 301, ..., "aft": {"layers": [{"layer": 0, ...}, ...]}},
     "aft": {"plan": {...}, "layers": [[{"index": 0, "text": "...", ...}, ...], ...]}}          (include_proposals)

`usage` sums every sub-call. In a stream the role comes first, then content as it is made, then `finish_reason` (with
the drafts where asked for), then usage where asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aft_ray.inference.events import Answer, Event, Finished, LayerUsage, ProposalDone
from aft_ray.serving.openai_request import Call

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


def data_line(payload: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage_object(layers: Sequence[LayerUsage]) -> dict[str, Any]:
    """Tokens of all sub-calls, and by layer under `aft`."""
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
    """One answer of one layer, as `include_proposals` returns it."""
    return {
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
        "error": answer.error,
        "inputs": list(answer.inputs),
        "length_action": answer.length_action,
    }


@dataclass(kw_only=True)
class Drafts:
    """Every answer of a run by layer, failed ones included (`Finished` holds the usable ones only)."""

    layers: dict[int, list[Answer]] = field(default_factory=dict)

    def watch(self, event: Event) -> None:
        if isinstance(event, ProposalDone):
            self.layers.setdefault(event.answer.layer, []).append(event.answer)
        elif isinstance(event, Finished):
            self.layers[event.answer.layer] = [event.answer]

    def objects(self) -> list[list[dict[str, Any]]]:
        return [
            [draft_object(answer) for answer in sorted(self.layers.get(layer, []), key=lambda a: a.index)]
            for layer in range(max(self.layers, default=-1) + 1)  # one that agreement skipped is empty
        ]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to one call. `kind` is the endpoint: chat or text completion."""

    kind: Literal["chat", "text"]
    call: Call
    id: str
    created: int

    def whole(self, finished: Finished, drafts: Drafts) -> dict[str, Any]:
        """`chat.completion` or `text_completion`."""
        answer = finished.answer
        content: dict[str, Any] = {"text": answer.text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        body = self._envelope("chat.completion" if self.kind == "chat" else "text_completion")
        body["choices"] = [self._choice(content, answer.finish_reason)]
        return body | {"usage": usage_object(finished.usage)} | self._aft(drafts)

    def opening(self) -> dict[str, Any]:
        """The first chunk: who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""})

    def piece(self, text: str) -> dict[str, Any]:
        """Some more of the answer."""
        return self._chunk({"delta": {"content": text}} if self.kind == "chat" else {"text": text})

    def closing(self, finished: Finished, drafts: Drafts) -> list[dict[str, Any]]:
        """The last chunks: why it ended (and the drafts), then usage when asked for."""
        end: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        chunks = [self._chunk(end, finished.answer.finish_reason) | self._aft(drafts)]
        if self.call.include_usage:
            chunks.append(self._chunk(None) | {"usage": usage_object(finished.usage)})
        return chunks

    def _aft(self, drafts: Drafts) -> dict[str, Any]:
        if not self.call.include_proposals:
            return {}
        return {"aft": {"plan": dataclasses.asdict(self.call.plan), "layers": drafts.objects()}}

    def _chunk(self, content: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
        body = self._envelope("chat.completion.chunk" if self.kind == "chat" else "text_completion")
        body["choices"] = [] if content is None else [self._choice(content, finish_reason)]
        return body | ({"usage": None} if self.call.include_usage else {})

    def _choice(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}
