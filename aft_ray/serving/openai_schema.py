"""The shapes of requests and replies as the OpenAPI document (`/openapi.json`) tells them. Documentation, held true by
tests that send generated requests and check every reply against it; the code that answers does not pass through here.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from aft_ray.inference.events import LayerUsage
from aft_ray.inference.plan import Plan


class Error(BaseModel):
    """What went wrong; `param` names the parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error of the API."""

    error: Error


class Status(BaseModel):
    """Of `/health` and `/ready`."""

    status: str


class AftModel(BaseModel):
    """The server's plan and caps."""

    num_proposals: int
    num_layers: int
    max_num_proposals: int
    max_num_layers: int
    max_tokens: int
    default: bool


class Model(BaseModel):
    """One model, with the names that choose a plan."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    aft: AftModel


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class CachedTokens(BaseModel):
    """Of the prompt tokens, those the prefix cache saved."""

    cached_tokens: int


class AftUsage(BaseModel):
    """Usage by layer."""

    layers: list[LayerUsage]


class Usage(BaseModel):
    """The sum over all sub-calls."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    aft: AftUsage


class Draft(BaseModel):
    """One answer of one layer."""

    index: int
    text: str
    finish_reason: str
    num_tokens: int
    error: str | None
    inputs: list[int]
    length_action: str | None


class AftReply(BaseModel):
    """The plan that ran and every answer by layer (`aft.include_proposals`)."""

    plan: dict[str, Any]
    layers: list[list[Draft]]


class AnswerMessage(BaseModel):
    """The final answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Of an answer."""

    content: list[Logprob]
    refusal: None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    aft: AftReply | None = None


class TextChoice(BaseModel):
    """One of n answers."""

    index: int
    text: str
    logprobs: None
    finish_reason: str


class TextCompletion(BaseModel):
    """The reply of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    aft: AftReply | None = None


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, not allowed, or too much now"},
    "5XX": {"model": ErrorBody, "description": "The server could not answer"},
}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers whole or as a stream of `data: {...}` events that ends with `[DONE]`."""
    event = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event | {"required": ["data"]}}}
    return {200: {"model": model, "description": "The answer, whole or streamed", "content": stream}, **ERRORS}


def aft_schema(switches: tuple[str, ...]) -> dict[str, Any]:
    """JSON schema of the `aft` object: the fields of a plan, all optional, and the switches. What is left out is the
    server's, so Plan's own defaults are not told."""
    schema = TypeAdapter(Plan).json_schema()
    sampling = schema.pop("$defs")["Sampling"]
    text = json.dumps(schema).replace('{"$ref": "#/$defs/Sampling"}', json.dumps(sampling))
    whole: dict[str, Any] = json.loads(text, object_hook=_without_default)
    whole["properties"] |= {name: {"type": "boolean"} for name in switches}
    return whole | {"title": "The plan of this request", "description": "What is left out is the server's own."}


def _without_default(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "default"}
