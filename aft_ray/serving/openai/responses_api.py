"""`POST /v1/responses`: the newer of OpenAI's two interfaces, over the same runs. Nothing is kept between two requests.

    {"model": "aft", "instructions": "Be brief.", "input": "Name three rivers."}
        -> {"object": "response", "output": [{"type": "message", "content": [{"type": "output_text", ...}]}], ...}

A request becomes a body of `/v1/chat/completions`, so that whatever holds there holds here. A stream sends the events
that the stock clients put together: an item is added, its text arrives in deltas, it is done, the response is
completed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from aft_ray.inference.events import Answer, AnswerDelta, Finished, LayerDone, ProposalDone
from aft_ray.serving.errors import HttpError
from aft_ray.serving.openai.body import ChatBody, unknown_parameter
from aft_ray.serving.openai.response import Drafts, Reply, sse_data
from aft_ray.serving.openai.schema import (
    CutShort,
    Error,
    FunctionCallItem,
    Item,
    ItemStatus,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseReasoning,
    ResponseUsage,
)

SAME = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p", "seed", "aft", "metadata",
        "user", "service_tier", "safety_identifier", "prompt_cache_key")  # fmt: skip
"""Parameters that mean the same in both interfaces."""
TRANSLATED = ("input", "instructions", "max_output_tokens", "tools", "tool_choice", "reasoning", "text")
WITHOUT_STATE: dict[str, tuple[Any, ...]] = {
    "store": (True,),
    "include": (["reasoning.encrypted_content"],),
    "truncation": ("disabled",),
    "background": (),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (),
    "stream_options": ({"include_obfuscation": False}, {"include_obfuscation": True}),
}
"""Parameters of what this server does not do, each with its values that ask for nothing."""


def chat_body_of(body: Any) -> ChatBody:
    """Return the body of a chat completion that asks for the same. Raises what a wrong chat body raises."""
    if not isinstance(body, Mapping):
        raise HttpError(400, "the body is not a JSON object", code="invalid_json")
    unknown = []
    for name in body:
        if name in SAME or name in TRANSLATED:
            continue
        if name not in WITHOUT_STATE:
            unknown.append(unknown_parameter(name, {*SAME, *TRANSLATED}))
        elif body[name] and body[name] not in WITHOUT_STATE[name]:
            message = f"parameter '{name}' is not supported by this server; leave it out"
            raise HttpError(400, message, param=name, code="unsupported_parameter")
    chat = {name: body[name] for name in SAME if name in body}
    chat["messages"] = [*_instructions(body), *messages_of(body.get("input"))]
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    chat["tools"] = [_tool(tool) for tool in _listed(body, "tools")]
    chat["tool_choice"] = _tool_choice(body.get("tool_choice"))
    chat["reasoning_effort"] = _part(body, "reasoning").get("effort")
    chat["response_format"] = _response_format(_part(body, "text").get("format"))
    try:
        chat = {name: value for name, value in chat.items() if value not in (None, [])}
        return ChatBody.model_validate(chat).with_refusals(unknown)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name) or {}
    if not isinstance(found, Mapping):
        raise HttpError(400, f"{name}: expected an object", param=name, code="invalid_value")
    return found


def _listed(body: Mapping[str, Any], name: str) -> list[Any]:
    found = body.get(name) or []
    if not isinstance(found, list):
        raise HttpError(400, f"{name}: expected a list", param=name, code="invalid_value")
    return found


def _instructions(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = body.get("instructions")
    return [{"role": "system", "content": found}] if found else []


def messages_of(items: Any) -> list[dict[str, Any]]:
    """Return the input items as the messages of a chat: calls and thinking join the assistant's message after them."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise HttpError(400, "input: expected text, or a list of items", param="input", code="invalid_value")
    messages: list[dict[str, Any]] = []
    thinking = ""
    for number, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        match kind:
            case "message":
                message = {"role": item.get("role"), "content": _content(item.get("content"), number)}
                if message["role"] == "assistant" and thinking:
                    message["reasoning_content"], thinking = thinking, ""
                messages.append(message)
            case "reasoning":
                parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
                thinking += "\n\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                if thinking:
                    messages[-1]["reasoning_content"], thinking = thinking, ""
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = _content(item.get("output"), number)
                messages.append({"role": "tool", "content": output, "tool_call_id": item.get("call_id")})
            case _:
                refusal = f"input.{number}: items of type '{str(kind)[:40]}' are not supported by this server"
                raise HttpError(400, refusal, param=f"input.{number}", code="unsupported_part")
    return messages


