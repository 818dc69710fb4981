"""The request bodies of the OpenAI API. A parameter that would be ignored is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.engines.base import ToolUse
from aft_ray.errors import nearest
from aft_ray.inference.plan import FinalLayer
from aft_ray.records import Message
from aft_ray.serving.errors import HttpError
from aft_ray.serving.openai.messages import ChatMessage, conversation_of
from aft_ray.serving.openai.schema import aft_schema
from aft_ray.serving.openai.tools import ToolChoice, Tools, tool_use_of

LARGEST_TEMPERATURE = 2.0
LARGEST_TOP_K = 2**31 - 1
LEAST_TOP_P = 1e-6
"""What a `top_p` of 0 means: only the likeliest token."""
MOST_STOPS = 256
"""Maximum stop strings of one layer, each at most `LONGEST_STOP` characters long."""
LONGEST_STOP = 256
MOST_BIASES = 1024
"""Maximum tokens with a bias."""
LONGEST_SCHEMA = 32_768
"""Maximum characters of a JSON schema, which engines compile before they answer."""

WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
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
    "parallel_tool_calls": (True,),
    "chat_template_kwargs": (),
    "functions": (),
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

HINTS = ("prediction", "verbosity")
"""Those of `UNSUPPORTED` that no client relies on: a server may ignore them, as it may ignore unknown parameters."""

SWITCHES = ("include_proposals", "progress")
"""Keys of the `aft` object besides those of the plan."""


def _describe_other_parameters(schema: dict[str, Any]) -> None:
    """Add to the schema the parameters that change nothing, and the refused ones with the values that they may have."""
    nothing: list[Any] = [None, False, 0, "", [], {}]
    refused = {name: {"enum": [*nothing, *values]} for name, values in UNSUPPORTED.items()}
    own = schema["properties"]
    for name in ("stream", "aft"):
        own[name] = {"anyOf": [own[name], {"type": "null"}]}
    top_p, top_k, stop = (own[name]["anyOf"][0] for name in ("top_p", "top_k", "stop"))
    top_p["minimum"] = top_p.pop("exclusiveMinimum")  # `_asking_for_something` says what these values stand for
    top_k["minimum"] = -1
    stop["anyOf"][0]["minLength"] = 0
    schema["properties"] = refused | {name: {} for name in WITHOUT_EFFECT} | own
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


def _asking_for_something(value: Any) -> Any:
    """Return a body without what asks for nothing: null, no stop string, the values that switch a filter off."""
    if not isinstance(value, Mapping):
        return value
    found = {key: part for key, part in value.items() if part is not None or key in WITHOUT_EFFECT}
    for name in ("max_tokens", "max_completion_tokens", "top_k", "n", "seed", "top_logprobs"):
        number = found.get(name)
        if isinstance(number, float) and number.is_integer():  # languages with one kind of number write 64.0
            found[name] = int(number)
    nothing: dict[str, tuple[Any, ...]] = {"top_k": (-1,), "stop": ("",)}
    found = {key: part for key, part in found.items() if not any(part == none for none in nothing.get(key, ()))}
    if found.get("top_p") == 0 and not isinstance(found["top_p"], bool):
        found["top_p"] = LEAST_TOP_P
    return found


def unknown_parameter(name: object, known: Iterable[str]) -> HttpError:
    """Return the refusal of a parameter that no one has heard of, with the nearest known name."""
    shown = str(name)[:100]
    message = f"unknown parameter '{shown}'; {nearest(shown, sorted(known), kind='parameters')}"
    return HttpError(400, message, param=shown, code="unknown_parameter")


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
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None
    ) = None
    ignore_eos: bool | None = None
    stop: Stop | list[Stop] | None = Field(default=None, max_length=MOST_STOPS)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    aft: Annotated[dict[str, Any], WithJsonSchema(aft_schema(SWITCHES))] = {}

    _refusals: tuple[HttpError, ...] = ()

    @property
    def refusals(self) -> tuple[HttpError, ...]:
        """One for each parameter that is unknown, or no more than a hint: `serving.unknown_fields` decides."""
        return self._refusals

    def with_refusals(self, refusals: Iterable[HttpError]) -> Self:
        self._refusals += tuple(refusals)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        _check_text(value)
        value = _asking_for_something(value)
        refusals: list[HttpError] = []
        for key in value if isinstance(value, Mapping) else ():
            if key in cls.model_fields or key in WITHOUT_EFFECT:
                continue
            if key not in UNSUPPORTED:
                refusals.append(unknown_parameter(key, {*cls.model_fields, *WITHOUT_EFFECT}))
            elif value[key] and value[key] not in UNSUPPORTED[key]:
                refusal = f"parameter '{key}' is not supported by this server; leave it out"
                if key not in HINTS:
                    raise PydanticCustomError("unsupported_parameter", "{text}", {"text": refusal, "param": key})
                refusals.append(HttpError(400, refusal, param=key, code="unsupported_parameter"))
        return handler(value).with_refusals(refusals)


MOST_PROMPTS = 256
"""Maximum prompts of one request for completions."""
PromptText = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,7}$")]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    """Options of a stream. `include_usage` adds a last chunk with the token counts."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


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
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )

    @model_validator(mode="after")
    def _fits(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid_value", "top_logprobs needs logprobs: true", {"param": "top_logprobs"})
        self.tool_use()
        return self

    def final_layer(self) -> FinalLayer:
        asked = self.response_format
        schema = None
        if isinstance(asked, JsonObjectFormat):
            schema = '{"type": "object"}'
        elif isinstance(asked, JsonSchemaFormat):
            schema = json.dumps(asked.json_schema.schema_)
        top = (self.top_logprobs or 0) if self.logprobs else None
        return FinalLayer(
            num_choices=self.n or 1,
            top_logprobs=top,
            json_schema=schema,
            tool_use=self.tool_use(),
            is_read=self.stream,
        )

    def tool_use(self) -> ToolUse | None:
        return tool_use_of(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    def template_arguments(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}

    def conversation(self) -> tuple[Message, ...]:
        return conversation_of(self.messages)


class CompletionBody(Body):
    """The body of `POST /v1/completions`. Each of its prompts becomes one user turn.

    With `echo` a model goes on with the prompt as it is, and the log-probabilities of its tokens come too.
    """

    prompt: Annotated[
        PromptText | Ids | Annotated[list[PromptText] | list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("invalid_value", "max_tokens: 0 needs echo: true", {"param": "max_tokens"})
        if self.stream and self.echo:
            text = "stream: a reply with echo comes in one piece; leave out one of the two"
            raise PydanticCustomError("invalid_value", text, {"param": "stream"})
        return self

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Return the prompts, each as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [tuple(index for index in self.prompt if isinstance(index, int))]
        return [
            prompt if isinstance(prompt, str) else tuple(prompt)
            for prompt in self.prompt
            if not isinstance(prompt, int)
        ]

    def of_text(self, text: str) -> CompletionBody:
        """Return this body with one prompt, as text."""
        return self.model_copy(update={"prompt": text})

    def final_layer(self) -> FinalLayer:
        return FinalLayer(num_choices=self.n or 1, top_logprobs=self.logprobs, is_read=self.stream)

    def template_arguments(self) -> dict[str, Any]:
        return {}

    def conversation(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": str(self.prompt)},)


class TokenizeBody(BaseModel):
    """The body of `POST /tokenize`: a text as it is, or a conversation with its generation prompt."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid_value", "give a prompt or messages", {"param": "prompt"})
        return self

    def text(self) -> str | tuple[Message, ...]:
        return conversation_of(self.messages) if self.messages is not None else self.prompt or ""


class DetokenizeBody(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Ids


Body.model_rebuild()
