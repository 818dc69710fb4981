"""Reads a conversation in the layouts that data sets use, as messages of {role, content}.

    [{"role": "user", "content": "Hi"}, ...]                   OpenAI and Hugging Face
    [{"from": "human", "value": "Hi"}, ...]                    ShareGPT
    [{"role": "user", "content": [{"type": "text", ...}]}]     content in parts
    "[{\\"role\\": \\"user\\", ...}]"                              any of these as JSON text
    "\\n\\nHuman: Hi\\n\\nAssistant: Hello"                        Anthropic's hh-rlhf, and Nectar

An empty system message is left out. What a message cannot hold, such as an image or a call of a tool, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from aft_ray.errors import InputError
from aft_ray.records import Message

ROLES = ("system", "user", "assistant", "tool", "developer")
OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in ShareGPT, OpenAssistant and others."""
NOT_TEXT = ("tool_calls", "function_call", "images", "image", "audio", "videos", "video")
"""Fields of a message that change what it says, and that a message of text cannot hold."""
HUMAN = re.compile(r"\n\n(Human|Assistant):")


def read_conversation(value: Any, place: str) -> list[Message] | None:
    """Return the messages of a value that is a conversation, and None for a text that is none.

    Raises InputError, which begins with `place`, for a message that cannot be read.
    """
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            return _of_transcript(value)
        value = as_conversation(value)
        if value is None:
            return None
    if not isinstance(value, list):
        raise InputError(f"{place}: expected text or a list of messages, found {kind_of(value)}")
    if not value:
        raise InputError(f"{place}: the list is empty; expected at least one message")
    read = [_message(item, f"{place}, message {number}") for number, item in enumerate(value, start=1)]
    return [message for message in read if message is not None]


def as_conversation(text: str) -> list[Any] | None:
    """Return the list of a conversation that is written as JSON text, or None."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(value, list) and value and all(isinstance(item, dict) and _keys(item) for item in value)
    return value if is_one else None


def read_answer(value: Any, place: str) -> tuple[list[Message], str | None] | None:
    """Return the messages before the last one of a conversation and the text of the last one, which is an answer.

    Returns None for a value that is no conversation. Raises InputError where the last message is no answer.
    """
    value = as_conversation(value) if isinstance(value, str) and not value.startswith("\n\nHuman:") else value
    if not isinstance(value, list | str) or not value:
        return None
    answer: str | None
    if isinstance(value, str):
        *before, last = _of_transcript(value)
        role, answer = last["role"], last["content"]
    else:
        item = value[-1]
        keys = _keys(item) if isinstance(item, Mapping) else None
        if keys is None:
            raise InputError(f"{place}: expected messages that end with the assistant's, found {kind_of(item)}")
        role, content = item[keys[0]], item[keys[1]]
        role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
        answer = None if content is None else _text(content, f"{place}, last message")
        before = (read_conversation(value[:-1], place) or []) if value[:-1] and role == "assistant" else []
    if role != "assistant":
        raise InputError(f"{place}: expected messages that end with the assistant's, found role {excerpt(role)}")
    return before, answer


def user_text(text: str, place: str) -> Message:
    """Return a text as the message of a user. Raises InputError if it is empty."""
    return Message(role="user", content=_not_empty(text, place))


def _keys(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the fields that hold role and content."""
    for keys in (("role", "content"), ("from", "value")):
        if keys[0] in item and keys[1] in item:
            return keys
    return None


def _message(item: Any, place: str) -> Message | None:
    keys = _keys(item) if isinstance(item, Mapping) else None
    if keys is None:
        found = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else kind_of(item)
        raise InputError(f"{place}: expected {{role, content}} or {{from, value}}, found {found}")
    name, content = item[keys[0]], item[keys[1]]
    role = OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{place}: unknown role {excerpt(name)}; expected one of {', '.join(ROLES)}")
    for field in NOT_TEXT:
        if item.get(field):
            raise InputError(f"{place}: '{field}' cannot be a part of a prompt: only text is read")
    if item.get("weight") == 0:
        raise InputError(
            f"{place}: 'weight' 0 asks not to train on this turn, which cannot be chosen turn by turn. Remove the "
            "field where only the last answer is trained on (training_set.answers: last), else the row"
        )
    text = _text(content, place)
    if role == "system" and not text.strip():
        return None
    return Message(role=role, content=_not_empty(text, place, "an answer" if role == "assistant" else "a prompt"))


def _text(content: Any, place: str) -> str:
    """Return the text of a message's content: itself, or its parts, one below the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping | str) for part in content) or not content:
        raise InputError(f"{place}: content: expected text, found {kind_of(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type", "text") in {"text", "input_text", "output_text"} and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise InputError(f"{place}: content: a part of type {excerpt(part.get('type'))}; only text is read")
    return "\n".join(texts)


def _not_empty(text: str, place: str, expected: str = "a prompt") -> str:
    if not text.strip():
        raise InputError(f"{place}: the text is empty; expected {expected}. Add the text or remove the row")
    return text


def _of_transcript(text: str) -> list[Message]:
    """Return the turns of `\\n\\nHuman: ...\\n\\nAssistant: ...`; an empty last answer is left out."""
    parts = HUMAN.split(text)[1:]
    turns = [
        Message(role="user" if name == "Human" else "assistant", content=said.strip())
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def parsed(value: Any) -> Any:
    """Return the list or object that a text holds as JSON; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def kind_of(value: Any) -> str:
    """Return the type of a value in words, for an error message."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def excerpt(value: Any) -> str:
    """Return the repr of a value for an error message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
