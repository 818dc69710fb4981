"""Ask an aft_ray endpoint one prompt and keep everything it returns: every draft, every layer, every token.

    POST {base_url}/v1/chat/completions
    {"model": "aft", "messages": [...], "seed": 7, "aft": {"num_proposals": 5, "num_layers": 1,
     "proposal": {"temperature": 0.7, ...}, "aggregation": [{...}], "final": {...}, "include_proposals": true}}

    {"choices": [{"message": {"content": "..."}, "finish_reason": "stop"}],
     "aft": {"layers": [[{"index": 0, "text": "...", "finish_reason": "stop", "num_tokens": 41, "error": null,
                          "inputs": [], "length_action": null}, ...], ...]},
     "usage": {..., "aft": {"layers": [{"layer": 0, "prompt_tokens": 300, "completion_tokens": 210, ...}, ...]}}}

One answered prompt is one row of `ANSWERS` (`answer_row`). A prompt that could not be answered raises EngineError with
the status and the server's own words. A pause that the server asks for (`Retry-After`) holds all prompts that share the
limit. Timeouts and keys belong to the client that is passed in.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pyarrow as pa

from aft_ray.engines.adaptive_limit import AdaptiveLimit, pause_asked_for
from aft_ray.engines.endpoint_reply import reason_of
from aft_ray.errors import EngineError
from aft_ray.inference.events import LayerUsage
from aft_ray.inference.plan import OF_AGGREGATIONS, Plan
from aft_ray.records import PROMPTS, Message

ANSWER = pa.struct(
    [
        ("index", pa.int64()),
        ("text", pa.string()),
        ("reasoning", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("error", pa.string()),
        ("inputs", pa.list_(pa.int64())),
        ("length_action", pa.string()),
    ]
)
LAYER_USAGE = pa.struct(
    [
        ("layer", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("reasoning_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("num_answers", pa.int64()),
        ("num_failed", pa.int64()),
        ("num_cancelled", pa.int64()),
        ("seconds", pa.float64()),
        ("decided_by", pa.string()),
    ]
)
ANSWERS = pa.schema(
    [
        pa.field("prompt_id", pa.string()),
        pa.field("system", pa.string()),
        *(field for field in PROMPTS if field.name != "prompt_id"),
        pa.field("layers", pa.list_(pa.list_(ANSWER))),
        pa.field("answer", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("usage", pa.list_(LAYER_USAGE)),
        pa.field("seconds", pa.float64()),
    ]
)
"""`evaluation/<system>/answers/*.parquet`: one row per prompt, every draft of every layer nested in it."""

ASKS_TO_WAIT = frozenset({429, 503})
"""Statuses of a server that is busy and says for how long."""
MAX_TRIES = 6
MAX_PAUSE_S = 3600.0
"""A server that asks for a longer pause is not waited for."""


@dataclass(frozen=True, kw_only=True)
class AskedDraft:
    """One answer of one layer, as the endpoint returned it."""

    index: int
    text: str
    finish_reason: str | None
    num_tokens: int
    error: str | None = None
    inputs: tuple[int, ...] = ()
    """Indices of the answers of the layer below that it was shown."""
    length_action: str | None = None
    """The length policy's action, such as `drop_longest: dropped 2`; None when everything fitted."""


@dataclass(frozen=True, kw_only=True)
class AskedAnswer:
    """An endpoint's answer to one prompt."""

    layers: tuple[tuple[AskedDraft, ...], ...]
    """Answers by layer, the drafts first."""
    answer: str
    finish_reason: str | None
    usage: tuple[LayerUsage, ...]
    """One entry per layer, 0 .. L."""
    seconds: float
    """From sending the request to the whole reply."""


