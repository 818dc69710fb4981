"""The messages of a chat request. Nothing in a message is dropped in silence: it reaches the model or is refused.

    system, developer   text; those that begin a conversation become one system message
    user                text
    assistant           text or null, with `tool_calls`, `reasoning_content` (also as `reasoning`), `refusal`
    tool                the result of the call that `tool_call_id` names

Every message may have a `name`. Content is text or a list of text parts: images, audio and files are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.errors import nearest
from aft_ray.records import Message

WITHOUT_EFFECT = ("id", "status", "annotations", "cache_control", "provider_specific_fields")
"""Keys that clients send back with an answer or for other servers, and that say nothing to the model."""


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


def _text_only(value: Any) -> Any:
    """Refuse parts that are not text, in a sentence that names the part."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_content", "content is text, or a list of text parts")
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = f"of type '{kind[:40]}'" if isinstance(kind, str) else "without a type"
            text = "part {number} is {named}; this server reads text only"
            raise PydanticCustomError("unsupported_part", text, {"number": number, "named": named})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("invalid_content", "part {number} has no text", {"number": number})
    return value


class CalledFunction(BaseModel):
    """The function that a tool call names."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str
    """The arguments: a JSON object, as text."""

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        try:
            value = json.loads(text or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise PydanticCustomError("invalid_arguments", "the arguments of a tool call are a JSON object, as text")
        return text


class CalledTool(BaseModel):
    """A tool call of an earlier answer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn of a conversation. Newer clients say `developer` instead of `system`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_text_only)] = Field(
        default=None, json_schema_extra={"description": "Only an assistant's content may be null."}
    )
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if value[key] and key not in cls.model_fields and key not in WITHOUT_EFFECT:
                name = str(key)[:100]
                context = {"name": name, "hint": nearest(name, sorted(cls.model_fields), kind="keys")}
                raise PydanticCustomError("unknown_key", "a message has no key '{name}' here; {hint}", context)
        return value

    @model_validator(mode="after")
    def _keys_fit_the_role(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("no_content", "only an assistant's message may have no content")
        own = {
            "assistant": (self.tool_calls, self.reasoning_content, self.reasoning, self.refusal),
            "tool": (self.tool_call_id,),
        }
        for role, values in own.items():
            if self.role != role and any(values):
                names = "tool_call_id" if role == "tool" else "tool_calls, reasoning_content and refusal"
                context = {"names": names, "role": role}
                raise PydanticCustomError("wrong_role", "only a message of the role {role} has {names}", context)
        return self

    def plain(self) -> Message:
        """Return the message with the keys of chat templates; those that are empty are left out."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        text = "\n\n".join(filter(None, (text, self.refusal)))
        message = Message(role="system" if self.role == "developer" else self.role, content=text)
        if self.name:
            message["name"] = self.name
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


def conversation_of(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return the messages for the model, with the system messages at the beginning merged into one."""
    plain = [message.plain() for message in messages]
    first_other = next((n for n, message in enumerate(plain) if message["role"] != "system"), len(plain))
    if first_other:
        named = (f"{m['name']}: {m['content']}" if "name" in m else m["content"] for m in plain[:first_other])
        merged = "\n\n".join(named)
        plain[:first_other] = [Message(role="system", content=merged)]
    return tuple(plain)
