"""The turns of a conversation beyond role and text: names, tool calls, their results.

Chat templates differ in what they have a place for. What a template would leave out is said as text, so that the model
reads everything that was sent:

    {"role": "user", "name": "Ada", "content": "Hi"}       ->   Ada: Hi
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}, ...}]}
                                                           ->   [Calls add with {"a": 1}]
    {"role": "tool", "tool_call_id": ..., "content": "3"}  ->   user: [Result of add] 3
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from aft_ray.records import Message, ToolCall

Neutralise = Callable[[str], str]


def neutralised(message: Message, neutralise: Neutralise) -> Message:
    """Return the message with `neutralise` applied to every text in it."""
    clean = Message(role=message["role"], content=neutralise(message["content"]))
    if "name" in message:
        clean["name"] = neutralise(message["name"])
    if "reasoning_content" in message:
        clean["reasoning_content"] = neutralise(message["reasoning_content"])
    if "tool_call_id" in message:
        clean["tool_call_id"] = neutralise(message["tool_call_id"])
    if "tool_calls" in message:
        clean["tool_calls"] = [_neutralised_call(call, neutralise) for call in message["tool_calls"]]
    return clean


def neutralised_value(value: Any, neutralise: Neutralise) -> Any:
    """Return a JSON value with `neutralise` applied to every text in it."""
    match value:
        case str():
            return neutralise(value)
        case list():
            return [neutralised_value(item, neutralise) for item in value]
        case dict():
            return {neutralise(key): neutralised_value(item, neutralise) for key, item in value.items()}
    return value


def with_arguments_as(kind: type[dict[str, Any]] | type[str], message: Message) -> dict[str, Any]:
    """Return the message with the arguments of its tool calls as a dict or as JSON text, as its template wants them."""
    turn: dict[str, Any] = dict(message)
    if kind is dict and "tool_calls" in message:
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return turn


def in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its text as a list of one part."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def tools_as_text(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with tool calls as text of the assistant, and their results as a turn of the user.

    Results and what the user says next are one turn, because many templates refuse two turns of one role.
    """
    names = {call["id"]: call["function"]["name"] for m in messages for call in m.get("tool_calls", [])}
    told: list[Message] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "a tool")
            message = Message(role="user", content=f"[Result of {name}] {message['content']}")
        elif "tool_calls" in message:
            message = _calls_as_text(message)
        if follows_result and message["role"] == "user":
            told[-1] = Message(role="user", content=f"{told[-1]['content']}\n{name_as_text(message)['content']}")
        else:
            told.append(message)
        follows_result = is_result or (follows_result and message["role"] == "user")
    return told


def name_as_text(message: Message) -> Message:
    """Return the message with its name in front of its text. The name of a tool's result stays where it is."""
    if "name" not in message or message["role"] == "tool":
        return message
    told = message.copy()
    name = told.pop("name")
    told["content"] = f"{name}: {told['content']}"
    return told


def _neutralised_call(call: ToolCall, neutralise: Neutralise) -> ToolCall:
    function = call["function"]
    arguments = neutralised_value(json.loads(function["arguments"] or "{}"), neutralise)
    return ToolCall(
        id=neutralise(call["id"]),
        type=call["type"],
        function={"name": neutralise(function["name"]), "arguments": json.dumps(arguments, ensure_ascii=False)},
    )


def _calls_as_text(message: Message) -> Message:
    calls = [f"[Calls {c['function']['name']} with {c['function']['arguments']}]" for c in message["tool_calls"]]
    told = message.copy()
    del told["tool_calls"]
    told["content"] = "\n".join(filter(None, (told["content"], *calls)))
    return told
