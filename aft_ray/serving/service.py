"""What every request needs, and the path of one call: admitted, billed, and answered by the aggregators."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aft_ray.config import ServingConfig
from aft_ray.engines.base import SpanParent
from aft_ray.errors import ConfigError, DeadlineExceeded
from aft_ray.inference.layer import estimated_tokens
from aft_ray.inference.plan import Plan
from aft_ray.serving.errors import HttpError
from aft_ray.serving.limits.admission import Ticket, cost_of
from aft_ray.serving.limits.gate import Gate
from aft_ray.serving.limits.keys import Caller, KeyRing
from aft_ray.serving.limits.ledger import Bill, OpenRequest, RequestLedger
from aft_ray.serving.metrics import count_layer
from aft_ray.serving.openai.request import ChatCall, check_biases, default_model, plan_name
from aft_ray.serving.readiness import Readiness
from aft_ray.serving.run_request import Answers, PoolInfo, RunRequest
from aft_ray.serving.running_call import RunningCall
from aft_ray.serving.traces import Traces


def check_plan_fits(plan: Plan, info: PoolInfo) -> None:
    """Raise ConfigError for a server's plan that leaves no room for any prompt, or biases tokens that no model has."""
    for layer in range(plan.num_layers + (plan.aggregator == "model" or not plan.num_layers)):
        window = (info.aggregator if layer else info.single).max_model_len
        max_tokens = plan.sampling_of(layer).max_tokens
        if max_tokens >= window:
            raise ConfigError(
                f"serving.plan: layer {layer}: max_tokens {max_tokens} leaves no room for a prompt in the model's "
                f"window of {window} tokens. Lower max_tokens, or raise the engine's max_model_len"
            )
    try:
        check_biases(plan, info)
    except HttpError as error:
        raise ConfigError(f"serving.plan: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that a request needs."""

    config: ServingConfig
    answers: Answers
    keys: KeyRing
    gate: Gate
    ledger: RequestLedger
    traces: Traces | None = None
    readiness: Readiness = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "readiness", Readiness(self.answers))

    def caller(self, authorization: str | None) -> Caller:
        """Return the sender of a request from its `Authorization` header, or raise HttpError 401."""
        return self.keys.caller(authorization, self.config.admission.per_key)

    @property
    def current_config(self) -> ServingConfig:
        """The config, with the adapters that are served now."""
        adapters = {name: adapter.path for name, adapter in self.gate.table.adapters.items()}
        default = self.config.default_model or default_model(self.config)  # which no adapter that comes later replaces
        return self.config.model_copy(update={"adapters": adapters, "default_model": default})

    async def open(self, call: ChatCall, key: Caller, request_id: str, reply_id: str) -> OpenRequest:
        """Admit a call, or raise HttpError. Whoever gets the open request must start it or close it."""
        names = (self._adapter_name(call), self._proposer_adapter_name(call))
        cost = cost_of(call.plan, estimated_tokens(call.messages), call.final.num_choices)
        ticket = Ticket(id=reply_id, key=key.name, num_tokens=cost)
        try:
            async with asyncio.timeout(call.plan.deadline_s):
                admitted = await self.gate.enter(ticket, key.limits, names)
        except TimeoutError:
            raise DeadlineExceeded(
                f"deadline_s {call.plan.deadline_s} passed before the request was admitted"
            ) from None
        bill = Bill(
            request_id=request_id,
            id=reply_id,
            key=key.name,
            model=call.name,
            plan=plan_name(call.plan),
            adapter=admitted.ticket.adapters[0],
            on_usage=count_layer,
        )
        return OpenRequest(self.gate, self.ledger, admitted, bill)

    def _adapter_name(self, call: ChatCall) -> str | None:
        return None if call.name == self.config.base_name else call.name

    def _proposer_adapter_name(self, call: ChatCall) -> str | None:
        config = self.config
        if config.proposer_adapter is not None:
            return config.proposer_adapter
        return self._adapter_name(call) if config.proposers_take_adapters else None

    def start(self, call: ChatCall, run_id: str, opened: OpenRequest, trace: SpanParent | None = None) -> RunningCall:
        """Run a call, which closes its open request when it has ended."""
        adapter, proposer_adapter = opened.ticket.adapters
        request = RunRequest(
            run_id=run_id,
            messages=call.messages,
            plan=call.plan,
            final=call.final,
            template_arguments=call.template_arguments,
            run_seed=call.run_seed,
            adapter=adapter,
            proposer_adapter=proposer_adapter,
            cache_salt=opened.ticket.key or None,
            shows_drafts=call.progress or call.include_proposals,
            trace=trace,
        )
        return RunningCall(self.answers.run(request, opened.bill.add), call, opened, self.readiness)