def _content(content: Any, number: int) -> Any:
    """Return the content of an item as that of a chat message, which takes text only and says so."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "text", "text": part.get("refusal")})
        else:
            message = f"input.{number}: a part of type '{str(kind)[:40]}'; this server reads text only"
            raise HttpError(400, message, param=f"input.{number}", code="unsupported_part")
    return parts


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else None
        message = f"tools: '{str(kind)[:40]}' is not a tool of this server; all are functions"
        raise HttpError(400, message, param="tools", code="unsupported_parameter")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and "name" in choice:
        return {"type": choice.get("type"), "function": {"name": choice["name"]}}
    return choice


def _response_format(asked: Any) -> Any:
    if isinstance(asked, dict) and asked.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in asked.items() if name != "type"}}
    return asked


Kind = Literal["reasoning", "message", "function_call"]
PREFIX: Mapping[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
"""How the ids of items begin."""
TEXT_OF: Mapping[Kind, str] = {
    "reasoning": "reasoning_text",
    "message": "output_text",
    "function_call": "function_call_arguments",
}
"""What the events call the text of an item."""


@dataclass(kw_only=True)
class _Item:
    """An output item that is being streamed."""

    place: int
    kind: Kind
    id: str
    text: str = ""
    """Its text so far; of a function call, its arguments."""
    name: str = ""
    call_id: str = ""

    def object(self, status: ItemStatus) -> Item:
        """Return the item as the output of a response has it."""
        if self.kind == "reasoning":
            thought = ReasoningText(type="reasoning_text", text=self.text)
            return ReasoningItem(type="reasoning", id=self.id, summary=[], content=[thought], status=status)
        if self.kind == "function_call":
            return FunctionCallItem(
                type="function_call",
                id=self.id,
                call_id=self.call_id,
                name=self.name,
                arguments=self.text,
                status=status,
            )
        content = [self.part()] if self.text or status == "completed" else []
        return MessageItem(type="message", id=self.id, role="assistant", content=content, status=status)

    def part(self) -> OutputText:
        return OutputText(type="output_text", text=self.text, annotations=[], logprobs=[])

    def event(self, type: str, **more: Any) -> ResponseEvent:
        """Return an event about the text of the item."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.place}
        if self.kind != "function_call":
            place["content_index"] = 0
        if self.kind == "message":
            place["logprobs"] = []
        return ResponseEvent(type=type, **place, **more)


