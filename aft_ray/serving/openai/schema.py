"""The requests and replies as the OpenAPI document (`/openapi.json`) describes them.

The code that answers does not use these models. Tests keep them true: they send generated requests and check every
reply against the document.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from aft_ray.inference.events import LayerUsage
from aft_ray.inference.plan import Plan


class Error(BaseModel):
    """An error; `param` names the parameter that caused it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error reply."""

    error: Error


class Status(BaseModel):
    """The reply of `/health` and `/ready`."""

    status: str


class AftModel(BaseModel):
    """The server's default plan and its limits."""

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
    """The list of all models."""

    object: Literal["list"]
    data: list[Model]


class CachedTokens(BaseModel):
    """The part of the prompt tokens that came from the prefix cache."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """The part of the completion tokens that are not the final answer: drafts, hidden layers, thinking."""

    reasoning_tokens: int


class AftUsage(BaseModel):
    """Usage by layer."""

    layers: list[LayerUsage]
    prompt_tokens: int | None = None
    """Sums over all calls, where the standard fields count the last one alone."""
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Usage(BaseModel):
    """Tokens summed over all engine calls."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: ReasoningTokens
    prompt_tokens_details: CachedTokens
    aft: AftUsage


class Draft(BaseModel):
    """One answer of one layer."""

    index: int
    text: str
    reasoning: str
    finish_reason: str
    num_tokens: int
    error: Literal["empty_answer", "engine_error"] | None
    inputs: list[int]
    length_action: str | None


class AftReply(BaseModel):
    """The plan that ran and every answer by layer (`aft.include_proposals`)."""

    plan: dict[str, Any]
    layers: list[list[Draft]]


class CalledFunction(BaseModel):
    """The function that a tool call names, and its arguments as JSON text."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A tool call of the answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The final answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None


class TopLogprob(BaseModel):
    """A token that was likely in this place."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[Logprob]
    refusal: None


class ChatChoice(BaseModel):
    """One of the n answers."""

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


class TextLogprobs(BaseModel):
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Tokens(BaseModel):
    """The reply of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The reply of `/detokenize`."""

    prompt: str


class TextChoice(BaseModel):
    """One of the n answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
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


class ResponseUsage(BaseModel):
    """Tokens summed over all engine calls."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    aft: AftUsage


class ResponseObject(BaseModel):
    """The reply of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    aft: AftReply | None = None


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong or not allowed, or a limit is reached"},
    "5XX": {"model": ErrorBody, "description": "The server could not answer"},
}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that replies plainly or with a stream of events, which ends with `[DONE]`."""
    event = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event | {"required": ["data"]}}}
    return {200: {"model": model, "description": "The answer, in one piece or streamed", "content": stream}, **ERRORS}


def aft_schema(switches: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON schema of the `aft` object: the fields of a plan, all optional, and the switches.

    It has no defaults: a field that is left out has the server's value, not that of `Plan`.
    """
    schema = TypeAdapter(Plan).json_schema()
    sampling = schema.pop("$defs")["Sampling"]
    text = json.dumps(schema).replace('{"$ref": "#/$defs/Sampling"}', json.dumps(sampling))
    whole: dict[str, Any] = json.loads(text, object_hook=_without_default)
    whole["properties"] |= {name: {"type": "boolean"} for name in switches}
    return whole | {
        "title": "The plan of this request",
        "description": "A field that is left out has the server's value.",
    }


def _without_default(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "default"}
