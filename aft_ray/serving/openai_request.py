"""From an OpenAI body to a `ChatCall`: model, plan and conversation. Pure; refuses what is not supported.

    {"model": "aft@k5-l2", "messages": [...], "temperature": 0.2}
        -> K=5, L=2, the final layer at temperature 0.2, adapter of `aft`

The plan is the server's default, overridden by the alias, then by the body's `aft` object, then by the OpenAI
parameters, which apply to the final layer (to the only answer at L=0). `seed` fixes the whole run. A parameter that
would be ignored is refused by name, unless its value changes nothing; an unknown one is refused with the nearest known
name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from aft_ray.config import ServingConfig, merge
from aft_ray.engines.base import EngineInfo, Sampling
from aft_ray.errors import nearest
from aft_ray.inference.plan import FinalLayer, Plan
from aft_ray.records import Message
from aft_ray.serving.http_errors import HttpError
from aft_ray.serving.openai_body import (
    LARGEST_TEMPERATURE,
    LARGEST_TOP_K,
    LONGEST_SCHEMA,
    LONGEST_STOP,
    MOST_STOPS,
    SWITCHES,
    Body,
    ChatBody,
    CompletionBody,
)

PLANS = TypeAdapter(Plan)
"""Built once, because building it takes longer than everything else that is done with a body."""
LONGEST_REQUEST_S = 900.0
"""Longest time that a request may take, and the largest deadline it may set. Draining replicas wait longer."""


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A client's request, checked and resolved: the server can answer it."""

    model: str
    """Model name as the client sent it; the response repeats it."""
    name: str
    """Name of the endpoint's model, without the alias."""
    plan: Plan
    final: FinalLayer
    messages: tuple[Message, ...]
    run_seed: int
    stream: bool
    include_usage: bool
    include_proposals: bool
    progress: bool
    """Whether a stream also reports each draft and each layer that is done."""


def model_names(config: ServingConfig) -> list[str]:
    """Return every model of the endpoint: the base model, then the adapters."""
    return [config.base_name, *(config.adapters or {})]


def default_model(config: ServingConfig) -> str:
    """Return the model for requests that name none: the configured one, else the adapter named last."""
    return config.default_model or model_names(config)[-1]


def plan_limits(config: ServingConfig) -> dict[str, int]:
    """Return width and depth of the default plan, and the largest values that a request may ask for."""
    return {
        "num_proposals": config.plan.num_proposals,
        "num_layers": config.plan.num_layers,
        "max_num_proposals": config.max_num_proposals,
        "max_num_layers": config.max_num_layers,
        "max_tokens": config.max_tokens,
    }


def call_of(body: ChatBody | CompletionBody, config: ServingConfig) -> ChatCall:
    """Return the call that a body asks for. Raises HttpError 400 or 404, which names the parameter."""
    messages = body.conversation()
    if len(messages) > config.max_messages:
        message = f"messages: found {len(messages)}, this server allows at most {config.max_messages}"
        raise HttpError(400, message, param="messages")
    model = body.model or default_model(config)
    name, alias = split_alias(model, config)
    include_proposals, progress = _switch(body, "include_proposals"), _switch(body, "progress")
    if progress and not body.stream:
        raise HttpError(400, "aft.progress: only a stream reports progress; set stream to true", param="aft.progress")
    plan = plan_of({**alias, **body.aft}, config.plan)
    plan = _with_sampling(plan, _sampling_changes(body))
    check_limits(plan, config)
    final = body.final_layer()
    check_final(final, plan, config)
    return ChatCall(
        model=model,
        name=name,
        plan=plan,
        final=final,
        messages=messages,
        run_seed=secrets.randbits(62) if body.seed is None else body.seed,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        include_proposals=include_proposals,
        progress=progress,
    )


def _switch(body: Body, name: str) -> bool:
    value = body.aft.get(name, False)
    if not isinstance(value, bool):
        raise HttpError(400, f"aft.{name}: expected true or false", param=f"aft.{name}")
    return value


def split_alias(model: str, config: ServingConfig) -> tuple[str, dict[str, Any]]:
    """`aft@k5-l2` -> ("aft", K=5 and L=2); `aft@single` -> ("aft", L=0); `aft` -> ("aft", nothing)."""
    names = model_names(config)
    if model in names:
        return model, {}
    name, _, alias = model.rpartition("@")
    shape = re.fullmatch(r"k(\d{1,4})-l(\d{1,4})", alias)
    if name in names and shape:
        return name, {"num_proposals": int(shape[1]), "num_layers": int(shape[2])}
    if name in names and alias == "single":
        return name, {"num_layers": 0}
    message = (
        f"model '{model[:100]}' does not exist. Models: {', '.join(names)}; "
        "each also as <model>@k5-l2 (5 proposals, 2 layers) and <model>@single"
    )
    raise HttpError(404, message, param="model", code="model_not_found")


def plan_name(plan: Plan) -> str:
    """Return the alias that asks for this width and depth: `k5-l2` or `single`."""
    return f"k{plan.num_proposals}-l{plan.num_layers}" if plan.num_layers else "single"


