"""What a run tells, as OpenAI objects: whole for a plain reply, in chunks for a stream. Pure.

    {"id": "chatcmpl-...", "object": "chat.completion", "choices": [{"message": {...}, "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 412, "completion_tokens": 301, ..., "aft": {"layers": [{"layer": 0, ...}, ...]}},
     "aft": {"plan": {...}, "layers": [[{"index": 0, "text": "...", ...}, ...], ...]}}          (include_proposals)

`usage` sums every sub-call. In a stream the role comes first, then `aft.progress` events where asked for, then content
as it is made, then `finish_reason` (with the drafts where asked for), then usage where asked for.
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


def logprob_object(token: TokenLogprob) -> dict[str, Any]:
    """One token of a choice's `logprobs.content`."""
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
            for layer in range(max(self.layers, default=-1) + 1)  # one that agreement skipped is empty
        ]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to one call. `kind` is the endpoint: chat or text completion."""

    kind: Literal["chat", "text"]
    call: ChatCall
    id: str
    created: int
    request_id: str

    @property
    def run_id(self) -> str:
        """Names the run in the engines: two requests may carry one request id."""
        return f"{self.request_id}/{self.id}"

    def whole(self, finished: Finished, drafts: Drafts) -> dict[str, Any]:
        """`chat.completion` or `text_completion`."""
        body = self._envelope("chat.completion" if self.kind == "chat" else "text_completion")
        body["choices"] = [self._whole_choice(answer) for answer in finished.layers[-1]]
        return body | {"usage": usage_object(finished.usage)} | self._aft(drafts)

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        content: dict[str, Any] = {"text": answer.text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return self._choice(content, answer.index, answer.finish_reason, answer.logprobs)

    def opening(self) -> dict[str, Any]:
        """The first chunk: who speaks."""
        content = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        return self._chunk([self._choice(content, index) for index in range(self.call.final.num_choices)])

    def piece(self, delta: AnswerDelta) -> dict[str, Any]:
        """Some more of an answer."""
        content = {"delta": {"content": delta.text}} if self.kind == "chat" else {"text": delta.text}
        return self._chunk([self._choice(content, delta.index, None, delta.logprobs)])

    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        """A draft or a layer is done, as an event of its own: a chunk without choices, which clients know to expect."""
        layer = event.answer.layer if isinstance(event, ProposalDone) else event.usage.layer
        answers = drafts.layers.get(layer, [])
        told: dict[str, Any] = {
            "layer": layer,
            "num_layers": self.call.plan.num_layers,
            "num_done": len(answers),
            "num_failed": sum(answer.error is not None for answer in answers),
            "num_proposals": self.call.plan.num_proposals,
        }
        if isinstance(event, LayerDone):
            told["layer_usage"] = dataclasses.asdict(event.usage)
        elif self.call.include_proposals:
            told["draft"] = draft_object(event.answer)
        return "event: aft.progress\n" + sse_data(self._chunk([]) | {"aft": {"progress": told}})

    def closing(self, finished: Finished, drafts: Drafts) -> list[dict[str, Any]]:
        """The last chunks: why it ended (and the drafts), then usage when asked for."""
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
        told = {"content": [logprob_object(token) for token in logprobs], "refusal": None} if logprobs else None
        return {"index": index, **content, "logprobs": told, "finish_reason": finish_reason}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}