async def ask(
    client: httpx.AsyncClient,
    base_url: str,
    model: str,
    messages: Sequence[Message],
    plan: Plan,
    seed: int,
    limit: AdaptiveLimit | None = None,
) -> AskedAnswer:
    """Ask one prompt under one plan. Raises EngineError when the endpoint does not answer it.

    `base_url` may end in `/v1` or not. `limit` is shared by the prompts that are asked at a time.
    """
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    limit, body = limit or AdaptiveLimit(1), request_body(model, messages, plan, seed)
    for _ in range(MAX_TRIES):
        async with limit:
            started = time.perf_counter()
            try:
                response = await client.post(url, json=body)
            except httpx.HTTPError as error:
                raise EngineError(f"{url}: no answer: {type(error).__name__}: {error}") from error
            limit.adapt(response.status_code)
        pause = pause_asked_for(response.headers) if response.status_code in ASKS_TO_WAIT else None
        if pause is None or pause > MAX_PAUSE_S:
            break
        limit.hold(pause)
    if response.status_code != httpx.codes.OK:
        raise EngineError(f"{url}: status {response.status_code}: {reason_of(response.text)}")
    return _read_answer(url, response, plan, time.perf_counter() - started)


def request_body(model: str, messages: Sequence[Message], plan: Plan, seed: int) -> dict[str, Any]:
    """Return the request as JSON. It spells the whole plan out (None as null), so no server default applies.

    A plan without aggregations (L=0) leaves out their sampling, which the server would refuse.
    """
    unused = () if plan.num_layers else OF_AGGREGATIONS
    asked = {name: value for name, value in dataclasses.asdict(plan).items() if name not in unused}
    return {
        "model": model,
        "messages": list(messages),
        "seed": seed,
        "stream": False,
        "aft": {**asked, "include_proposals": True},
    }


def answer_row(system: str, prompt: Mapping[str, Any], asked: AskedAnswer) -> dict[str, Any]:
    """Return one row of `ANSWERS`, made from a row of `prompts/` and the endpoint's answer to it."""
    columns = {name: prompt.get(name) for name in PROMPTS.names}
    return {**columns, "system": system, **dataclasses.asdict(asked)}


def _read_answer(url: str, response: httpx.Response, plan: Plan, seconds: float) -> AskedAnswer:
    try:
        body = response.json()
        choice = body["choices"][0]
        asked = AskedAnswer(
            layers=tuple(tuple(_read_draft(draft) for draft in layer) for layer in body["aft"]["layers"]),
            answer=choice["message"]["content"],
            finish_reason=choice["finish_reason"],
            usage=tuple(_read_usage(usage) for usage in body["usage"]["aft"]["layers"]),
            seconds=seconds,
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(
            f"{url}: the reply lacks what an aft_ray endpoint says (choices, aft.layers, usage.aft.layers): "
            f"{type(error).__name__}: {error}; reply: {reason_of(response.text)}"
        ) from error
    _check_depth(url, asked, plan)
    return asked


def _check_depth(url: str, asked: AskedAnswer, plan: Plan) -> None:
    """Raise EngineError when the server ignored the plan, so that it is not measured as if it had followed it."""
    if len(asked.usage) != plan.num_layers + 1:
        raise EngineError(
            f"{url}: asked for num_layers {plan.num_layers} (layers 0 .. {plan.num_layers}), "
            f"the reply accounts for {len(asked.usage)} layer(s)"
        )
    if plan.num_layers and not (asked.layers and asked.layers[0]):
        raise EngineError(f"{url}: asked for the proposals, the reply holds none")
    if not isinstance(asked.answer, str):
        raise EngineError(f"{url}: the answer is {type(asked.answer).__name__}, expected text")


def _read_draft(draft: Mapping[str, Any]) -> AskedDraft:
    return AskedDraft(
        index=draft["index"],
        text=draft["text"],
        finish_reason=draft.get("finish_reason"),
        num_tokens=draft["num_tokens"],
        error=draft.get("error"),
        inputs=tuple(draft.get("inputs") or ()),
        length_action=draft.get("length_action"),
    )


def _read_usage(usage: Mapping[str, Any]) -> LayerUsage:
    known = {field.name for field in dataclasses.fields(LayerUsage)}
    return LayerUsage(**{key: value for key, value in usage.items() if key in known})
