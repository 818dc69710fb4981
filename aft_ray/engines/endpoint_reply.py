"""Reads the reply of an OpenAI-compatible endpoint: a stream of events or one JSON object, as servers really send it.

    reply = Reply()
    for line in lines:                 # of the body, decoded
        new_text = reply.feed(line)
    reply.end()
    reply.text, reply.reasoning, reply.tool_calls, reply.finish_reason, reply.usage

What is asked for and what comes may differ: a server that was asked for a stream may send one object, a choice may have
no delta, content may be a list of parts, usage may be null. Whatever holds an answer is read. `reply.failure` says why
a reply is none. A reply that is complete stays one, whatever goes wrong behind its end.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aft_ray.engines.base import CallPiece, whole_calls

FINISH_REASONS = {
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "completed", "complete"), "stop"),
    **dict.fromkeys(("max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit"), "length"),
    **dict.fromkeys(("safety", "content_filtered", "blocklist", "prohibited_content", "recitation"), "content_filter"),
}
"""Other servers' words for `stop`, `length` and `content_filter`, in lower case. Any other reason stays as it is."""
LOST = frozenset({"error", "abort"})
"""Finish reasons of an answer that the server itself gave up."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""Where servers put the reasoning of a message. The first one that is filled counts, since some fill two of them."""
TEXT_FIELDS = ("text", "content", "thinking", "reasoning", "summary", "value")
"""Where a part of a message keeps its text."""
REASON_FIELDS = ("message", "detail", "error", "msg", "reason", "errors", "title")
"""Where servers put the reason of a refused call."""
REFUSAL = "refusal"
"""Finish reason of an answer that came in the field `refusal`: the model declined."""
TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses below 500 that are worth another try."""
TRANSIENT_WORDS = (
    *("rate_limit", "rate limit", "overload", "busy", "unavailable", "temporar", "try again"),
    *("server_error", "internal", "upstream", "connection", "interrupted", "timeout", "timed out"),
)
"""What an error says of itself that may pass, where it comes without a status."""
QUOTA = "insufficient_quota"
"""Code of a 429 that no waiting cures."""
MAX_QUOTED = 500
"""Characters of a server's own words that an error repeats."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The token counts that an endpoint reported; None where it gave no number."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    """Number of the completion tokens that are reasoning."""
    cached_tokens: int | None = None
    """Number of the prompt tokens that were not computed again."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a call brought no answer."""

    reason: str
    is_transient: bool
    """Whether the same call may succeed later."""


