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
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from aft_ray.config import ServingConfig, merge
from aft_ray.engines.base import Sampling
from aft_ray.engines.json_schema import why_not_followed
from aft_ray.errors import nearest
from aft_ray.inference.plan import OF_AGGREGATIONS, FinalLayer, Plan
from aft_ray.records import Message
from aft_ray.serving.errors import HttpError
from aft_ray.serving.openai.body import (
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
from aft_ray.serving.run_request import PoolInfo

PLANS = TypeAdapter(Plan)
"""Built once, because building it takes longer than everything else that is done with a body."""
LONGEST_REQUEST_S = 900.0
"""Longest time that a request may take, and the largest deadline it may set. Draining replicas wait longer."""


CAP_EXCEEDED = "cap_exceeded"
"""Code of the refusal of a value above one of the server's caps; the message has the cap."""
LEAST_HEDGE_S = 1.0
"""Shortest time after which drafts may be requested again: sooner, every draft would be written twice."""


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A client's request, checked and resolved: the server can answer it."""

    model: str
    """Model name as the client sent it; the response repeats it."""
    name: str
    """Name of the endpoint's model, without the alias."""
    plan: Plan
    final: FinalLayer
    template_arguments: Mapping[str, Any]
    """What the chat templates are told besides the messages (`chat_template_kwargs`)."""
    reasoning_effort: str | None
    messages: tuple[Message, ...]
    run_seed: int
    stream: bool
    include_usage: bool
    include_proposals: bool
    ignored: tuple[str, ...] = ()
    """Parameters that the server was told to ignore rather than refuse."""
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
    if body.refusals and config.unknown_fields == "reject":
        raise body.refusals[0]
    messages = body.conversation()
    if len(messages) > config.max_messages:
        message = f"messages: found {len(messages)}, this server allows at most {config.max_messages}"
        raise HttpError(400, message, param="messages", code=CAP_EXCEEDED)
    model = body.model or default_model(config)
    name, alias = split_alias(model, config)
    include_proposals, progress = _switch(body, "include_proposals"), _switch(body, "progress")
    if progress and not body.stream:
        message = "aft.progress: only a stream reports progress; set stream to true"
        raise HttpError(400, message, param="aft.progress", code="invalid_value")
    plan = plan_of({**alias, **body.aft}, config.plan)
    check_single(body.aft, plan)
    plan = _with_sampling(plan, _sampling_changes(body))
    final = body.final_layer()
    if config.excess_max_tokens == "clamp":
        least = min(_last(plan).max_tokens, _last(config.plan).max_tokens)
        plan, final = _with_at_most(plan, config.max_tokens), dataclasses.replace(final, least_tokens=least)
    check_limits(plan, config)
    check_final(final, plan, config)
    return ChatCall(
        model=model,
        name=name,
        plan=plan,
        final=final,
        template_arguments=body.template_arguments(),
        reasoning_effort=body.reasoning_effort if isinstance(body, ChatBody) else None,
        messages=messages,
        run_seed=secrets.randbits(62) if body.seed is None else body.seed,
        stream=body.stream,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        include_proposals=include_proposals,
        ignored=tuple(str(refusal.body.error.param) for refusal in body.refusals),
        progress=progress,
    )


def _switch(body: Body, name: str) -> bool:
    value = body.aft.get(name, False)
    if not isinstance(value, bool):
        raise HttpError(400, f"aft.{name}: expected true or false", param=f"aft.{name}", code="invalid_value")
    return value


def split_alias(model: str, config: ServingConfig) -> tuple[str, dict[str, Any]]:
    """`aft@k5-l2` -> ("aft", K=5 and L=2); `aft@single` -> ("aft", L=0); `aft` -> ("aft", nothing)."""
    names = model_names(config)
    if model in names:
        return model, {}
    name, changes = read_alias(model)
    if name in names:
        return name, changes
    message = (
        f"model '{model[:100]}' does not exist. Models: {', '.join(names)}; "
        "each also as <model>@k5-l2 (5 proposals, 2 layers) and <model>@single"
    )
    raise HttpError(404, message, param="model", code="model_not_found")


def read_alias(model: str) -> tuple[str, dict[str, int]]:
    """Return the name before a suffix and what the suffix changes in the plan; a name without one, and nothing."""
    name, _, suffix = model.rpartition("@")
    if shape := re.fullmatch(r"k(\d{1,4})-l(\d{1,4})", suffix):
        return name, {"num_proposals": int(shape[1]), "num_layers": int(shape[2])}
    return (name, {"num_layers": 0}) if suffix == "single" else (model, {})


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
    asked_json = json.dumps(changes, sort_keys=True)
    try:
        return (_known_plan if len(asked_json) < LONGEST_KNOWN else _plan)(default, asked_json)
    except ValidationError as error:
        raise _of_plan_error(error.errors()[0], sampling_keys) from None


def check_single(asked: Mapping[str, Any], plan: Plan) -> None:
    """Raise HttpError 400 where a request sets the sampling of aggregations and its plan, L=0, makes none."""
    for name in OF_AGGREGATIONS if plan.num_layers == 0 else ():
        if name in asked:
            message = (
                f"aft.{name}: with num_layers 0 nothing is aggregated, so it would be ignored. Set the sampling of the "
                "only answer with aft.proposal, or num_layers to at least 1"
            )
            raise HttpError(400, message, param=f"aft.{name}", code="invalid_value")


def _plan(default: Plan, changes_json: str) -> Plan:
    changes = json.loads(changes_json)
    raw = merge(_fitted(dataclasses.asdict(default), changes), changes)
    return PLANS.validate_json(json.dumps(raw), strict=True)


LONGEST_KNOWN = 1000
"""Longest changes of a plan that are remembered, in characters, so that nobody fills the memory."""
_known_plan = functools.lru_cache(maxsize=256)(_plan)
"""Clients ask for few different plans, and making one takes a tenth of a millisecond."""


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
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()) or None,
        "ignore_eos": body.ignore_eos,
    }
    return {key: value for key, value in asked.items() if value is not None}