def plan_of(asked: Mapping[str, Any], default: Plan) -> Plan:
    """Return the default plan, overridden by the keys that were asked for."""
    plan_keys = {field.name for field in dataclasses.fields(Plan)}
    sampling_keys = {field.name for field in dataclasses.fields(Sampling)}
    changes = {key: value for key, value in asked.items() if key not in SWITCHES}
    for key in changes:
        if key not in plan_keys:
            name = key[:100]
            message = f"unknown key 'aft.{name}'; {nearest(name, sorted({*plan_keys, *SWITCHES}))}"
            raise HttpError(400, message, param=f"aft.{name}", code="unknown_parameter")
    raw = merge(_fitted(dataclasses.asdict(default), changes), changes)
    try:
        return PLANS.validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise _of_plan_error(error.errors()[0], sampling_keys) from None


def _fitted(default: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the default plan's quorum and subset size where they exceed the K that the request asks for."""
    width = changes.get("num_proposals")
    if not isinstance(width, int):
        return default
    return {
        key: None if key in {"quorum", "subset_size"} and value is not None and value > width else value
        for key, value in default.items()
    }


def _of_plan_error(error: ErrorDetails, sampling_keys: set[str]) -> HttpError:
    param = ".".join(["aft", *(str(part) for part in error["loc"])])[:200]
    if error["type"] == "unexpected_keyword_argument":
        message = f"unknown key '{param}'; {nearest(str(error['loc'][-1])[:100], sorted(sampling_keys))}"
        return HttpError(400, message, param=param, code="unknown_parameter")
    message = error["msg"].removeprefix("Value error, ")
    return HttpError(400, f"{param}: {message[0].lower()}{message[1:]}", param=param, code="invalid_value")


def _sampling_changes(body: Body) -> dict[str, Any]:
    """Return the OpenAI sampling parameters that the body sets."""
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    asked = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "stop": None if stop is None else tuple(stop),
    }
    return {key: value for key, value in asked.items() if value is not None}


def _with_sampling(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """Return the plan with changed sampling of its last layer (at L=0, of the proposal)."""
    if not changes:
        return plan
    layer = "final" if plan.num_layers else "proposal"
    return dataclasses.replace(plan, **{layer: dataclasses.replace(getattr(plan, layer), **changes)})


def check_limits(plan: Plan, config: ServingConfig) -> None:
    """Raise HttpError 400, with parameter, value and limit, unless the plan is within the server's limits."""
    sampling = [plan.proposal, *plan.aggregation, plan.final]
    stops = [s.stop for s in sampling]
    limits: list[tuple[str, float, float]] = [
        ("aft.num_layers", plan.num_layers, config.max_num_layers),
        ("aft.num_proposals", plan.num_proposals if plan.num_layers else 1, config.max_num_proposals),
        ("max_tokens", max(s.max_tokens for s in sampling), config.max_tokens),
        ("temperature", max(s.temperature for s in sampling), LARGEST_TEMPERATURE),
        ("top_k", max(s.top_k for s in sampling), LARGEST_TOP_K),
        ("stop", max(map(len, stops)), MOST_STOPS),
        ("stop", max((len(text) for stop in stops for text in stop), default=0), LONGEST_STOP),
        ("aft.deadline_s", plan.deadline_s or 0, LONGEST_REQUEST_S),
        ("aft.draft_deadline_s", plan.draft_deadline_s or 0, LONGEST_REQUEST_S),
    ]
    for param, found, limit in limits:
        if not found <= limit:
            raise HttpError(400, f"{param} {str(found)[:20]}: this server allows at most {limit:g}", param=param)


def check_final(final: FinalLayer, plan: Plan, config: ServingConfig) -> None:
    """Raise HttpError 400, naming the parameter, unless plan and limits allow what is asked of the last layer."""
    if final.num_choices > config.max_num_proposals:
        raise HttpError(400, f"n {final.num_choices}: this server allows at most {config.max_num_proposals}", param="n")
    is_written = plan.num_layers == 0 or (plan.aggregator == "model" and plan.early_stop is None)
    if len(final.json_schema or "") > LONGEST_SCHEMA:
        message = f"response_format: the schema is longer than {LONGEST_SCHEMA} characters"
        raise HttpError(400, message, param="response_format")
    for param in asked_of_last_layer(final):
        if not is_written:
            message = f"{param}: this plan may decide its answer by vote or agreement; leave out {param}, or set "
            raise HttpError(400, message + "aft.aggregator to model and aft.early_stop to null", param=param)


def check_engine(call: ChatCall, engine: EngineInfo) -> None:
    """Raise HttpError 400, naming the parameter, unless the engine of the last layer can do what is asked of it."""
    honoured = {"n": True, "logprobs": engine.gives_logprobs, "response_format": engine.follows_json_schema}
    for param in asked_of_last_layer(call.final):
        if not honoured[param]:
            message = f"parameter '{param}' is not supported by the engine of this server; leave it out"
            raise HttpError(400, message, param=param, code="unsupported_parameter")


def asked_of_last_layer(final: FinalLayer) -> list[str]:
    """Return the parameters that ask for more than one plain answer."""
    asked = {
        "n": final.num_choices > 1,
        "logprobs": final.top_logprobs is not None,
        "response_format": final.json_schema is not None,
    }
    return [param for param, is_asked in asked.items() if is_asked]