@dataclass(frozen=True, kw_only=True)
class ResponsesReply(Reply):
    """The reply of `/v1/responses`. It holds the state of its stream."""

    asked: Mapping[str, Any]
    """The request, parts of which a response repeats."""
    _items: list[_Item] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    END = ""
    """The last event of a stream is `response.completed`."""

    def whole(self, finished: Finished, drafts: Drafts) -> ResponseObject:
        status = _status_of(finished)
        return self._ended(finished, drafts, [item.object(status) for item in self._items_of(finished.answer)])

    def opening(self) -> str:
        kinds = ("response.created", "response.in_progress")
        return self._sent([ResponseEvent(type=kind, response=self._response("in_progress")) for kind in kinds])

    def piece(self, delta: AnswerDelta) -> str:
        events: list[ResponseEvent] = []
        if delta.reasoning:
            events += self._grown("reasoning", delta.reasoning)
        if delta.text:
            events += self._grown("message", delta.text)
        for call in delta.tool_calls:
            if call.name is not None:
                events += self._opened("function_call", name=call.name, call_id=call.id or "")
            if call.arguments:
                events += self._grown("function_call", call.arguments)
        return self._sent(events)

    def progress(self, event: ProposalDone | LayerDone, drafts: Drafts) -> str:
        return ""  # clients of this interface refuse events that they do not know

    def closing(self, finished: Finished, drafts: Drafts) -> str:
        events: list[ResponseEvent] = []
        if not self._items:  # an empty answer, or one that was decided without a model and not sent in pieces
            for item in self._items_of(finished.answer):
                events += self._opened(item.kind, name=item.name, call_id=item.call_id)
                events += self._grown(item.kind, item.text) if item.text else []
        events += self._closed()
        status = _status_of(finished)
        whole = self._ended(finished, drafts, [item.object(status) for item in self._items])
        return self._sent([*events, ResponseEvent(type=f"response.{status}", response=whole)])

    def failed(self, error: Error) -> str:
        said = ResponseError(code=error.code, message=error.message)
        response = self._response("failed", error=said)
        return self._sent(
            [
                ResponseEvent(type="error", code=error.code, message=error.message, param=error.param),
                ResponseEvent(type="response.failed", response=response),
            ]
        )

    def _sent(self, events: Iterable[ResponseEvent]) -> str:
        """Return the events as they are sent: named and numbered."""
        numbered = (event.model_copy(update={"sequence_number": next(self._numbers)}) for event in events)
        return "".join(f"event: {event.type}\n{sse_data(event)}" for event in numbered)

    def _items_of(self, answer: Answer) -> Iterator[_Item]:
        """Yield the items of an answer that was not streamed."""
        place = 0
        if answer.reasoning:
            yield self._item(place, "reasoning", text=answer.reasoning)
            place += 1
        if answer.text or not answer.tool_calls:
            yield self._item(place, "message", text=answer.text)
            place += 1
        for number, call in enumerate(answer.tool_calls):
            said = {"text": call.arguments, "name": call.name or "", "call_id": call.id or ""}
            yield self._item(place + number, "function_call", **said)

    def _item(self, place: int, kind: Kind, **changes: str) -> _Item:
        return _Item(place=place, kind=kind, id=f"{PREFIX[kind]}_{self.id.removeprefix('resp_')}_{place}", **changes)

    def _opened(self, kind: Kind, **changes: str) -> list[ResponseEvent]:
        """Return the events that end the item under way and begin a new one."""
        ends = self._closed()
        item = self._item(len(self._items), kind, **changes)
        self._items.append(item)
        begun = item.object("in_progress")
        added = ResponseEvent(type="response.output_item.added", output_index=item.place, item=begun)
        part = [item.event("response.content_part.added", part=item.part())] if kind == "message" else []
        return [*ends, added, *part]

    def _grown(self, kind: Kind, text: str) -> list[ResponseEvent]:
        opened = self._opened(kind) if not self._items or self._items[-1].kind != kind else []
        item = self._items[-1]
        item.text += text
        return [*opened, item.event(f"response.{TEXT_OF[kind]}.delta", delta=text)]

    def _closed(self) -> list[ResponseEvent]:
        """Return the events that end the item under way."""
        if not self._items:
            return []
        item = self._items[-1]
        text = {"arguments": item.text, "name": item.name} if item.kind == "function_call" else {"text": item.text}
        ends = [item.event(f"response.{TEXT_OF[item.kind]}.done", **text)]
        if item.kind == "message":
            ends.append(item.event("response.content_part.done", part=item.part()))
        ended = item.object("completed")
        return [*ends, ResponseEvent(type="response.output_item.done", output_index=item.place, item=ended)]

    def _ended(self, finished: Finished, drafts: Drafts, output: list[Item]) -> ResponseObject:
        status, usage = _status_of(finished), self.usage(finished)
        cut = CutShort(reason="max_output_tokens") if status == "incomplete" else None
        counted = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=usage.prompt_tokens_details,
            output_tokens=usage.completion_tokens,
            output_tokens_details=usage.completion_tokens_details,
            total_tokens=usage.total_tokens,
            aft=usage.aft,
        )
        return self._response(status, incomplete_details=cut, output=output, usage=counted, **self.aft(drafts))

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"], **known: Any
    ) -> ResponseObject:
        """Return the response with what is known of it so far."""
        asked, last = self.asked, self.call.plan.sampling_of(self.call.plan.num_layers)
        fields: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None, **known}
        return ResponseObject(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            instructions=asked.get("instructions"),
            max_output_tokens=asked.get("max_output_tokens"),
            metadata=asked.get("metadata") or {},
            model=self.call.model,
            parallel_tool_calls=asked.get("parallel_tool_calls") is not False,
            previous_response_id=None,
            reasoning=ResponseReasoning(effort=self.call.reasoning_effort, summary=None),
            store=False,
            temperature=last.temperature,
            text=asked.get("text") or {"format": {"type": "text"}},
            tool_choice=asked.get("tool_choice") or "auto",
            tools=asked.get("tools") or [],
            top_p=last.top_p,
            truncation="disabled",
            user=asked.get("user"),
            **fields,
        )


def _status_of(finished: Finished) -> Literal["completed", "incomplete"]:
    return "incomplete" if finished.answer.finish_reason == "length" else "completed"
