"""The replies of the endpoint as pydantic models. `/openapi.json` is generated from them and from `body.py`.

`encoded` writes what was given to a model and leaves out the rest, so a field with a default is one that only some
replies have.
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

    plan: Plan
    layers: list[list[Draft]]


class Progress(BaseModel):
    """How far the layer of a finished draft is, or a layer that is done."""

    layer: int
    num_layers: int
    num_done: int
    num_failed: int
    num_proposals: int
    layer_usage: LayerUsage | None = None
    """Of a layer that is done."""
    draft: Draft | None = None
    """A finished draft (`aft.include_proposals`)."""


class AftProgress(BaseModel):
    """The `aft` object of an `aft.progress` event."""

    progress: Progress


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


class CalledFunctionPiece(BaseModel):
    """A piece of a tool call's arguments; the first piece has the function's name."""

    arguments: str
    name: str | None = None


class CalledToolPiece(BaseModel):
    """A piece of a tool call; the first piece has its id and type."""

    index: int
    function: CalledFunctionPiece
    id: str | None = None
    type: Literal["function"] | None = None


class AnswerPiece(BaseModel):
    """A piece of the final answer, of which the first chunk has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledToolPiece] | None = None


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


class ChatPiece(BaseModel):
    """A piece of one of the n answers; the last piece has the reason why the answer ended."""

    index: int
    delta: AnswerPiece
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatChunk(BaseModel):
    """One event of a stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPiece]
    usage: Usage | None = None
    aft: AftReply | AftProgress | None = None


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


class TextPiece(BaseModel):
    """A piece of one of the n answers; the last piece has the reason why the answer ended."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextChoice(TextPiece):
    """One of the n answers."""

    finish_reason: str


class TextChunk(BaseModel):
    """One event of a stream of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextPiece]
    usage: Usage | None = None
    aft: AftReply | AftProgress | None = None


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


class ResponseError(BaseModel):
    """Why a response failed after its stream had begun."""

    code: str
    message: str


class CutShort(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(BaseModel):
    """How much a model was asked to think. Its thinking is an item of the output."""

    effort: str | None
    summary: None


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ReasoningText(BaseModel):
    """The thinking before an answer."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """The thinking of a response."""

    type: Literal["reasoning"]
    id: str
    summary: list[Any]
    content: list[ReasoningText]
    status: ItemStatus


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class MessageItem(BaseModel):
    """The answer of a response."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    content: list[OutputText]
    status: ItemStatus


class FunctionCallItem(BaseModel):
    """A tool call of a response."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


Item = ReasoningItem | MessageItem | FunctionCallItem


class ResponseObject(BaseModel):
    """The reply of `/v1/responses`. What a request asked for is repeated in it as it came."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: CutShort | None
    instructions: Any
    max_output_tokens: Any
    metadata: Any
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    store: Literal[False]
    temperature: float
    text: Any
    tool_choice: Any
    tools: Any
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: Any
    aft: AftReply | None = None


class ResponseEvent(BaseModel):
    """One event of a stream of `/v1/responses`; what else it has depends on its type."""

    type: str
    sequence_number: int = 0
    response: ResponseObject | None = None
    """The response as it is known so far."""
    output_index: int | None = None
    """The place of the item that the event is about."""
    item: Item | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None
    logprobs: list[Any] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


def encoded(reply: BaseModel) -> str:
    """Return a reply as JSON, without the fields that it was not given."""
    return reply.model_dump_json(exclude_unset=True)


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