class Reply:
    """What has come of one answer."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage = Usage()
        self.failure: Failure | None = None
        self.num_pieces = 0
        self.is_whole = False
        """Whether the server said that this was all: by `[DONE]`, or by sending a message in place of its pieces."""
        self._answer: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._other: list[str] = []
        """Lines that are no objects: parts of one, or something else altogether."""
        self._calls: list[CallPiece] = []
        self._num_chunks = 0
        self._num_thoughts_taken = self._num_calls_taken = 0

    @property
    def text(self) -> str:
        return joined(self._answer) or joined(self._refusal)

    @property
    def reasoning(self) -> str:
        return joined(self._reasoning)

    def take_reasoning(self) -> str:
        """Return the reasoning that has come since the last call."""
        new = self._reasoning[self._num_thoughts_taken :]
        self._num_thoughts_taken = len(self._reasoning)
        return "".join(new)

    @property
    def tool_calls(self) -> tuple[CallPiece, ...]:
        """The tool calls so far, each as one piece."""
        return whole_calls(self._calls)

    def take_calls(self) -> tuple[CallPiece, ...]:
        """Return the pieces of tool calls that have come since the last call."""
        new = self._calls[self._num_calls_taken :]
        self._num_calls_taken = len(self._calls)
        return tuple(new)

    @property
    def is_complete(self) -> bool:
        """Whether the answer has come to its end."""
        return self.finish_reason is not None or (self.is_whole and self._has_content)

    @property
    def _has_content(self) -> bool:
        return bool(self._answer or self._reasoning or self._refusal or self._calls)

    def feed(self, line: str) -> str:
        """Read one line of the body, and return the piece of the answer in it."""
        line = line.removeprefix("\ufeff").rstrip("\r")
        if line.startswith("data:"):
            return self._event(line.removeprefix("data:").strip())
        if not line.strip() or line.startswith((":", "event:", "id:", "retry:")):
            return ""
        try:
            chunk = json.loads(line)
        except ValueError:
            self._other.append(line)
            return ""
        return self._chunk(chunk)

    def end(self, content_type: str = "") -> str:
        """Read what was no event, judge the whole, and return the piece of the answer that was left."""
        piece = ""
        if self._other and not self._num_chunks:
            piece = self._read_other(content_type)
        if self._refusal and not self._answer:
            self.finish_reason = REFUSAL
        if self.finish_reason in LOST:
            self._fail(f"the endpoint gave up the answer (finish reason {self.finish_reason})", is_transient=True)
        elif self.is_complete:
            self.failure = None
        elif self.is_whole:
            self._fail("the reply holds no answer", is_transient=True)
        else:
            self._fail(f"the answer broke off after {self.num_pieces} pieces", is_transient=True)
        return piece

    def _fail(self, reason: str, *, is_transient: bool) -> None:
        """Keep the first failure: the server's own words come before what follows from them."""
        self.failure = self.failure or Failure(reason=reason, is_transient=is_transient)

    def _event(self, data: str) -> str:
        if data == "[DONE]":
            self.is_whole = True
            return ""
        try:
            chunk = json.loads(data)
        except ValueError:
            self._fail(f"an event that is no JSON: {quoted(data)}", is_transient=True)
            return ""
        return self._chunk(chunk)

    def _read_other(self, content_type: str) -> str:
        """Read a body of several lines that is one object, or no answer at all."""
        body = "\n".join(self._other)
        try:
            chunk = json.loads(body)
        except ValueError:
            self._fail(f"the reply is no answer but {content_type or 'text'}: {quoted(body)}", is_transient=False)
            return ""
        return self._chunk(chunk)

    def _chunk(self, chunk: Any) -> str:
        """Read one event or object, and return the piece of the answer in it."""
        self._num_chunks += 1
        if isinstance(chunk, list):  # Google wraps errors in a list
            return "".join(self._chunk(one) for one in chunk)
        if not isinstance(chunk, Mapping):
            self._fail(f"the reply is no answer: {quoted(json.dumps(chunk))}", is_transient=False)
            return ""
        if chunk.get("error") or ("choices" not in chunk and any(chunk.get(name) for name in REASON_FIELDS)):
            self._fail(reason_in(chunk), is_transient=_is_transient(chunk.get("error") or chunk))
        self._count(chunk.get("usage"))
        if isinstance(timings := chunk.get("timings"), Mapping):  # llama.cpp
            self._count({"prompt_tokens": timings.get("prompt_n"), "completion_tokens": timings.get("predicted_n")})
        choices = _objects(chunk.get("choices"))
        return "".join(self._choice(choice) for choice in choices if not choice.get("index"))

    def _choice(self, choice: Mapping[str, Any]) -> str:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = FINISH_REASONS.get(reason.lower(), reason.lower())
        self.is_whole = self.is_whole or "message" in choice  # not a delta, so there is no more of it
        message = choice.get("delta") or choice.get("message") or {}
        if not isinstance(message, Mapping):
            return ""
        content = message.get("content", choice.get("text"))
        piece = "".join(_parts(content, "answer"))
        field = next((message[name] for name in REASONING_FIELDS if message.get(name)), None)
        thought = "".join(_texts(field)) + "".join(_parts(content, "reasoning"))
        declined = "".join(_texts(message.get(REFUSAL))) + "".join(_parts(content, REFUSAL))
        for found, place in ((piece, self._answer), (thought, self._reasoning), (declined, self._refusal)):
            if found:
                place.append(found)
                self.num_pieces += 1
        for position, call in enumerate(_objects(message.get("tool_calls"))):
            self._call(position, call)
        if isinstance(content, str) and not (self._answer or piece):
            self._answer.append("")  # an empty answer is one, too
        return piece

    def _call(self, position: int, call: Mapping[str, Any]) -> None:
        """Read a piece of a tool call, or a whole one. A server may leave out its number and its id."""
        function = call.get("function")
        if not isinstance(function, Mapping):
            return
        number = call.get("index")
        index = number if isinstance(number, int) else position
        name = None if any(begun.index == index for begun in self._calls) else str(function.get("name") or "")
        arguments = function.get("arguments") or ""
        piece = CallPiece(
            index=index,
            id=None if name is None else str(call.get("id") or f"call_{uuid.uuid4().hex[:24]}"),
            name=name,
            arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        )
        self._calls.append(piece)
        self.num_pieces += 1

    def _count(self, usage: Any) -> None:
        """Take the counts of a usage object; those of a later one replace those of an earlier one."""
        if not isinstance(usage, Mapping):
            return
        prompt = _number(usage, "prompt_tokens", "input_tokens")
        completion = _number(usage, "completion_tokens", "output_tokens")
        total = _number(usage, "total_tokens")
        if completion is None and prompt is not None and total is not None:
            completion = total - prompt
        written = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
        read = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        before = self.usage
        self.usage = Usage(
            prompt_tokens=before.prompt_tokens if prompt is None else prompt,
            completion_tokens=before.completion_tokens if completion is None else completion,
            reasoning_tokens=_number(written, "reasoning_tokens") or before.reasoning_tokens,
            cached_tokens=_number(read, "cached_tokens") or before.cached_tokens,
        )


