"""The request bodies of the OpenAI API. A parameter that would be ignored is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.errors import nearest
from aft_ray.inference.plan import FinalLayer
from aft_ray.records import Message
from aft_ray.serving.openai_schema import aft_schema

LARGEST_TEMPERATURE = 2.0
LARGEST_TOP_K = 2**31 - 1
MOST_STOPS = 256
"""Maximum stop strings of one layer, each at most `LONGEST_STOP` characters long."""
LONGEST_STOP = 256
LONGEST_SCHEMA = 32_768
"""Maximum characters of a JSON schema, which engines compile before they answer."""

WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
"""Parameters that do not change the answer; they are accepted."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "logprobs": (),
    "top_logprobs": (),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "tools": (),
    "functions": (),
    "logit_bias": (),
    "frequency_penalty": (),
    "presence_penalty": (),
    "prediction": (),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (),
    "suffix": (),
}
"""Parameters of the OpenAI API that would change the answer and are refused, each with its values that change nothing
and are accepted (as null, false, 0 and empty values always are). A body that defines such a field supports it.
"""

SWITCHES = ("include_proposals", "progress")
"""Keys of the `aft` object besides those of the plan."""


def _describe_other_parameters(schema: dict[str, Any]) -> None:
    """Add to the schema the parameters that change nothing, and the refused ones with the values that they may have."""
    nothing: list[Any] = [None, False, 0, "", [], {}]
    refused = {name: {"enum": [*nothing, *values]} for name, values in UNSUPPORTED.items()}
    schema["properties"] = refused | {name: {} for name in WITHOUT_EFFECT} | schema["properties"]
    schema["additionalProperties"] = False


def _check_text(value: Any) -> None:
    """Refuse lone surrogates: JSON can spell them (`"\\ud800"`), but no tokenizer and no reply can encode them."""
    if isinstance(value, bytes):  # FastAPI passes a body of another content type on as bytes
        raise PydanticCustomError("invalid_json", "the body is not JSON; send it with content-type: application/json")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("invalid_text", "the body holds text that is not valid Unicode") from None
    except RecursionError:
        raise PydanticCustomError("invalid_json", "the body is nested too deeply") from None


class Body(BaseModel):
    """The parameters that chat and text completions share."""

    # `_refuse` has checked every key before pydantic ignores the rest
    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra=_describe_other_parameters)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=LARGEST_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | list[Stop] | None = Field(default=None, max_length=MOST_STOPS)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    aft: Annotated[dict[str, Any], WithJsonSchema(aft_schema(SWITCHES))] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        _check_text(value)
        for key in value if isinstance(value, Mapping) else ():
            if key in cls.model_fields or key in WITHOUT_EFFECT:
                continue
            name = str(key)[:100]
            if key not in UNSUPPORTED:
                known = sorted({*cls.model_fields, *WITHOUT_EFFECT})
                context = {"param": name, "hint": nearest(name, known, kind="parameters")}
                raise PydanticCustomError("unknown_parameter", "unknown parameter '{param}'; {hint}", context)
            if value[key] and value[key] not in UNSUPPORTED[key]:
                text = "parameter '{param}' is not supported by this server; leave it out"
                raise PydanticCustomError("unsupported_parameter", text, {"param": name})
        return value


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    """Options of a stream. `include_usage` adds a last chunk with the token counts."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation. Newer clients say `developer` instead of `system`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(BaseModel):
    """A named JSON schema. Structured outputs are always strict on this server."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")


class TextFormat(BaseModel):
    """The response format of plain text, which is the default."""

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """The response format of any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """The response format of JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )

    @model_validator(mode="after")
    def _fits(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid_value", "top_logprobs needs logprobs: true", {"param": "top_logprobs"})
        return self

    def final_layer(self) -> FinalLayer:
        asked = self.response_format
        schema = None
        if isinstance(asked, JsonObjectFormat):
            schema = '{"type": "object"}'
        elif isinstance(asked, JsonSchemaFormat):
            schema = json.dumps(asked.json_schema.schema_)
        top = (self.top_logprobs or 0) if self.logprobs else None
        return FinalLayer(num_choices=self.n or 1, top_logprobs=top, json_schema=schema, is_read=self.stream)

    def conversation(self) -> tuple[Message, ...]:
        return tuple(message.plain() for message in self.messages)


class CompletionBody(Body):
    """The body of `POST /v1/completions`. Its prompt becomes one user turn."""

    prompt: str

    def final_layer(self) -> FinalLayer:
        return FinalLayer(num_choices=self.n or 1, is_read=self.stream)

    def conversation(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": self.prompt},)


Body.model_rebuild()