def _with_sampling(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """Return the plan with changed sampling of its last layer (at L=0, of the proposal)."""
    if not changes:
        return plan
    layer = "final" if plan.num_layers else "proposal"
    return dataclasses.replace(plan, **{layer: dataclasses.replace(getattr(plan, layer), **changes)})


def _last(plan: Plan) -> Sampling:
    return plan.sampling_of(plan.num_layers)


def _in_all_layers(plan: Plan, change: Callable[[Sampling], Sampling]) -> Plan:
    """Return the plan with the sampling of every layer changed."""
    aggregation = tuple(map(change, plan.aggregation))
    return dataclasses.replace(plan, proposal=change(plan.proposal), aggregation=aggregation, final=change(plan.final))


def _with_at_most(plan: Plan, max_tokens: int) -> Plan:
    """Return the plan with no layer's `max_tokens` above the server's."""
    return _in_all_layers(plan, lambda layer: dataclasses.replace(layer, max_tokens=min(layer.max_tokens, max_tokens)))


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
            message = f"{param} {str(found)[:20]}: this server allows at most {limit:g}"
            raise HttpError(400, message, param=param, code=CAP_EXCEEDED)
    if plan.hedge_s is not None and plan.hedge_s < LEAST_HEDGE_S:
        message = f"aft.hedge_s {plan.hedge_s:g}: this server allows at least {LEAST_HEDGE_S:g}"
        raise HttpError(400, message, param="aft.hedge_s", code="invalid_value")


def check_final(final: FinalLayer, plan: Plan, config: ServingConfig) -> None:
    """Raise HttpError 400, naming the parameter, unless plan and limits allow what is asked of the last layer."""
    if final.num_choices > config.max_num_proposals:
        message = f"n {final.num_choices}: this server allows at most {config.max_num_proposals}"
        raise HttpError(400, message, param="n", code=CAP_EXCEEDED)
    is_written = plan.num_layers == 0 or (plan.aggregator == "model" and plan.early_stop is None)
    if len(final.json_schema or "") > LONGEST_SCHEMA:
        message = f"response_format: the schema is longer than {LONGEST_SCHEMA} characters"
        raise HttpError(400, message, param="response_format", code="invalid_value")
    reason = None if final.json_schema is None else why_not_followed(json.loads(final.json_schema))
    if reason is not None:
        raise HttpError(400, f"response_format: the schema {reason}", param="response_format", code="invalid_value")
    if final.json_schema is not None and final.tool_use is not None and final.tool_use.may_call:
        message = "response_format: an answer cannot both follow a schema and call tools; set tool_choice to none"
        raise HttpError(400, message, param="response_format", code="invalid_value")
    for tool in final.tool_use.tools if final.tool_use is not None else ():
        function = tool.get("function")
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        reason = why_not_followed(schema, is_strict=False) if isinstance(schema, Mapping) else None
        if reason is not None:
            raise HttpError(400, f"tools: the schema of a tool {reason}", param="tools", code="invalid_value")
    for param in asked_of_last_layer(final):
        if not is_written:
            message = (
                f"{param}: this plan may decide its answer by vote or agreement; leave out {param}, or set "
                "aft.aggregator to model and aft.early_stop to null"
            )
            raise HttpError(400, message, param=param, code="invalid_value")


def echoing(call: ChatCall, prompt: str | tuple[int, ...]) -> ChatCall:
    """Return the call as a single sample that goes on with a prompt as it is."""
    plan = call.plan
    sampling = plan.final if plan.num_layers else plan.proposal
    sampling = dataclasses.replace(sampling, max_tokens=max(1, sampling.max_tokens))
    return dataclasses.replace(
        call,
        plan=dataclasses.replace(plan, num_layers=0, proposal=sampling, early_stop=None, aggregator="model"),
        final=dataclasses.replace(call.final, echo=prompt),
    )


def fitted_to_engines(call: ChatCall, info: PoolInfo, unknown: Literal["reject", "ignore"] = "reject") -> ChatCall:
    """Return the call with what the chat templates are told, without what the server ignores rather than refuses.

    Raises HttpError 400, naming the parameter, unless the engine of the last layer can do what is asked of it and the
    templates know what they are told.
    """
    engine = info.aggregator if call.plan.num_layers else info.single
    honoured = {
        "n": True,
        "logprobs": engine.gives_logprobs,
        "echo": engine.gives_prompt_logprobs,
        "response_format": engine.follows_json_schema,
        "tools": engine.calls_tools,
    }
    for param in asked_of_last_layer(call.final):
        if not honoured[param]:
            message = f"parameter '{param}' is not supported by the engine of this server; leave it out"
            raise HttpError(400, message, param=param, code="unsupported_parameter")
    plan = call.plan
    layers = (plan.proposal, *plan.aggregation, plan.final) if plan.num_layers else (plan.proposal,)
    unhonoured = sorted(frozenset().union(*(sampling.extras for sampling in layers)) - info.honours)
    if unhonoured and unknown == "ignore":
        plan = _in_all_layers(plan, lambda layer: layer.without(unhonoured))
        call, unhonoured = dataclasses.replace(call, plan=plan, ignored=(*call.ignored, *unhonoured)), []
    for param in unhonoured:
        message = f"parameter '{param}' is not supported by the engines of this server; leave it out"
        raise HttpError(400, message, param=param, code="unsupported_parameter")
    check_biases(plan, info)
    known = info.template_arguments
    for name in call.template_arguments.keys() - known:
        message = f"chat_template_kwargs.{name[:100]}: no chat template of this server has it; "
        message += f"known: {', '.join(sorted(known)) or 'none'}"
        raise HttpError(400, message, param="chat_template_kwargs", code="unsupported_parameter")
    return dataclasses.replace(call, template_arguments=_of_effort(call, known) | dict(call.template_arguments))


def check_biases(plan: Plan, info: PoolInfo) -> None:
    """Raise HttpError 400 for a `logit_bias` on a token that the model of its layer does not have."""
    layers = [("logit_bias", plan.proposal, info.single_vocabulary)]
    if plan.num_layers:
        layers = [
            ("logit_bias", plan.final, info.aggregator_vocabulary),
            ("aft.proposal.logit_bias", plan.proposal, info.proposer_vocabulary),
            *(("aft.aggregation.logit_bias", one, info.aggregator_vocabulary) for one in plan.aggregation),
        ]
    for param, sampling, vocabulary in layers:
        check_ids([token for token, _ in sampling.logit_bias], vocabulary, param)


def check_ids(ids: Iterable[int], vocabulary: int | None, param: str) -> None:
    """Raise HttpError 400 for an id outside a vocabulary, which a tokenizer would drop; None: it is not known."""
    outside = None if vocabulary is None else next((index for index in ids if not 0 <= index < vocabulary), None)
    if outside is not None:
        message = f"{param}: token id {str(outside)[:20]} is outside the model's vocabulary of {vocabulary} tokens"
        raise HttpError(400, message, param=param, code="invalid_value")


def _of_effort(call: ChatCall, known: frozenset[str]) -> dict[str, Any]:
    """Return how templates are told the reasoning effort: as it is, and whether to think at all."""
    effort = call.reasoning_effort
    if effort is None:
        return {}
    told = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    found = {name: value for name, value in told.items() if name in known}
    if not found and effort != "none":
        message = "parameter 'reasoning_effort' is not supported by the models of this server; leave it out"
        raise HttpError(400, message, param="reasoning_effort", code="unsupported_parameter")
    return found


def asked_of_last_layer(final: FinalLayer) -> list[str]:
    """Return the parameters that ask for more than one plain answer."""
    asked = {
        "n": final.num_choices > 1,
        "logprobs": final.top_logprobs is not None,
        "echo": final.echo is not None,
        "response_format": final.json_schema is not None,
        "tools": final.tool_use is not None and final.tool_use.may_call,
    }
    return [param for param, is_asked in asked.items() if is_asked]