def _objects(found: Any) -> list[Mapping[str, Any]]:
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _number(found: Any, *names: str) -> int | None:
    if not isinstance(found, Mapping):
        return None
    values = (found.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value >= 0), None)


def _parts(content: Any, kind: str) -> Iterator[str]:
    """Yield the texts of one kind in the content of a message: its answer, its reasoning or its refusal."""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if kind == kind_of(part):
            yield from _texts(part[REFUSAL] if kind == REFUSAL else part)


def kind_of(part: Any) -> str:
    """Return whether a part of a message's content is answer, reasoning or refusal."""
    if not isinstance(part, Mapping):
        return "answer"
    kind = str(part.get("type"))
    if REFUSAL in part:
        return REFUSAL
    return "reasoning" if any(word in kind for word in ("think", "reason", "summary")) else "answer"


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of any shape: a string, a list of parts, a part."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        yield from _texts(next((value[name] for name in TEXT_FIELDS if value.get(name)), None))


def joined(pieces: list[str]) -> str:
    """Join the pieces of a text: surrogates that came in two pieces become one character, a lone one U+FFFD."""
    return "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def quoted(text: str) -> str:
    """Return the beginning of a server's own words on one line."""
    return " ".join(text.split())[:MAX_QUOTED]


def reason_in(body: Any) -> str:
    """Return the reason that the body of a refusal gives, wherever it stands in it.

    >>> reason_in({"error": {"message": "no such model"}})
    'no such model'
    >>> reason_in({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]})
    'body.seed: Extra inputs are not permitted'
    """
    if isinstance(body, list):
        return "; ".join(filter(None, map(reason_in, body)))
    if not isinstance(body, Mapping):
        return quoted(str(body)) if body else ""
    found = next((reason for name in REASON_FIELDS if (reason := reason_in(body.get(name)))), "")
    place = body.get("loc")
    if found and isinstance(place, list):
        return f"{'.'.join(map(str, place))}: {found}"
    return found or quoted(json.dumps(body, ensure_ascii=False))


def reason_of(text: str) -> str:
    """Return the reason that the text of a refusal gives: in JSON by `reason_in`, else its own beginning."""
    try:
        return reason_in(json.loads(text)) or "(empty reply)"
    except ValueError:
        return quoted(text) or "(empty reply)"


def refused(status: int, text: str) -> Failure:
    """Return the failure of a call that was refused with a status."""
    is_transient = (status in TRANSIENT or status >= 500) and QUOTA not in text
    return Failure(reason=f"status {status}: {reason_of(text)}", is_transient=is_transient)


def _is_transient(error: Any) -> bool:
    """Return whether an error object in a reply with status 200 describes something that passes."""
    if not isinstance(error, Mapping):
        error = {"message": error}
    code = str(error.get("code") or error.get("status") or "")
    if code.isdigit():
        return refused(int(code), json.dumps(error, default=str)).is_transient
    words = " ".join(str(error.get(name)) for name in ("code", "type", "message")).lower()
    return QUOTA not in words and any(word in words for word in TRANSIENT_WORDS)
